"""Excess kurtosis on distributions with a known one, and on the inputs a whole model really has."""

from pathlib import Path

import pytest
import torch
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scoring_help import job_for, scored

from llmcompress.compress.scorers.kurtosis import PIECE, excess_kurtosis, outlier_sum, textbook_kurtosis

DRAWS = 2_000_000


def slow(x: torch.Tensor) -> torch.Tensor:
    """The released formula, word by word, in float64."""
    x = x.double()
    return (x**4).mean(-1) / x.std(-1) ** 4 - 3


@pytest.mark.parametrize("channels", [2, 5, 64, 4096])
@pytest.mark.parametrize("size", [1e-12, 0.3, -1.0, 1e15])
def test_one_hot_is_exact(channels: int, size: float) -> None:
    x = torch.zeros(1, channels)
    x[0, channels // 2] = size
    assert excess_kurtosis(x).item() == pytest.approx(channels - 3, rel=1e-5, abs=1e-5)
    textbook = (channels**2 - 3 * channels + 3) / (channels - 1) - 3
    assert textbook_kurtosis(x.double() / size).item() == pytest.approx(textbook, rel=1e-9, abs=1e-9)


def test_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(DRAWS, generator=generator)
    uniform = torch.rand(DRAWS, generator=generator) * 2 - 1
    laplace = torch.empty(DRAWS).exponential_(generator=generator) * torch.randn(DRAWS, generator=generator).sign()
    for measure in (excess_kurtosis, textbook_kurtosis):
        assert measure(normal).item() == pytest.approx(0.0, abs=0.02)
        assert measure(uniform).item() == pytest.approx(-1.2, abs=0.01)
        assert measure(laplace).item() == pytest.approx(3.0, abs=0.1)
    assert outlier_sum(uniform[None]).item() == 0.0  # below 0 counts as 0
    assert textbook_kurtosis(laplace[:999].double()).item() == pytest.approx(stats.kurtosis(laplace[:999].double()))


def test_the_numerator_is_not_centred() -> None:
    """What sets the released formula apart: a constant added to every channel raises it."""
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    assert excess_kurtosis(x + 3).item() > excess_kurtosis(x).item() + 50
    assert textbook_kurtosis(x + 3).item() == pytest.approx(textbook_kurtosis(x).item(), abs=1e-3)


@given(st.integers(8, 70), st.integers(0, 1000), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_equals_the_slow_formula_at_any_scale(channels: int, seed: int, scale: float) -> None:
    x = torch.randn(3, channels, generator=torch.Generator().manual_seed(seed)) ** 3 + 0.1
    expected = slow(x)
    assert torch.allclose(excess_kurtosis(scale * x).double(), expected, rtol=1e-3, atol=1e-3)
    assert bool((excess_kurtosis(x) >= -3).all())


def test_equal_channels_count_nothing() -> None:
    assert excess_kurtosis(torch.tensor([[0.0] * 64, [3.3] * 64, [-1e-9] * 64])).tolist() == [0.0, 0.0, 0.0]


def test_rows_are_summed_whatever_the_pieces() -> None:
    rows = torch.randn(PIECE // 4096 + 3, 4096, generator=torch.Generator().manual_seed(2)) ** 3
    expected = slow(rows).clamp_min(0).sum().item()
    assert outlier_sum(rows).item() == pytest.approx(expected, rel=1e-4)
    assert outlier_sum(rows.to(torch.bfloat16)).item() == pytest.approx(expected, rel=2e-2)


def test_inputs_are_those_of_the_whole_model(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    job, measured = job_for(llama), scored(llama, "kurtosis")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}
    names = [linear.name for linear in job.trace.linears] + [info.name for info in job.trace.blocks]
    for name in names:

        def before(_: torch.nn.Module, args: tuple[torch.Tensor, ...], name: str = name) -> None:
            seen[name] = args[0]

        model.get_submodule(name).register_forward_pre_hook(before)
    with torch.no_grad():
        model(job.batches.tokens)
    expected = {name: slow(seen[name]).clamp_min(0).mean().item() for name in names}
    for layer in measured.layers:
        assert layer.importance == pytest.approx(3 + expected[layer.linear], rel=1e-4)
    (series,) = measured.series
    assert series.name == "kurtosis hidden"
    assert series.values == pytest.approx([expected[info.name] for info in job.trace.blocks], rel=1e-4)


def test_weights_are_an_option(tmp_path: Path) -> None:
    """One outlier channel in every row of one linear is found there and nowhere else."""
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", llama_config(), shard_size="100MB")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][:, 7] = 1000.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    measured = scored(folder, "kurtosis", kurtosis={"of": "weights"})
    importance = {layer.linear: layer.importance or 0.0 for layer in measured.layers}
    assert importance.pop(name) == pytest.approx(64, abs=0.1)
    assert all(3 <= value < 5 for value in importance.values())
    assert measured.series[0].values == scored(folder, "kurtosis").series[0].values
