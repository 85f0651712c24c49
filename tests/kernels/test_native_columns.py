"""The C library's rounding with feedback and descent against torch, and against loops where sums are exact."""

import math
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.compress import sequential
from llmcompress.compress.descent import descend_plainly, metric_of
from llmcompress.compress.grid import CLIPS, Codes, find_scale, proxy_loss
from llmcompress.compress.rounding import Request, Seen
from llmcompress.kernels import compiled, native_columns, native_grid
from llmcompress.kernels.native_columns import Descent, Feedback
from llmcompress.spec import LinearSpec
from llmcompress.types import QuantizerOptions

pytestmark = pytest.mark.skipif(compiled.library()[0] is None, reason="there is no C compiler")
LEVELS = sorted(set(native_grid.LEVELS.values()) - {native_grid.BEST})
EXACT = 1 << 24  # whole numbers below have sums in float32 that do not depend on their order


def hessian_of(columns: int, seed: int) -> Tensor:
    """Of inputs that are correlated and of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / math.sqrt(columns) + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixed
    inputs *= torch.rand(columns, generator=generator) + 0.1
    return inputs.T @ inputs / len(inputs)


@st.composite
def whole_numbers(draw: st.DrawFn) -> tuple[Tensor, Codes, Feedback, Tensor]:
    """Weights, codes, a factor and a metric that are small whole numbers, scales and diagonals powers of two."""
    size, groups, rows = draw(st.sampled_from([8, 24, 32, 130, 160])), draw(st.integers(1, 3)), draw(st.integers(1, 90))
    columns, bits = size * groups, draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))

    def among(values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=generator)]

    def sparse() -> Tensor:
        found = among([-1.0, 1.0], columns, columns)
        return found * (torch.rand(columns, columns, generator=generator) < 3 / columns)

    upper = torch.triu(sparse(), 1) + torch.diag(among([0.5, 1.0, 2.0], columns))
    metric = torch.triu(sparse(), 1)
    metric = metric + metric.T + torch.diag(among([4.0, 8.0], columns))
    weight = torch.randint(-60, 61, (rows, columns), generator=generator).float()
    scale = among([1.0, 2.0, 4.0], rows, groups).bfloat16()
    codes = torch.randint(0, 1 << bits, weight.shape, generator=generator).to(torch.uint8)
    order = torch.randperm(columns, generator=generator)
    spec = LinearSpec(bits=bits, group_size=size)
    return weight, Codes(codes, scale, spec), Feedback(order, upper, torch.ones(columns)), metric


def feedback_by_hand(weight: Tensor, codes: Codes, feedback: Feedback) -> Tensor | None:
    """Codes, a row and a column at a time in float64; None where a number is too large for float32 to be exact."""
    half, found = 1 << (codes.spec.bits - 1), torch.empty(weight.shape, dtype=torch.uint8)
    upper = feedback.upper.double()
    for row, values in enumerate(weight.double()):
        left, steps = values[feedback.order], codes.scale[row].double()
        for place, column in enumerate(feedback.order.tolist()):
            step = steps[column // codes.spec.group_size]
            level = torch.round(left[place] / step).clamp(-half, half - 1)
            found[row, column] = int(level) + half
            error = (left[place] - level * step) / upper[place, place]
            left[place + 1 :] -= upper[place, place + 1 :] * error
            if left.abs().max() * 4 > EXACT:
                return None
    return found


def descent_by_hand(weight: Tensor, codes: Codes, metric: Tensor) -> Tensor:
    """Codes after one pass over the columns, in float64."""
    half = 1 << (codes.spec.bits - 1)
    steps = codes.scale.double().repeat_interleave(codes.spec.group_size, 1)
    found, wide = codes.codes.double(), metric.double()
    for column in range(weight.shape[1]):
        slope = (((found - half) * steps - weight.double()) @ wide)[:, column]
        wanted = found[:, column] - slope / (wide[column, column] * steps[:, column])
        found[:, column] = torch.round(wanted).clamp(0, 2 * half - 1)
    return found.to(torch.uint8)


@given(whole_numbers())
@settings(max_examples=25, deadline=None)
def test_codes_are_those_of_a_loop_by_hand(case: tuple[Tensor, Codes, Feedback, Tensor]) -> None:
    weight, codes, feedback, metric = case
    first = slice(0, 7), slice(None)
    few = Codes(codes.codes[first], codes.scale[first], codes.spec)
    by_feedback = feedback_by_hand(weight[first], few, feedback)
    assume(by_feedback is not None and weight.numel())
    assert by_feedback is not None
    by_descent = descent_by_hand(weight[first], few, metric)
    for level in LEVELS:
        found = native_columns.rounded(weight, codes.spec, codes.scale, feedback, level=level)
        assert found is not None
        assert torch.equal(found.scale, codes.scale)
        assert torch.equal(found.codes[first], by_feedback)
        found = native_columns.descended(weight, codes, Descent(metric, 1), level=level)
        assert found is not None
        assert torch.equal(found.codes[first], by_descent)
        if codes.scale.shape[1] == 1:  # what comes of several scales is no whole number
            wanted = descend_plainly(weight, codes, metric, 1)
            assert torch.equal(found.codes, wanted.codes)
            assert torch.equal(found.scale, wanted.scale)


@pytest.mark.parametrize("order", ["group", "act", "plain"])
@pytest.mark.parametrize("shape", [(70, 192, 32), (130, 390, 130), (16, 320, 320), (65, 512, 256)])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_losses_are_those_of_torch(shape: tuple[int, int, int], order: str, bits: int) -> None:
    rows, columns, size = shape
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits)) * 0.02
    hessian, spec = hessian_of(columns, 1), LinearSpec(bits=bits, group_size=size)
    for sweeps in (0, 3):
        options = QuantizerOptions(order=order, sweeps=sweeps)
        work, _ = sequential._work_of(Seen(hessian), size, options, torch.bfloat16)
        assert work is not None
        (wanted,) = work.round_plainly([Request(weight, spec)])
        (found,) = work.round([Request(weight, spec)])
        before, after = (proxy_loss(weight, codes.dequantize(), hessian) for codes in (wanted, found))
        assert after == pytest.approx(before, rel=0.01)
        assert (found.codes == wanted.codes).float().mean() > 0.97
        assert (found.scale == wanted.scale).float().mean() > 0.97


@pytest.mark.parametrize("method", [{"target": "gptaq"}, {"pull": 0.2}], ids=["gptaq", "foem"])
def test_what_the_loop_in_c_lacks_is_settled_in_c_all_the_same(
    method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hessian, spec = hessian_of(192, 4), LinearSpec(bits=3, group_size=32)
    weight = torch.randn(70, 192, generator=torch.Generator().manual_seed(5)) * 0.02
    drift = hessian * torch.rand(192, generator=torch.Generator().manual_seed(6)) * 0.1
    options = QuantizerOptions(order="group", sweeps=3, **method)
    work, _ = sequential._work_of(Seen(hessian, drift=drift), 32, options, torch.bfloat16)
    assert work is not None
    (wanted,) = work.round_plainly([Request(weight, spec)])
    spy = Mock(wraps=native_columns.descended)
    monkeypatch.setattr(native_columns, "descended", spy)
    (found,) = work.round([Request(weight, spec)])
    spy.assert_called_once()
    before, after = (proxy_loss(weight, codes.dequantize(), hessian) for codes in (wanted, found))
    assert after == pytest.approx(before, rel=0.001)
    assert (found.codes == wanted.codes).float().mean() > 0.99
    assert (found.scale == wanted.scale).float().mean() > 0.99


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [32, 192])
def test_descent_never_loses(level: int, size: int) -> None:
    weight = torch.randn(77, 384, generator=torch.Generator().manual_seed(0))
    hessian, spec = hessian_of(384, 2), LinearSpec(bits=3, group_size=size)
    metric, scale = metric_of(hessian, 0.01), find_scale(weight, spec, torch.float16)
    codes = Codes(torch.full(weight.shape, 4, dtype=torch.uint8), scale, spec)
    losses = [proxy_loss(weight, codes.dequantize(), metric)]
    for _ in range(6):
        found = native_columns.descended(weight, codes, Descent(metric, 1), level=level)
        assert found is not None
        codes = found
        losses.append(proxy_loss(weight, codes.dequantize(), metric))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(losses))
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("level", LEVELS)
def test_a_row_depends_neither_on_others_nor_on_threads(level: int) -> None:
    weight = torch.randn(150, 256, generator=torch.Generator().manual_seed(0))
    hessian, spec = hessian_of(256, 3), LinearSpec(bits=3, group_size=64)
    work, _ = sequential._work_of(Seen(hessian), 64, QuantizerOptions(sweeps=2), torch.bfloat16)
    assert work is not None
    feedback = Feedback(work.factor.order, work.factor.upper, work.importance, CLIPS)
    descent, empty = Descent(metric_of(hessian, 0.01), 2), torch.empty((150, 4), dtype=torch.bfloat16)

    def parts(*sizes: int) -> tuple[Tensor, Tensor]:
        found = [
            native_columns.rounded(part, spec, empty[: len(part)], feedback, descent, level=level)
            for part in torch.split(weight, sizes)
        ]
        whole = [codes for codes in found if codes is not None]
        return torch.cat([codes.codes for codes in whole]), torch.cat([codes.scale for codes in whole])

    before, one = torch.get_num_threads(), parts(150)
    try:
        torch.set_num_threads(3)
        others = [parts(150), parts(1, 63, 86), parts(17, 70, 63)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(left, right) for other in others for left, right in zip(one, other, strict=True))


def test_what_is_not_for_the_library_is_left_to_torch() -> None:
    weight, spec = torch.ones(2, 64), LinearSpec(bits=4, group_size=32)
    feedback = Feedback(torch.arange(64), torch.eye(64), torch.ones(64), CLIPS)
    scale = torch.ones(2, 2, dtype=torch.bfloat16)
    assert native_columns.rounded(weight, spec, scale, feedback) is not None
    strange = weight.clone()
    strange[1, 40] = math.nan
    assert native_columns.rounded(strange, spec, scale, feedback) is None
    assert native_columns.rounded(weight.double(), spec, scale, feedback) is None
    assert native_columns.rounded(weight, spec, scale.double(), feedback) is None
    codes = Codes(torch.zeros(2, 64, dtype=torch.uint8), scale, spec)
    assert native_columns.descended(weight, codes, Descent(torch.eye(64) * math.nan, 1)) is None
    assert not codes.codes.any()  # what was given is as it was


def test_one_row_is_not_descended_in_place() -> None:
    codes = Codes(torch.full((1, 32), 3, dtype=torch.uint8), torch.ones(1, 1), LinearSpec(bits=4, group_size=32))
    found = descend_plainly(torch.ones(1, 32), codes, torch.eye(32), 1)
    assert bool((codes.codes == 3).all())
    assert bool((found.codes == 9).all())
