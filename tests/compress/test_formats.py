"""The contract of quantizers that make other formats than symmetric integers, and what each of them is."""

import pytest
import torch
from test_quantizers import OPTIONS, PACKAGE, problem, quantized, slow_gptq
from torch import Tensor

from llmcompress.compress.feedback import Integers, Loop, Nearest, column_order, damped, inverse_factor, round_columns
from llmcompress.compress.formats import exporter_of, maker, widths_of_maker
from llmcompress.compress.grid import Codes, expand_scale, find_scale, gaussian_distortion, proxy_loss, round_to_grid
from llmcompress.compress.quantizers import codebook, hqq, twotier
from llmcompress.compress.rounding import Request, Seen
from llmcompress.compress.tables import fit_codebooks, nearest_entries
from llmcompress.kernels import stored
from llmcompress.plugins import available, find
from llmcompress.spec import INPUTS
from llmcompress.types import LinearSpec, QuantizerOptions

OTHERS = [name for name in available(PACKAGE) if hasattr(find(PACKAGE, name), "formats")]


def widths(name: str, columns: int = 128) -> dict[int, LinearSpec]:
    """The formats a quantizer makes, by width."""
    make = maker(find(PACKAGE, name), OPTIONS, 64)
    return {bits: spec for bits in range(2, 9) if (spec := make(bits, columns)) is not None}


CASES = [(name, spec) for name in OTHERS for spec in widths(name).values()]


@pytest.mark.parametrize(("name", "spec"), CASES, ids=repr)
def test_contract(name: str, spec: LinearSpec) -> None:
    weight, hessian = problem()
    before = weight.clone()
    found = quantized(name, weight, hessian, spec)
    codes = found.codes
    assert found.fallbacks == ()
    assert torch.equal(weight, before)
    assert codes.spec == spec
    assert codes.codes.dtype == torch.uint8
    assert codes.codes.shape == weight.shape
    assert float((codes.dequantize() - weight).square().mean()) < 0.5 * 4.0 ** (1 - spec.bits) + 0.15
    tensors = stored.tensors_of("m.q", codes)
    layout = stored.layout_of("m.q", spec, (48, 128), "BF16")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {n: s for n, (_, s) in layout.items()}
    assert torch.equal(stored.codes_of("m.q", spec, tensors.__getitem__).dequantize(), codes.dequantize())


@pytest.mark.parametrize(("name", "spec"), CASES[::2], ids=repr)
def test_requests_do_not_touch_each_other(name: str, spec: LinearSpec) -> None:
    (one, hessian), (other, _) = problem(), problem(seed=1)
    requests, seen = [Request(one, spec), Request(other[:16], spec)], Seen(hessian)
    together = find(PACKAGE, name).quantize(requests, seen, options=OPTIONS, dtype=torch.bfloat16)
    for request, result in zip(requests, together, strict=True):
        alone = quantized(name, request.weight, hessian, spec)
        assert torch.equal(alone.codes.dequantize(), result.codes.dequantize())


@pytest.mark.parametrize(("name", "spec"), CASES[::2], ids=repr)
@pytest.mark.parametrize("blind", ["nothing", "nan"])
def test_without_calibration_there_is_plain_rounding_on_record(name: str, spec: LinearSpec, blind: str) -> None:
    weight, hessian = problem()
    weight[0], weight[1] = 0, 0.25
    seen = None if blind == "nothing" else Seen(hessian * float("nan"))
    (found,) = find(PACKAGE, name).quantize([Request(weight, spec)], seen, options=OPTIONS, dtype=torch.bfloat16)
    assert len(found.fallbacks) == (1 if find(PACKAGE, name).NEEDS_HESSIAN else 0)
    stored_weight = found.codes.dequantize()
    assert bool((stored_weight[0] == 0).all())
    assert float((stored_weight[1] - 0.25).abs().max()) < (2e-2 if spec.double else 2e-3)
    assert float((stored_weight - weight).square().mean()) < 0.5 * 4.0 ** (1 - spec.bits) + 0.1


@pytest.mark.parametrize("name", [name for name in OTHERS if len(widths(name)) > 1])
def test_error_falls_with_width(name: str) -> None:
    weight, hessian = problem()
    results = [quantized(name, weight, hessian, spec).codes for spec in widths(name).values()]
    losses = [proxy_loss(weight, codes.dequantize(), hessian) for codes in results]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 100


@pytest.mark.parametrize(("name", "spec"), CASES, ids=repr)
def test_gaussian_distortion_is_that_of_the_table(name: str, spec: LinearSpec) -> None:
    fits = name == "codebook" and spec.bits > 4  # tables of rows fit few weights better than a distribution
    columns = 8192 if fits else 2048
    weight = torch.randn(128, columns, generator=torch.Generator().manual_seed(0))
    (found,) = find(PACKAGE, name).quantize([Request(weight, spec)], None, options=OPTIONS, dtype=torch.float16)
    error = (found.codes.dequantize() - weight).square().mean() / weight.square().mean()
    assert float(error) == pytest.approx(gaussian_distortion(spec), rel=0.2 if fits else 0.06)


