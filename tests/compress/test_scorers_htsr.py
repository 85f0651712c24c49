"""Tails of spectra: exact power laws, invariances, pure noise, and what the score makes of them."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_help import job_for, scored

from llmcompress.compress.scorers.htsr import (
    Tail,
    above_cut,
    eigenvalues_of,
    erg_start,
    find_tail,
    fit_from,
    histogram_peak,
    importance_of,
    pruning_ratios,
    spectrum_of,
    tail_alpha,
)

TAILS = ["ks", "mid", "peak"]


def pareto(alpha: float, count: int, start: float = 1.0) -> torch.Tensor:
    """Exact quantiles of a power law."""
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return start * (1 - shares) ** (-1 / (alpha - 1))


def distance(tail: Tail) -> float:
    return tail.distance


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A weight whose spectrum has a tail."""
    scales = torch.linspace(1, 60, rows, dtype=torch.float64) ** -1.5
    return scales[:, None] * random_weight(rows, columns, seed)


@pytest.mark.parametrize("tail", TAILS)
def test_pareto_quantiles_give_their_exponent(tail: str) -> None:
    found = find_tail(pareto(3.0, 2000), tail=tail)
    assert found.alpha == pytest.approx(3.0, abs=0.01)
    assert found.distance < 2e-3
    assert tail_alpha(pareto(3.0, 2000), 1.0) == pytest.approx(3.0004, abs=1e-4)


def test_the_tail_begins_where_the_power_law_does() -> None:
    """A bulk of other values below the tail is left out by KS, and `mid` is the median."""
    bulk = torch.linspace(0.05, 4.9, 500, dtype=torch.float64)
    spectrum = torch.cat([bulk, pareto(2.5, 500, start=5.0)])
    found = find_tail(spectrum)
    assert found.start == pytest.approx(5.0, rel=0.05)
    assert found.alpha == pytest.approx(2.5, abs=0.03)
    assert find_tail(spectrum, tail="mid").start == float(spectrum[500])


def test_ks_is_the_least_distance_of_all_beginnings() -> None:
    """Against a plain loop over beginnings with the distance written out in Python numbers."""
    spectrum = above_cut(eigenvalues_of(heavy(40, 60)))
    values = spectrum.tolist()
    best = (math.inf, 0.0, 0.0)
    for place in range(len(values) - 1):
        tail = values[place:]
        alpha = 1 + len(tail) / sum(math.log(value / tail[0]) for value in tail)
        gaps = [abs(1 - (value / tail[0]) ** (1 - alpha) - i / len(tail)) for i, value in enumerate(tail)]
        best = min(best, (max(gaps), alpha, tail[0]))
    found = find_tail(spectrum)
    assert (found.distance, found.alpha, found.start) == pytest.approx(best)


def test_peak_looks_around_the_fullest_bin() -> None:
    """Better fits lie below; the released code, which takes a logarithm for the lower bound, would take one."""
    below = pareto(1.5, 2000)
    crowd, above = (torch.linspace(*ends, dtype=torch.float64) for ends in ((99.9, 100.1, 80), (101, 200, 40)))
    spectrum = torch.cat([below[below < 90], crowd, above])
    peak = histogram_peak(spectrum)
    assert peak == pytest.approx(100, rel=0.06)
    starts = list(enumerate(spectrum.tolist()))[:-1]
    lax = min((fit_from(spectrum, i) for i, x in starts if math.log10(0.95 * peak) <= x <= 1.5 * peak), key=distance)
    strict = min((fit_from(spectrum, i) for i, x in starts if 0.95 * peak <= x <= 1.5 * peak), key=distance)
    assert find_tail(spectrum, tail="peak") == strict
    assert lax.start < 90
    assert lax.distance < strict.distance


