"""What a linear is aimed at once the model before it is quantized, and the descent that comes after."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from conftest import llama_config, save_model
from torch import Tensor

from llmcompress.compress.descent import descend, metric_of
from llmcompress.compress.feedback import Factor, damped, drift_factor, inverse_factor
from llmcompress.compress.grid import Codes, find_scale, proxy_loss, round_weight
from llmcompress.compress.measuring import MeasureJob, Text
from llmcompress.compress.pipeline import open_model
from llmcompress.compress.quantizers import gptq
from llmcompress.compress.rounding import Request, Seen
from llmcompress.compress.targets import Targets, aim, alpha_for
from llmcompress.compress.trial import measure_allocations
from llmcompress.hub.source import Source
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.trace import trace
from llmcompress.recipes import load_recipe
from llmcompress.types import Assigned, BitAllocation, LinearSpec, QuantizerOptions, StreamWriter

DAMP = 1e-9


def streams(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a linear in two models, a few hundred tokens, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randn(600, 24, generator=generator, dtype=torch.float64)
    mixing = torch.eye(24, dtype=torch.float64) + 0.1 * torch.randn(24, 24, generator=generator, dtype=torch.float64)
    stored = full @ mixing + 0.2 * torch.randn(600, 24, generator=generator, dtype=torch.float64)
    return full, stored, torch.randn(10, 24, generator=generator, dtype=torch.float64)


def seen_of(full: Tensor, stored: Tensor) -> Seen:
    count = len(stored)
    return Seen(stored.T @ stored / count, count, (full - stored).T @ stored / count)


def test_the_target_is_the_least_squares_solution() -> None:
    full, stored, weight = streams()
    found = Targets(seen_of(full, stored), DAMP, 1.0).of(weight.float()).double()
    oracle = torch.linalg.lstsq(stored, full @ weight.T).solution.T
    assert torch.allclose(found, oracle, rtol=1e-5, atol=1e-5)


def test_errors_beyond_the_target_add_up() -> None:
    """`|x' W^T - x Q^T|^2 = |x (Q - W*)^T|^2 + constant` for any Q."""
    full, stored, weight = streams()
    target = Targets(seen_of(full, stored), DAMP, 1.0).of(weight.float()).double()
    rests = []
    for seed in range(3):
        guess = weight + 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).double()
        whole = (full @ weight.T - stored @ guess.T).square().sum()
        rests.append(float(whole - (stored @ (guess - target).T).square().sum()))
    assert max(rests) - min(rests) < 1e-3 * abs(rests[0])


def test_the_residual_term_also_undoes_what_the_stream_carries() -> None:
    full, stored, weight = streams()
    generator = torch.Generator().manual_seed(9)
    stream_full = torch.randn(600, 10, generator=generator, dtype=torch.float64)
    stream = stream_full + 0.3 * stored[:, :10] + 0.1 * torch.randn(600, 10, generator=generator, dtype=torch.float64)
    residual = (stream_full - stream).T @ stored / len(stored)
    found = Targets(seen_of(full, stored), DAMP, 1.0).of(weight.float(), residual.float()).double()
    oracle = torch.linalg.lstsq(stored, stream_full - stream + full @ weight.T).solution.T
    assert torch.allclose(found, oracle, rtol=1e-5, atol=1e-5)

    def harm(candidate: Tensor) -> float:
        return float((stream_full + full @ weight.T - stream - stored @ candidate.T).square().sum())

    assert harm(found) < harm(Targets(seen_of(full, stored), DAMP, 1.0).of(weight.float()).double()) < harm(weight)


def test_more_rows_than_columns_are_corrected_by_one_solution() -> None:
    full, stored, _ = streams()
    seen = seen_of(full.float(), stored.float())
    weights = [torch.randn(rows, 24, generator=torch.Generator().manual_seed(rows)) for rows in (20, 9)]
    term = torch.randn(9, 24, generator=torch.Generator().manual_seed(2))
    one_by_one = Targets(seen, 0.01, 0.5)
    for terms in ([None, None], [None, term]):
        found, left = aim(QuantizerOptions(alpha=0.5), seen, weights, terms)
        assert left.drift is None
        for corrected, weight, own in zip(found, weights, terms, strict=True):
            assert torch.allclose(corrected, one_by_one.of(weight, own), rtol=1e-5, atol=1e-6)
    broken = Seen(seen.hessian, 600, torch.full((24, 24), float("inf")))
    assert all(map(torch.equal, aim(QuantizerOptions(), broken, weights, [None, None])[0], weights))


def test_nothing_is_corrected_without_a_difference_or_with_alpha_zero() -> None:
    full, stored, weight = streams()
    plain = weight.float()
    assert Targets(seen_of(full, stored), DAMP, 0.0).of(plain) is plain
    assert Targets(Seen(stored.T @ stored), DAMP, 1.0).of(plain) is plain
    assert torch.allclose(Targets(seen_of(stored, stored), DAMP, 1.0).of(plain), plain)
    broken = Seen(torch.full((24, 24), float("nan")), 600, torch.zeros(24, 24))
    assert Targets(broken, DAMP, 1.0).of(plain) is plain


def test_alpha_grows_with_the_tokens_there_are() -> None:
    assert [alpha_for(tokens, 100) for tokens in (100, 799, 800, 2999, 3000)] == [0.25, 0.25, 0.5, 0.5, 0.75]


def test_gptaq_moves_only_later_columns_and_its_correction_is_the_papers() -> None:
    """`P` row by row: what the drift of column j asks of the columns after it, given those before are done."""
    full, stored, _ = streams()
    seen = seen_of(full, stored)
    factor, _ = inverse_factor(seen.hessian, torch.arange(24), 0.01)
    assert factor is not None
    assert seen.drift is not None
    extra = drift_factor(seen.drift, factor, 1.0)
    assert float(torch.tril(extra).abs().max()) < 1e-6
    metric = damped(seen.hessian, 0.01)
    for column in (0, 7, 22):
        rest = slice(column + 1, None)
        oracle = torch.linalg.solve(metric[rest, rest], seen.drift[column, rest])
        assert torch.allclose(extra[column, rest].double(), oracle, rtol=1e-3, atol=1e-4)
    assert torch.count_nonzero(drift_factor(seen.drift, Factor(factor.order, factor.upper), 0.0)) == 0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_descent_never_raises_the_loss_and_ends_where_nothing_helps(bits: int) -> None:
    _, stored, weight = streams()
    hessian, weight = (stored.T @ stored / len(stored)).float(), weight.float()
    spec = LinearSpec(bits=bits, group_size=8)
    codes = round_weight(weight, find_scale(weight, spec, torch.float32), spec)
    metric = damped(hessian, 0.01).float()
    losses = [proxy_loss(weight, codes.dequantize(), metric)]
    for sweeps in (1, 2, 50):
        found = descend(weight, codes, metric_of(hessian, 0.01), sweeps)
        losses.append(proxy_loss(weight, found.dequantize(), metric))
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.95 * losses[0]
    for row, column in ((0, 0), (3, 17), (9, 23)):  # no single code is better one up or down
        for step in (-1, 1):
            moved = found.codes.clone().int()
            moved[row, column] += step
            if 0 <= int(moved[row, column]) < 2**bits:
                other = Codes(moved.to(torch.uint8), found.scale, spec)
                assert proxy_loss(weight, other.dequantize(), metric) > losses[-1] * (1 - 1e-5)


SMALL = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[Any, tuple[StreamWriter, ...]]] = {
    "llama": (
        llama_config(),
        (
            StreamWriter(linear="self_attn.o_proj"),
            StreamWriter(linear="mlp.down_proj", norm="post_attention_layernorm"),
        ),
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        (StreamWriter(linear="attn.c_proj"), StreamWriter(linear="mlp.c_proj", norm="ln_2")),
    ),
    "neox, attention and MLP side by side": (
        transformers.GPTNeoXConfig(**SMALL, intermediate_size=128, use_parallel_residual=True),
        (
            StreamWriter(linear="attention.dense"),
            StreamWriter(linear="mlp.dense_4h_to_h", after=("attention.dense",)),
        ),
    ),
    "gemma2, norms in between": (
        transformers.Gemma2Config(**SMALL, num_key_value_heads=4, head_dim=16, intermediate_size=128),
        (),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_writers_of_a_block_are_found_by_watching(family: str, tmp_path: Path) -> None:
    config, writers = FAMILIES[family]
    for block in trace(Skeleton.open(save_model(tmp_path / "model", config))).blocks:
        assert block.writers == writers


def measured(model: Path, target: Literal["layer", "gptaq", "asymmetric", "residual"], alpha: float | None) -> Tensor:
    opened = open_model(Source(model, "model"), load_recipe("balanced", ("plan.group_size=32",)), "cpu")
    names = [linear.name for linear in opened.trace.linears]
    assigned = tuple(Assigned(linear=n, spec=LinearSpec(bits=3, group_size=32)) for n in names)
    nothing = {"budget": "", "budget_bits": 1, "storage_bits": 1, "bits_per_weight": 1.0, "file_bytes": 1}
    rest = {"file_bits_per_weight": 1.0, "expected_damage": 0.0, "lower_bound": 0.0, "status": "optimal"}
    some = BitAllocation.model_validate({"assigned": assigned, "kept": (), "fallbacks": (), **nothing, **rest})
    options = QuantizerOptions(target=target, alpha=alpha)
    job = MeasureJob(opened.skeleton, opened.trace, gptq, options, torch.bfloat16)
    tokens = torch.randint(96, (48, 32), generator=torch.Generator().manual_seed(0))
    return measure_allocations(job, [some], Text([tokens[:32]], [tokens[32:]])).kld


def test_alpha_zero_is_the_layers_own_target(llama: Path) -> None:
    plain = measured(llama, "layer", None)
    assert torch.equal(measured(llama, "residual", 0.0), plain)
    assert not torch.equal(measured(llama, "residual", 0.5), plain)


def test_quantizing_towards_the_full_precision_model_costs_less(llama: Path) -> None:
    layer, asymmetric, residual = (float(measured(llama, t, 0.75).mean()) for t in ("layer", "asymmetric", "residual"))
    assert residual < layer
    assert asymmetric < layer


def test_a_pull_passes_on_only_part_of_what_was_compensated() -> None:
    """FOEM against the plain loop: the error of a column counts from between where it is and where it began."""
    _, stored, weight = streams()
    spec, left = LinearSpec(bits=2, group_size=8), weight.float().clone()
    seen, options = Seen((stored.T @ stored / len(stored)).float()), QuantizerOptions(pull=0.3, order="plain")
    (found,) = gptq.quantize([Request(weight.float(), spec)], seen, options=options, dtype=torch.float32)
    factor, _ = inverse_factor(seen.hessian, torch.arange(24), options.damp)
    assert factor is not None
    for column in range(24):
        step = found.codes.scale[:, column // 8]
        code = torch.clamp(torch.round(left[:, column] / step) + 2, 0, 3)
        assert torch.equal(code, found.codes.codes[:, column].float())
        error = left[:, column] - (code - 2) * step - 0.3 * (left[:, column] - weight[:, column].float())
        left[:, column + 1 :] -= torch.outer(error / factor.upper[column, column], factor.upper[column, column + 1 :])
