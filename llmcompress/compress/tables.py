"""Rounding onto anything: a feedback loop over columns with any stored values, and codebooks for rows."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from llmcompress.compress.grid import SHIFT_ROWS

BLOCK_COLUMNS = 128
LLOYD_STEPS = 60
LARGEST_HALF = 65504.0

Nearest = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # (place, column as it stands) -> codes and stored values


def feed_back(weight: Tensor, upper: Tensor, nearest: Nearest) -> Tensor:
    """Round column by column, pushing each error onto the columns still unrounded (GPTQ, arXiv 2210.17323).

    weight   (rows, columns)     float32, in processing order
    upper    (columns, columns)  upper Cholesky factor of the inverse Hessian, in processing order
    nearest  of a column's place in that order and its values `(rows,)`: uint8 codes, and what they stand for
    returns  (rows, columns)     uint8 codes, in processing order
    """
    left = weight.T.contiguous()  # a column of the weight is contiguous
    codes = torch.empty(left.shape, dtype=torch.uint8, device=weight.device)
    columns, diagonal = len(left), upper.diagonal().tolist()
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        errors = torch.empty_like(left[start:stop])
        for column in range(start, stop):
            codes[column], values = nearest(column, left[column])
            torch.div(left[column] - values, diagonal[column], out=errors[column - start])
            rest = slice(column + 1, stop)
            left[rest].addr_(upper[column, rest], errors[column - start], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes.T


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