def test_what_is_made_and_what_holds_it() -> None:
    made = {name: widths_of_maker(maker(find(PACKAGE, name), OPTIONS, 64), 64) for name in OTHERS}
    every = tuple(range(2, 9))
    assert made == {"codebook": every, "fp4": (4,), "fp8": (8,), "hqq": every, "nf4": (4,), "twotier": every[:5]}
    assert widths("codebook", 100)
    assert not widths("hqq", 100)
    assert not widths("nf4", 96)
    three, four, nf4 = LinearSpec(bits=3, group_size=64), LinearSpec(bits=4, group_size=32), widths("nf4")[4]
    plain = nf4.model_copy(update={"double": False})
    cases = [([three, four], "compressed_tensors"), ([nf4, nf4], "bnb"), ([nf4, plain], "native")]
    token = {"inputs": INPUTS["int8-token"]}
    cases += [([three, widths("fp8")[8].model_copy(update=token)], "compressed_tensors")]
    cases += [
        ([nf4.model_copy(update=token)], "native"),
        ([three, nf4], "native"),
        ([widths("twotier")[3]], "native"),
        ([three, widths("hqq")[3]], "native"),
    ]
    for specs, expected in cases:
        assert exporter_of(specs).__name__.rpartition(".")[2] == expected


# feedback and codebooks


def integer_nearest(scale: Tensor, bits: int) -> Nearest:
    half = 1 << (bits - 1)

    def nearest(place: int, values: Tensor) -> tuple[Tensor, Tensor]:
        codes = round_to_grid(values, scale[:, place], bits)
        return codes.to(torch.uint8), (codes - half) * scale[:, place]

    return nearest


def test_feedback_onto_integers_is_gptq() -> None:
    weight, hessian = problem(columns=192, tokens=2000)  # more than one block of 128 columns
    scale = expand_scale(find_scale(weight, LinearSpec(bits=3, group_size=64), torch.float32), 192)
    factor, _ = inverse_factor(hessian, column_order(hessian.diagonal(), "plain", 64), OPTIONS.damp)
    assert factor is not None
    found = round_columns(weight, factor.upper, Loop(integer_nearest(scale, 3)))
    grid = Integers(torch.full((48,), 4.0), lambda start, stop, left: scale[:, start:stop])
    theirs = round_columns(weight, factor.upper, Loop(grid.nearest, grid.enter))
    slow = slow_gptq(weight, scale, damped(hessian, OPTIONS.damp), 3)
    assert float((found != theirs).float().mean()) < 2e-3  # a tie may fall either way in float32
    assert float((found != slow).float().mean()) < 2e-3


def slow_lloyd(row: Tensor, importance: Tensor, table: Tensor) -> Tensor:
    """One row: every weight to its nearest value, every value to the weighted mean of its weights."""
    for _ in range(60):
        nearest = (row[:, None] - table[None]).abs().argmin(1)
        table = table.clone()
        for entry in range(len(table)):
            mine = nearest == entry
            if bool(mine.any()):
                table[entry] = (row[mine] * importance[mine]).sum() / importance[mine].sum()
    return table


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebooks_are_fixed_points_of_k_means(bits: int) -> None:
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(bits))
    importance = torch.rand(300, generator=torch.Generator().manual_seed(1)) + 0.1
    for row, table in zip(weight, fit_codebooks(weight, importance, bits), strict=True):
        settled = slow_lloyd(row.double(), importance.double(), table.double())
        distance = float(((row[:, None] - table.float()[None]).abs().amin(1).square() * importance).sum())
        least = float(((row[:, None] - settled.float()[None]).abs().amin(1).square() * importance).sum())
        assert distance < least * 1.01  # 60 steps come close to where it ends


def test_importance_draws_values_towards_columns_that_matter() -> None:
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(5))
    importance = torch.cat([torch.full((64,), 50.0), torch.ones(192)])
    losses = []
    for weights in (importance, torch.ones(256)):
        table = fit_codebooks(weight, weights, 3).float()
        losses.append(float(((nearest_entries(weight, table)[1] - weight).square() * importance).sum()))
    assert losses[0] < 0.9 * losses[1]