@given(st.floats(1e-4, 1e4), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_scale_does_not_matter(scale: float, seed: int) -> None:
    weight = heavy(24, 40, seed)
    one, other = spectrum_of(eigenvalues_of(weight)), spectrum_of(eigenvalues_of(scale * weight))
    assert one is not None
    assert other is not None
    assert other.alpha == pytest.approx(one.alpha, rel=1e-6)
    assert other.erg_gap == pytest.approx(one.erg_gap, rel=1e-6, abs=1e-9)
    shift = one.alpha * 2 * math.log10(scale)
    assert other.alpha_hat == pytest.approx(one.alpha_hat + shift, rel=1e-6, abs=1e-6)


@given(st.integers(0, 5))
@settings(max_examples=5, deadline=None)
def test_rotations_do_not_matter(seed: int) -> None:
    weight = heavy(24, 40, seed)
    left, right = (torch.linalg.qr(random_weight(n, n, seed + 9)).Q for n in (24, 40))
    turned = eigenvalues_of(left @ weight @ right)
    assert torch.allclose(turned, eigenvalues_of(weight), rtol=1e-6)
    assert find_tail(turned).alpha == pytest.approx(find_tail(eigenvalues_of(weight)).alpha, rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_eigenvalues_are_squared_singular_values(shape: tuple[int, int]) -> None:
    weight = random_weight(*shape)
    assert torch.allclose(eigenvalues_of(weight).flip(0), torch.linalg.svdvals(weight).square())


def test_noise_has_no_tail() -> None:
    """A Gaussian square matrix: a Marchenko-Pastur bulk, large alpha, bad fit; a heavy one is told apart."""
    noise = find_tail(above_cut(eigenvalues_of(random_weight(500, 500))))
    assert noise.alpha > 4
    assert noise.distance > 0.1
    tailed = find_tail(above_cut(eigenvalues_of(heavy(500, 500))))
    assert tailed.alpha < 3
    assert tailed.distance < 0.05


@given(st.lists(st.floats(0.01, 100.0), min_size=2, max_size=40))
def test_erg_is_the_longest_top_segment(values: list[float]) -> None:
    spectrum = torch.tensor(sorted(values), dtype=torch.float64)
    scaled = sorted((value * len(values) / sum(values) for value in values), reverse=True)
    lengths = [k for k in range(1, len(scaled) + 1) if sum(map(math.log, scaled[:k])) >= -1e-12]
    sure = [k for k in lengths if sum(map(math.log, scaled[:k])) >= 1e-12] or lengths[:1]
    assert erg_start(spectrum) in [pytest.approx(scaled[k - 1]) for k in (max(sure), max(lengths))]


def test_erg_of_a_known_spectrum() -> None:
    """Mean 1 already: 4 * .5 * .5 is 1 and still counted, the next .1 is not."""
    rest = [4.0, 0.5, 0.5, 0.1, 0.1, 0.8]
    spectrum = torch.tensor(sorted([*rest, 8 - sum(rest) - 0.4, 0.4]), dtype=torch.float64)
    assert spectrum.mean().item() == pytest.approx(1)
    products = torch.cumprod(spectrum.flip(0), 0)
    assert erg_start(spectrum) == float(spectrum.flip(0)[int((products >= 1).sum()) - 1])
    assert erg_start(torch.tensor([0.0, 0.0, 2.0])) == pytest.approx(3.0)


def test_erg_gap_is_start_less_erg() -> None:
    values = eigenvalues_of(heavy(40, 60))
    found = spectrum_of(values)
    assert found is not None
    start = find_tail(above_cut(values)).start / values.mean().item()
    assert found.erg_gap == pytest.approx(start - erg_start(values))


def test_what_cannot_be_fitted_is_none() -> None:
    assert spectrum_of(pareto(3.0, 9)) is None
    assert spectrum_of(pareto(3.0, 10)) is not None
    assert spectrum_of(torch.ones(50, dtype=torch.float64)) is None
    nearly = torch.cat([torch.full((41,), 1e-9, dtype=torch.float64), pareto(3.0, 9)])
    assert spectrum_of(nearly) is None  # the rest are below the cut


@given(
    st.lists(st.tuples(st.floats(1, 8), st.integers(1, 10**6)), min_size=1, max_size=20),
    st.floats(0.05, 0.7),
    st.floats(0.2, 0.5),
)
def test_pruning_ratios(blocks: list[tuple[float, int]], target: float, spread: float) -> None:
    alphas, weights = [alpha for alpha, _ in blocks], [count for _, count in blocks]
    ratios = pruning_ratios(alphas, weights, target=target, spread=spread)
    removed = sum(n * ratio for n, ratio in zip(weights, ratios, strict=True))
    assert removed == pytest.approx(target * sum(weights))
    order = sorted(range(len(alphas)), key=lambda i: alphas[i])
    assert all(ratios[a] <= ratios[b] + 1e-12 for a, b in itertools.pairwise(order))
    if max(alphas) > min(alphas):
        assert max(ratios) / min(ratios) == pytest.approx((1 + spread) / (1 - spread))
    else:
        assert ratios == pytest.approx([target] * len(ratios))


def test_pruning_ratios_of_known_alphas() -> None:
    assert pruning_ratios([2.0, 4.0, 6.0], [1, 1, 1], target=0.5) == pytest.approx([0.35, 0.5, 0.65])
    assert pruning_ratios([2.0, 6.0], [3, 1], target=0.34) == pytest.approx([0.28, 0.52])


def test_importance_map() -> None:
    """One unit of alpha is a quarter of a bit, as damage falls by 4 per bit; beyond 8 nothing changes."""
    assert importance_of(2.0) / importance_of(6.0) == pytest.approx(4.0)
    assert importance_of(0.0) == 1.0
    assert importance_of(8.0) == importance_of(1e9) > 0
    assert importance_of(-8.0) == importance_of(-1e9)


@pytest.mark.parametrize("metric", ["alpha", "alpha_hat", "erg"])
@pytest.mark.parametrize("tail", TAILS)
def test_score_follows_the_metric(metric: str, tail: str, llama: Path) -> None:
    job = job_for(llama)
    measured = scored(llama, "htsr", htsr={"metric": metric, "tail": tail})
    expected, names = {}, ("alpha", "alpha_hat", "erg_gap")
    for info in job.trace.blocks:
        job.skeleton.load_block(info.index)
        for linear in info.linears:
            found = spectrum_of(
                eigenvalues_of(job.skeleton.model.get_submodule(linear.name).weight.detach()), tail=tail
            )
            assert found is not None
            expected[linear.name] = {name: getattr(found, name) for name in names}
    for layer in measured.layers:
        values = expected[layer.linear]
        value = abs(values["erg_gap"]) if metric == "erg" else values[metric]
        assert layer.importance == pytest.approx(importance_of(value))
    for series, name in zip(measured.series, names, strict=True):
        assert series.name == name.replace("_", " ")
        means = [sum(expected[x.name][name] for x in b.linears) / len(b.linears) for b in job.trace.blocks]
        assert series.values == pytest.approx(means)


def test_pooling_over_a_block(llama: Path) -> None:
    job, pooled = job_for(llama), scored(llama, "htsr", htsr={"pool": "block"})
    importance = {layer.linear: layer.importance for layer in pooled.layers}
    alphas = next(series.values for series in pooled.series if series.name == "alpha")
    for info in job.trace.blocks:
        for linear in info.linears:
            assert importance[linear.name] == pytest.approx(importance_of(alphas[info.index]))


def test_a_linear_without_a_spectrum_gets_the_median(tmp_path: Path) -> None:
    """Grouped heads so narrow that k and v have 8 rows."""
    config = llama_config(num_attention_heads=8, num_key_value_heads=1)
    folder = save_model(tmp_path / "narrow", config)
    layers = scored(folder, "htsr").layers
    narrow = {layer.importance for layer in layers if "k_proj" in layer.linear or "v_proj" in layer.linear}
    others = sorted(x.importance or 0 for x in layers if "k_proj" not in x.linear and "v_proj" not in x.linear)
    assert len(others) == 15
    assert narrow == {others[7]}
