"""Even ranges for what o and down read: same function, the codes of columns, the choice of a slow search."""

from functools import partial

import pytest
import torch
from reparam_help import FAMILIES, block_subject, tiny
from torch import Tensor

from llmcompress.compress.reparam.repquant import rewrite
from llmcompress.compress.rewriting.clipping import range_quantizer
from llmcompress.compress.rewriting.evening import (
    FOLDS,
    POWERS,
    SHRINKS,
    Reader,
    by_rows,
    even_out,
    expected_errors,
)
from llmcompress.compress.rewriting.exact import exact
from llmcompress.compress.rewriting.samples import input_samples
from llmcompress.compress.rewriting.sites import Link, links
from llmcompress.compress.rewriting.work import working
from llmcompress.options import ReparamOptions


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reader(columns: int, *, share: int = 1) -> Reader:
    """Of a target whose columns follow `columns / share` rows."""
    row_of = torch.arange(columns) // share
    return Reader(Link("v", "o", row_of), columns // share, normal(6, columns, seed=9), by_rows)


def slow_errors(inputs: Tensor, reader: Reader, bits: int) -> dict[tuple[float, float], float]:
    """Column by column, token by token."""
    found = {}
    columns, rows = inputs.shape[1], reader.rows
    row_of = reader.link.row_of.tolist()

    def factors(part: Tensor, power: float) -> list[float]:
        peaks = [max(float(part[:, c].abs().max()) for c in range(columns) if row_of[c] == row) for row in range(rows)]
        mean = sum(peaks) / rows
        return [(peaks[row_of[c]] / mean) ** power for c in range(columns)]

    for power in POWERS:
        factor = torch.tensor(factors(inputs, power), dtype=torch.float64)
        change = by_rows(reader.weight * factor) / factor - reader.weight
        of_weight = float(((change**2) * (inputs**2).mean(0)).sum())
        for shrink in SHRINKS:
            error, parts = 0.0, inputs.chunk(FOLDS)
            for place, held in enumerate(parts):
                rest = torch.cat([part for other, part in enumerate(parts) if other != place])
                ours = factors(rest, power)
                even = rest / torch.tensor(ours, dtype=torch.float64)
                one = range_quantizer(even.min() * shrink, even.max() * shrink, bits)
                for c in range(columns):
                    back = one(held[:, c] / ours[c]) * ours[c]
                    error += float(((back - held[:, c]) ** 2).sum() * (reader.weight[:, c] ** 2).sum())
            found[power, shrink] = error / len(inputs) + of_weight
    return found


@pytest.mark.parametrize("share", [1, 2])
def test_errors_are_a_slow_search(share: int) -> None:
    inputs = normal(80, 8) * normal(8, seed=1).exp()
    who = reader(8, share=share)
    fast, slow = expected_errors(inputs, who, 6), slow_errors(inputs, who, 6)
    assert fast == pytest.approx(slow)
    best = min(slow, key=slow.__getitem__)
    evened = even_out(inputs, who, 6)
    peak = who.link.reduce(inputs.abs().amax(0), who.rows)
    assert torch.allclose(evened.factor, (peak / peak.mean()) ** best[0])


def test_columns_of_unlike_ranges_are_evened_out() -> None:
    inputs = normal(4000, 32) * torch.logspace(-1.5, 1.5, 32, dtype=torch.float64)
    who = reader(32)
    before = range_quantizer(inputs.min(), inputs.max(), 8)
    evened = even_out(inputs, who, 8)
    factor = evened.factor
    plain = ((before(inputs) - inputs) @ who.weight.T).square().sum(1).mean()
    even = ((evened.quantizer(inputs / factor) * factor - inputs) @ who.weight.T).square().sum(1).mean()
    assert float(even) < 0.3 * float(plain)


def test_columns_whose_peaks_are_rare_keep_room() -> None:
    """A column that is silent but for one token in a fold cannot be trusted to stay where the others saw it."""
    inputs = normal(400, 16)
    rare = inputs.clone()
    rare[:, 8:] *= 0.01
    for fold in range(FOLDS):
        rare[fold * 100 + 50, 8 + 2 * fold] = 3.0
    trusting, careful = even_out(inputs * torch.logspace(-1, 1, 16), reader(16), 8), even_out(rare, reader(16), 8)
    peak = rare.abs().amax(0)
    power = torch.log(careful.factor[9] / careful.factor[8]) / torch.log(peak[9] / peak[8])
    assert len(trusting.factor.unique()) == 16
    assert float(power) <= 0.5


def test_nothing_to_read_is_no_trouble() -> None:
    inputs = torch.zeros(40, 8, dtype=torch.float64)
    evened = even_out(inputs, reader(8), 8)
    assert torch.equal(evened.factor, torch.ones(8, dtype=torch.float64))
    assert torch.equal(evened.quantizer(inputs), inputs)
    assert torch.isfinite(even_out(normal(3, 8), reader(8), 8).factor).all()
    assert torch.isfinite(even_out(normal(1, 8), reader(8), 8).factor).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_compute_the_same_and_codes_are_those_of_columns(family: str) -> None:
    subject = block_subject(tiny(family))
    block = subject.module
    with working(subject) as work:
        found = {link.target: link for link in links(block, work.probe)}
    see = partial(input_samples, block, subject.calls, list(found), tokens=10**6, skip_first=False)
    with exact():
        before = see() if found else {}
        reference = subject.first.run(block)
        result = rewrite(subject, ReparamOptions())
        after = see() if found else {}
        assert torch.allclose(subject.first.run(block), reference, rtol=1e-8, atol=1e-10)
    assert set(found) <= set(result.quantizers)
    assert not result.fallbacks
    for target in found:
        quantizer = result.quantizers[target]
        alive = before[target].abs().amax(0) > 0
        factor = (before[target].abs().amax(0) / after[target].abs().amax(0))[alive]
        of_columns = quantizer.codes(before[target][:, alive] / factor)
        assert torch.equal(of_columns, quantizer.codes(after[target][:, alive]))