def test_nearest_entries_are_nearest() -> None:
    values = torch.randn(5, 70, generator=torch.Generator().manual_seed(6))
    table = torch.randn(5, 8, generator=torch.Generator().manual_seed(7)).sort(1).values
    codes, found = nearest_entries(values, table)
    assert torch.equal(codes.long(), (values[:, :, None] - table[:, None]).abs().argmin(-1))
    assert torch.equal(found, table.gather(1, codes.long()))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_codebook_feedback_beats_nearest_entries(bits: int) -> None:
    weight, hessian = problem()
    codes = quantized("codebook", weight, hessian, widths("codebook")[bits]).codes
    assert codes.codebook is not None
    nearest = nearest_entries(weight, codes.codebook.float())[1]
    assert proxy_loss(weight, codes.dequantize(), hessian) < 0.9 * proxy_loss(weight, nearest, hessian)
    white = quantized("codebook", weight, torch.eye(128), widths("codebook")[bits]).codes
    assert white.codebook is not None
    assert torch.equal(white.dequantize(), nearest_entries(weight, white.codebook.float())[1])


# zero-points


def robust_loss(codes: Codes, weight: Tensor, size: int) -> Tensor:
    steps = (codes.dequantize() - weight).view(len(weight), -1, size) / codes.scale.float()[..., None]
    return steps.abs().pow(hqq.POWER).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_are_near_the_best_there_are(bits: int) -> None:
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(bits)) ** 3
    spec = LinearSpec(bits=bits, group_size=64, kind="asymmetric")
    found = hqq.zero_codes(weight, spec, torch.float32)
    every = []
    for zero in range(256):
        middle = torch.full_like(found.scale, zero) / (1 << (8 - bits))
        wide = found.scale.repeat_interleave(64, 1)
        codes = (weight / wide + middle.repeat_interleave(64, 1)).round().clamp(0, (1 << bits) - 1).to(torch.uint8)
        every.append(robust_loss(Codes(codes, found.scale, spec, zero=torch.full_like(found.zero, zero)), weight, 64))
    least, ours = torch.stack(every).amin(0), robust_loss(found, weight, 64)
    assert bool((ours >= least * (1 - 1e-4)).all())
    assert float(ours.mean()) < 1.15 * float(least.mean())


def test_zero_points_never_fall_behind_rounding_and_ignore_the_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(8)) ** 3
    spec = LinearSpec(bits=3, group_size=64, kind="asymmetric")
    found = hqq.zero_codes(weight, spec, torch.bfloat16)
    halved = hqq.zero_codes(weight / 4096, spec, torch.bfloat16)
    assert torch.equal(found.codes, halved.codes)
    assert torch.equal(found.dequantize() / 4096, halved.dequantize())
    monkeypatch.setattr(hqq, "STEPS", 0)
    plain = hqq.zero_codes(weight, spec, torch.bfloat16)
    ours, theirs = robust_loss(found, weight, 64), robust_loss(plain, weight, 64)
    assert bool((ours <= theirs).all())
    assert float(ours.mean()) < 0.8 * float(theirs.mean())


# two tiers


def test_the_planted_columns_get_the_fine_grid() -> None:
    weight, _ = problem()
    hessian = torch.eye(128)
    planted = torch.tensor([3, 17, 60, 61, 90, 100, 120, 127])
    hessian[planted, planted] = 50.0
    codes = quantized("twotier", weight, hessian, widths("twotier")[3]).codes
    assert codes.high is not None
    assert codes.high.nonzero().flatten().tolist() == planted.tolist()
    error = (codes.dequantize() - weight).square().mean(0)
    assert float(error[codes.high].mean()) < float(error[~codes.high].mean()) / 4
    assert int(codes.codes[:, ~codes.high].max()) < 8


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_tiers_lie_between_their_widths(bits: int) -> None:
    weight, hessian = problem()
    spread = torch.exp(torch.randn(128, generator=torch.Generator().manual_seed(9)))
    hessian = hessian * spread[:, None] * spread[None]
    low, high = (LinearSpec(bits=width, group_size=64) for width in (bits, bits + 2))
    losses = [
        proxy_loss(weight, quantized(name, weight, hessian, spec).codes.dequantize(), hessian)
        for name, spec in (("gptq", low), ("twotier", widths("twotier")[bits]), ("gptq", high))
    ]
    assert losses[1] < 0.75 * losses[0]
    assert losses[1] > losses[2]


def test_a_share_too_small_for_a_column_is_plain_integers() -> None:
    weight, hessian = problem()
    options = QuantizerOptions(high_share=0.001)
    spec = twotier.formats(3, 128, group_size=64, options=options)
    assert spec is not None
    codes = quantized("twotier", weight, hessian, spec, options).codes
    assert codes.high is None
    assert float((codes.dequantize() - weight).square().mean()) < 0.2


def test_a_singular_hessian_is_put_on_record() -> None:
    weight, _ = problem()
    off_diagonal = torch.ones(128, 128) * 50 + torch.eye(128) * (1 - 50)
    for plugin in ("codebook", "twotier"):
        found = quantized(plugin, weight, off_diagonal, widths(plugin)[3])
        assert "singular" in found.fallbacks[0]
    assert codebook.NEEDS_HESSIAN
