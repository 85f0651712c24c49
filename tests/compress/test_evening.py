"""Even ranges for what o and down read: same function, the codes of columns, the choice of a slow search."""

import math
from functools import partial
from itertools import product

import pytest
import torch
from reparam_help import FAMILIES, block_subject, tiny
from torch import Tensor

from llmcompress.compress.reparam.repquant import rewrite
from llmcompress.compress.rewriting.clipping import range_quantizer
from llmcompress.compress.rewriting.evening import (
    FOLDS,
    POWERS,
    ROOMS,
    SHRINKS,
    Evened,
    Reader,
    Shape,
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


def slow_errors(inputs: Tensor, reader: Reader, bits: int) -> dict[Shape, float]:
    """Column by column, token by token."""
    found = {}
    columns, rows = inputs.shape[1], reader.rows
    row_of = reader.link.row_of.tolist()

    def factors(part: Tensor, power: float, room: float) -> list[float]:
        ups, downs = [0.0] * rows, [0.0] * rows
        for c in range(columns):
            ups[row_of[c]] = max(ups[row_of[c]], float(part[:, c].max()))
            downs[row_of[c]] = max(downs[row_of[c]], -float(part[:, c].min()))
        peaks = [max(pair) for pair in zip(ups, downs, strict=True)]
        plain = [(peak / (sum(peaks) / rows)) ** power for peak in peaks]
        middle = sorted(peak / factor for peak, factor in zip(peaks, plain, strict=True))[(rows - 1) // 2]
        whole = [max(factor, peak / middle / room) for peak, factor in zip(peaks, plain, strict=True)]
        return [whole[row] * (-1 if downs[row] > ups[row] else 1) for row in row_of]

    for power, room in product(POWERS, ROOMS):
        factor = torch.tensor(factors(inputs, power, room), dtype=torch.float64)
        change = by_rows(reader.weight * factor) / factor - reader.weight
        of_weight = float(((change**2) * (inputs**2).mean(0)).sum())
        for shrink in SHRINKS:
            errors, parts = [], inputs.chunk(FOLDS)
            for place, held in enumerate(parts):
                rest = torch.cat([part for other, part in enumerate(parts) if other != place])
                ours = factors(rest, power, room)
                even = rest / torch.tensor(ours, dtype=torch.float64)
                one = range_quantizer(even.min() * shrink, even.max() * shrink, bits)
                error = 0.0
                for c in range(columns):
                    back = one(held[:, c] / ours[c]) * ours[c]
                    error += float(((back - held[:, c]) ** 2).sum() * (reader.weight[:, c] ** 2).sum())
                errors.append(error / len(held) + of_weight)
            found[Shape(power, room, shrink)] = math.prod(errors) ** (1 / FOLDS)
    return found


@pytest.mark.parametrize("share", [1, 2])
def test_errors_are_a_slow_search(share: int) -> None:
    inputs = normal(80, 8) * normal(8, seed=1).exp()
    who = reader(8, share=share)
    fast, slow = expected_errors(inputs, who, 6), slow_errors(inputs, who, 6)
    assert fast == pytest.approx(slow)
    best = min(slow, key=slow.__getitem__)
    ends = torch.stack([inputs.amin(0), inputs.amax(0)])
    assert torch.equal(even_out(inputs, who, 6).factor, who.factor(ends, best.power, best.room))


def output_errors(inputs: Tensor, who: Reader, evened: Evened) -> Tensor:
    """Mean squared error in the reader's output of the static range that was seen, and of the evened one."""
    plain = range_quantizer(inputs.min(), inputs.max(), 8)(inputs)
    factor = who.link.gather(evened.factor, 1.0)
    even = evened.quantizer(inputs / factor) * factor
    return torch.stack([((back - inputs) @ who.weight.T).square().sum(1).mean() for back in (plain, even)])


def test_columns_of_unlike_ranges_are_evened_out() -> None:
    inputs = normal(4000, 32) * torch.logspace(-1.5, 1.5, 32, dtype=torch.float64)
    who = reader(32)
    plain, even = output_errors(inputs, who, even_out(inputs, who, 8))
    assert float(even) < 0.3 * float(plain)


def test_columns_that_lean_to_either_side_are_turned_to_one() -> None:
    """Half of the columns are positive and half negative: turned, they need half the range, a quarter of the error."""
    inputs = torch.rand(4000, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, ::2] *= -1
    who = reader(32)
    evened = even_out(inputs, who, 8)
    plain, even = output_errors(inputs, who, evened)
    assert bool((evened.factor[::2] < 0).all())
    assert bool((evened.factor[1::2] > 0).all())
    assert float(even) == pytest.approx(float(plain) / 4, rel=0.1)


def test_a_peak_seen_once_takes_range_from_its_own_column_alone() -> None:
    """Other tokens are rounded as if it were not there; what is left of the error is that of its column."""
    inputs = normal(4000, 32) * torch.logspace(-0.5, 0.5, 32, dtype=torch.float64)
    inputs[10, 5] = 300.0
    who = reader(32)
    evened = even_out(inputs, who, 8)
    spread = range_quantizer(inputs.min(), inputs.max(), 8)(inputs) - inputs
    change = evened.quantizer(inputs / evened.factor) * evened.factor - inputs
    plain, even = (((found @ who.weight.T) ** 2).sum(1)[11:].mean() for found in (spread, change))
    assert float(even) < 0.1 * float(plain)
    others = torch.arange(32) != 5
    assert float(evened.factor[5].abs()) > 4 * float(evened.factor[others].abs().max())


def test_what_was_not_seen_widens_its_own_column() -> None:
    inputs, who = normal(4000, 32), reader(32)
    unseen = torch.stack([-torch.ones(32), torch.ones(32)]).double()
    unseen[1, 7] = 40.0
    without, widened = even_out(inputs, who, 8), even_out(inputs, who, 8, unseen=unseen)
    tokens = torch.zeros(1, 32, dtype=torch.float64)
    tokens[0, 7] = 40.0
    back = [found.quantizer(tokens / found.factor) * found.factor for found in (without, widened)]
    assert float(back[0][0, 7]) < 8
    assert float(back[1][0, 7]) == pytest.approx(40.0, rel=0.4)
    ratio = output_errors(inputs, who, widened)[1] / output_errors(inputs, who, without)[1]
    assert float(ratio) < 10  # a range of 40 for all columns would be (40 / 4)**2


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
        followed = (before[target] * after[target]).sum(0) / after[target].square().sum(0)
        factor = followed[alive]
        of_columns = quantizer.codes(before[target][:, alive] / factor)
        assert torch.equal(of_columns, quantizer.codes(after[target][:, alive]))
