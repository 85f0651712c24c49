"""LIM, ZD and block influence on inputs with a known answer, and against the whole model."""

import math
from pathlib import Path

import pytest
import torch
import transformers
from conftest import save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_help import job_for, scored
from torch import Tensor

from llmcompress.compress.observe import weight_of
from llmcompress.compress.scorers import zd
from llmcompress.compress.scorers.block_influence import influence
from llmcompress.compress.scorers.lim import modification
from llmcompress.compress.scorers.zd import mean_and_deviation, z_share


def block_states(folder: Path, batches: list[Tensor]) -> list[list[Tensor]]:
    """Per batch the hidden states entering block 0 and leaving each block, by hooks on the whole model.

    `output_hidden_states` would not do: its last entry is after the final norm.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    blocks = next(m for m in lists if len(m) == model.config.num_hidden_layers)
    seen: list[Tensor] = []
    blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        for tokens in batches:
            model(input_ids=tokens, use_cache=False)
    size = len(blocks) + 1
    return [seen[start : start + size] for start in range(0, len(seen), size)]


@pytest.mark.parametrize("mode", ["token", "flat"])
def test_lim_of_known_blocks(mode: str) -> None:
    hidden = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))
    assert modification(hidden, hidden, mode=mode).tolist() == pytest.approx([-1.0] * 3)
    assert modification(hidden, -hidden, mode=mode).tolist() == pytest.approx([1.0] * 3)
    turned = torch.stack([-hidden[..., 1::2], hidden[..., ::2]], -1).flatten(-2)  # a quarter turn of every pair
    assert modification(hidden, hidden + turned, mode=mode).tolist() == pytest.approx([-1 / math.sqrt(2)] * 3)
    assert torch.allclose(modification(hidden, hidden + turned), modification(7 * hidden, 7 * (hidden + turned)))


@pytest.mark.parametrize("mode", ["token", "flat"])
def test_lim_does_not_change_under_scaling_and_rotation(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    before, after = torch.randn(2, 3, 12, 16, generator=generator).unbind()
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    expected = modification(before, after, mode=mode)
    assert torch.allclose(modification(before * 1e-3, after * 1e-3, mode=mode), expected, atol=1e-6)
    assert torch.allclose(modification(before @ rotation, after @ rotation, mode=mode), expected, atol=1e-6)


def test_lim_skips_the_first_token_when_asked() -> None:
    before = torch.ones(1, 4, 8)
    after = before.clone()
    after[:, 0] = -100
    assert modification(before, after, skip_first=True).item() == pytest.approx(-1.0)
    assert modification(before, after, skip_first=False).item() == pytest.approx(-0.5)
    assert modification(before, after, mode="flat", skip_first=False).item() == pytest.approx(
        776 / math.sqrt(32 * 80_024)
    )


@pytest.mark.parametrize("mode", ["token", "flat"])
def test_lim_in_float32_equals_cosines_in_float64(mode: str) -> None:
    generator = torch.Generator().manual_seed(2)
    before = torch.randn(4, 200, 300, generator=generator)
    before[:, 3, 5] = 1e4  # a massive activation
    after = before + 0.1 * torch.randn(4, 200, 300, generator=generator)
    flat = (1, 2) if mode == "flat" else (2, 2)
    wide = [hidden[:, 1:].double().flatten(*flat) for hidden in (before, after)]
    expected = torch.cosine_similarity(*wide, dim=-1)
    expected = expected if mode == "flat" else expected.mean(-1)
    assert torch.allclose(1 + modification(before, after, mode=mode), 1 - expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("mode", ["token", "flat"])
def test_streamed_lim_equals_the_whole_model(mode: str, llama: Path) -> None:
    job = job_for(llama)
    states = block_states(llama, job.batches.split(job.batch_size))
    for index, found in enumerate(scored(llama, "lim", lim={"mode": mode}).series[0].values):
        values = torch.cat([modification(batch[index], batch[index + 1], mode=mode) for batch in states])
        assert found == pytest.approx(float(values.mean()), rel=1e-9)


def test_zd_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2_000_000, generator=generator) * 3 + 5
    uniform = torch.rand(2_000_000, generator=generator) * 4 - 1
    assert z_share([normal]) == pytest.approx(0.15866, abs=1e-3)
    assert z_share([normal], two_sided=True) == pytest.approx(0.31731, abs=1e-3)
    assert z_share([uniform]) == pytest.approx((1 - 1 / math.sqrt(3)) / 2, abs=1e-3)
    spikes = torch.cat([torch.zeros(900), torch.full((100,), 4.0)])
    assert z_share([spikes[:500], spikes[500:]]) == pytest.approx(0.1)
    assert z_share([torch.full((8, 8), 0.25)]) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    centre=st.sampled_from([0.0, -3.0, 1e4]),
    two_sided=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_zd_in_parts_equals_the_pool(shapes: list[tuple[int, int]], centre: float, two_sided: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(*shape, generator=generator) + centre for shape in shapes]
    pool = torch.cat([weight.flatten() for weight in weights]).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zd, "PART_WEIGHTS", 7)  # parts of a row or two
        mean, deviation = mean_and_deviation(weights)
        share = z_share(weights, two_sided=two_sided)
        assert z_share([weight.T for weight in weights], two_sided=two_sided) == pytest.approx(share)
    assert mean == pytest.approx(float(pool.mean()), rel=1e-12, abs=1e-12)
    assert deviation == pytest.approx(float(pool.std(correction=0)), rel=1e-9, abs=1e-12)
    if len(pool) > 2:  # of two values both are one deviation away, give or take the last bit
        z = (pool - pool.mean()) / pool.std(correction=0)
        assert share == float(((z.abs() if two_sided else z) > 1).double().mean())


def test_zd_never_holds_a_block_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    genuine = zd._parts

    def watched(weights: list[Tensor]):  # type: ignore[no-untyped-def]
        for part in genuine(weights):
            seen.append(part.numel())
            yield part

    monkeypatch.setattr(zd, "_parts", watched)
    weights = [torch.randn(1000, 700).T, torch.randn(3, 1000).T]  # as the library does not take them
    z_share(weights)
    assert sum(seen) == 2 * 703_000
    assert max(seen) <= zd.PART_WEIGHTS


def test_zd_of_every_block_is_that_of_its_weights(tmp_path: Path) -> None:
    """GPT-2 keeps its linears the other way round."""
    folder = save_model(
        tmp_path / "gpt2", transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    )
    job = job_for(folder)
    for info, share in zip(job.trace.blocks, scored(folder, "zd").series[0].values, strict=True):
        block = job.skeleton.load_block(info.index)
        pool = torch.cat([weight_of(block, info, linear).flatten() for linear in info.linears]).double()
        assert share == float((pool - pool.mean() > pool.std(correction=0)).double().mean())


def test_zd_sides_are_an_option(llama: Path) -> None:
    one, two = scored(llama, "zd"), scored(llama, "zd", zd={"sides": "two"})
    assert one.layers[0].importance != two.layers[0].importance


def test_influence_of_known_blocks() -> None:
    hidden = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))
    turned = torch.stack([-hidden[..., 1::2], hidden[..., ::2]], -1).flatten(-2)
    expected = {"cosine": (0.0, 2.0, 1.0), "angular": (0.0, 1.0, 0.5)}
    for distance, (same, opposite, orthogonal) in expected.items():
        assert bool((influence(hidden, hidden, distance=distance) == same).all())
        assert influence(hidden, -hidden, distance=distance).flatten().tolist() == pytest.approx([opposite] * 30)
        assert influence(hidden, turned, distance=distance).flatten().tolist() == pytest.approx([orthogonal] * 30)


@pytest.mark.parametrize("spread", [1.0, 1e-3])
def test_influence_equals_its_formula(spread: float) -> None:
    generator = torch.Generator().manual_seed(3)
    before = torch.randn(4, 30, 20, generator=generator)
    after = before + spread * torch.randn(4, 30, 20, generator=generator)
    cosine = torch.cosine_similarity(before.double(), after.double(), dim=-1)
    for distance, expected in (("cosine", 1 - cosine), ("angular", torch.arccos(cosine) / math.pi)):
        found = influence(before, after, distance=distance)
        assert torch.allclose(found, expected, rtol=1e-3 * min(1.0, 1e-3 / spread), atol=1e-7)
        assert torch.equal(influence(after, before, distance=distance), found)
        assert float(found.min()) >= 0
        assert distance == "cosine" or float(found.max()) <= 1
        assert torch.allclose(influence(3 * before, 0.5 * after, distance=distance), found, atol=1e-6)


def test_streamed_influence_equals_the_whole_model(llama: Path) -> None:
    job = job_for(llama)
    states = block_states(llama, job.batches.split(job.batch_size))
    for distance in ("cosine", "angular"):
        for tokens, part in (("all", slice(None)), ("last", slice(-1, None))):
            options = {"distance": distance, "tokens": tokens}
            found = scored(llama, "block_influence", block_influence=options)
            for index, value in enumerate(found.series[0].values):
                pairs = [(batch[index][:, part], batch[index + 1][:, part]) for batch in states]
                each = torch.cat([influence(*pair, distance=distance).flatten() for pair in pairs])
                assert value == pytest.approx(float(each.mean()), rel=1e-9)
            importance = {layer.linear: layer.importance for layer in found.layers}
            assert [importance[info.linears[0].name] for info in job.trace.blocks] == list(found.series[0].values)


def test_influence_is_one_plus_lim(llama: Path) -> None:
    lim = scored(llama, "lim", lim={"skip_first": False}).series[0].values
    influences = scored(llama, "block_influence").series[0].values
    assert influences == pytest.approx([1 + value for value in lim], abs=1e-6)
