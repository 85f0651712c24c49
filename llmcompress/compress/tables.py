"""Codebooks for rows: a table of values of its own for each."""

import math

import torch
from torch import Tensor

from llmcompress.compress.grid import SHIFT_ROWS

LLOYD_STEPS = 60
LARGEST_HALF = 65504.0


def fit_codebooks(weight: Tensor, importance: Tensor, bits: int) -> Tensor:
    """A table of `2**bits` values for each row by weighted k-means, ascending, as stored in float16.

    weight      (rows, columns)  float32
    importance  (columns,)       weight of each column's squared error, positive
    returns     (rows, 2**bits)

    Lloyd's iteration from the best table of a normal distribution for many values. In one dimension a cluster is a
    range of the sorted row, so that a step costs sums over ranges, which differences of running sums give.
    """
    step = max(SHIFT_ROWS // weight.shape[1], 1)
    weights = (importance / importance.mean()).double()
    return torch.cat([_fit_rows(part.double(), weights, bits) for part in torch.split(weight, step)])


def _fit_rows(rows: Tensor, importance: Tensor, bits: int) -> Tensor:
    ordered, order = rows.sort(dim=1)
    each = importance[order]
    mass = torch.nn.functional.pad(each.cumsum(1), (1, 0))
    moment = torch.nn.functional.pad((each * ordered).cumsum(1), (1, 0))
    mean = moment[:, -1:] / mass[:, -1:]
    spread = ((each * (ordered - mean).square()).sum(1, keepdim=True) / mass[:, -1:]).sqrt()
    places = (torch.arange(1 << bits, dtype=torch.float64, device=rows.device) + 0.5) / (1 << bits)
    table = mean + spread * math.sqrt(3.0) * torch.special.ndtri(places)
    for _ in range(LLOYD_STEPS):
        cuts = torch.searchsorted(ordered, (table[:, 1:] + table[:, :-1]) / 2)
        ends = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=rows.shape[1])
        count, total = mass.gather(1, ends).diff(dim=1), moment.gather(1, ends).diff(dim=1)
        filled = ends.diff(dim=1) > 0
        found = torch.where(filled, total / count.clamp_min(1e-300), table)
        if torch.equal(found, table):
            break
        table = found
    stored: Tensor = table.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16)
    return stored.sort(dim=1).values


def nearest_entries(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, uint8, and values of the nearest entry of each row's table.

    values  (rows, columns)   float32
    table   (rows, entries)   float32, ascending
    """
    codes = torch.searchsorted((table[:, 1:] + table[:, :-1]) / 2, values.contiguous())
    return codes.to(torch.uint8), table.gather(1, codes)
