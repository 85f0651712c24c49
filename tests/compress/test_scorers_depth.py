"""Use of depth: contributions and skip effects against whole models with hooks, and closed forms."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_help import job_for, scored

from llmcompress.compress.scorers.depth import (
    FIGURES,
    Middle,
    SkipChains,
    contribution_figures,
    current_span,
    find_places,
    future_spans,
    output_effects,
    skip_effects,
)
from llmcompress.compress.scoring import Measured

Tensor = torch.Tensor
TOKENS = torch.randint(1, 96, (5, 24), generator=torch.Generator().manual_seed(0))
SEEN = TOKENS[:3, :16]
SMALL = {"samples": 3, "tokens": 16}
BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
GROUPED = BASE | {"num_key_value_heads": 2}
OPT = {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"ffn_dim": 128, "word_embed_proj_dim": 64}
GEMMA = GROUPED | {"head_dim": 16, "sliding_window": 8}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
FALCON = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
BLOOM = {"vocab_size": 96, "hidden_size": 64, "n_layer": 3, "n_head": 4}
# config, then the modules inside a block that return what is added by attention and by the MLP, then whether parallel
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str, bool]] = {
    "llama": ("LlamaConfig", GROUPED, "self_attn", "mlp", False),
    "gemma2": ("Gemma2Config", GEMMA, "post_attention_layernorm", "post_feedforward_layernorm", False),
    "gpt2": ("GPT2Config", GPT2, "attn", "mlp", False),
    "opt": ("OPTConfig", OPT, "self_attn", "fc2", False),
    "opt_post_norm": ("OPTConfig", OPT | {"do_layer_norm_before": False}, "self_attn", "", False),
    "gpt_neox": ("GPTNeoXConfig", BASE, "attention", "mlp", True),
    "gpt_neox_sequential": ("GPTNeoXConfig", BASE | {"use_parallel_residual": False}, "attention", "mlp", False),
    "falcon": ("FalconConfig", FALCON, "self_attention", "mlp", True),
    "bloom": ("BloomConfig", BLOOM, "self_attention.dense", "mlp.dense_4h_to_h", False),
    "mixtral": (
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        "self_attn",
        "mlp",
        False,
    ),
}


def family(name: str, folder: Path) -> Path:
    return save_model(folder / name, getattr(transformers, FAMILIES[name][0])(**FAMILIES[name][1]))


def first_of(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class Whole:
    """A whole model on `SEEN`: what enters and leaves each block, and what chosen modules return."""

    def __init__(self, folder: Path) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model: Any = model.eval()
        self.names = [info.name for info in job_for(folder).trace.blocks]

    def run(
        self, *modules: str, skipped: int | None = None, stop: int = 0
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]], Tensor]:
        """Outputs by module, `(entering, leaving)` by block, logits; block `skipped` bypassed at `1 .. stop - 1`."""
        outputs: dict[str, Tensor] = {}
        around: list[tuple[Tensor, Tensor]] = []

        def bypass(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            entering, leaving = (args[0] if args else kwargs["hidden_states"]), first_of(output).clone()
            leaving[:, 1:stop] = entering[:, 1:stop]
            return (leaving, *output[1:]) if isinstance(output, tuple) else leaving

        def block(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            around.append((args[0] if args else kwargs["hidden_states"], first_of(output)))

        handles = []
        for index, name in enumerate(self.names):
            module = self.model.get_submodule(name)
            if index == skipped:
                handles.append(module.register_forward_hook(bypass, with_kwargs=True))
            handles.append(module.register_forward_hook(block, with_kwargs=True))
        for name in modules:
            handles.append(
                self.model.get_submodule(name).register_forward_hook(
                    lambda _, __, output, name=name: outputs.update({name: first_of(output).clone()})
                )
            )
        with torch.no_grad():
            logits = self.model(SEEN, use_cache=False).logits
        for handle in handles:
            handle.remove()
        return outputs, around, logits


def series_of(measured: Measured) -> dict[str, tuple[float, ...]]:
    return {series.name: series.values for series in measured.series}


@pytest.mark.parametrize("name", FAMILIES)
def test_contributions_are_those_of_the_whole_model(name: str, tmp_path: Path) -> None:
    """Sizes and cosines from what attention and MLP really return in each family; together they are the block."""
    folder = family(name, tmp_path)
    _, _, attention, mlp, parallel = FAMILIES[name]
    whole = Whole(folder)
    wanted = [f"{block}.{part}" for block in whole.names for part in (attention, mlp) if part]
    outputs, around, _ = whole.run(*wanted)
    found = series_of(scored(folder, "depth", TOKENS, depth=SMALL))
    for index, (block, (entering, leaving)) in enumerate(zip(whole.names, around, strict=True)):
        h, added = entering.double(), (leaving - entering).double()
        a = outputs[f"{block}.{attention}"].double().view_as(h)
        m = outputs[f"{block}.{mlp}"].double().view_as(h) if mlp else added - a
        assert torch.allclose(a + m, added, atol=1e-4)
        for part, (change, stream) in {
            "attention": (a, h),
            "mlp": (m, h if parallel else h + a),
            "block": (added, h),
        }.items():
            size = (change.norm(dim=-1) / stream.norm(dim=-1)).mean().item()
            cosine = ((change * stream).sum(-1) / change.norm(dim=-1) / stream.norm(dim=-1)).mean().item()
            assert found[f"{part} size"][index] == pytest.approx(size, rel=1e-3), part
            assert found[f"{part} cosine"][index] == pytest.approx(cosine, abs=1e-4), part
    everything = sum(
        outputs[f"{block}.{part}"].view_as(around[0][0]) for block in whole.names for part in (attention, mlp) if mlp
    )
    if mlp:  # the contributions of all blocks lead from the first hidden states to the last
        assert isinstance(everything, Tensor)
        assert torch.allclose(everything, around[-1][1] - around[0][0], atol=1e-3)


def test_places(tmp_path: Path) -> None:
    kinds = {}
    for name in ("llama", "gemma2", "gpt_neox", "falcon", "mixtral", "opt"):
        places = find_places(job_for(family(name, tmp_path)).trace.blocks[1])
        assert places is not None
        kinds[name] = (places.attention, places.mlp_norm, places.parallel)
    assert kinds == {
        "llama": ("self_attn", "post_attention_layernorm", False),
        "gemma2": ("self_attn", "pre_feedforward_layernorm", False),
        "gpt_neox": ("attention", "post_attention_layernorm", False),  # found parallel when it runs
        "falcon": ("self_attention", None, True),
        "mixtral": ("self_attn", None, False),
        "opt": ("self_attn", "final_layer_norm", False),
    }


def test_blocks_without_submodules_have_no_attention_to_tell(llama: Path) -> None:
    info = job_for(llama).trace.blocks[0]
    bare = tuple(
        linear.model_copy(update={"name": f"{info.name}.{place}"}) for place, linear in enumerate(info.linears)
    )
    assert find_places(info.model_copy(update={"linears": bare})) is None
    assert find_places(info.model_copy(update={"linears": ()})) is None


@given(st.integers(0, 1000))
def test_contribution_figures_of_known_changes(seed: int) -> None:
    h = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(seed))
    figures = contribution_figures(h, 4 * h, Middle(h, 2 * h))  # attention adds h, the MLP 2h to the 2h it read
    assert figures.shape == (6, 2, 3)
    expected = torch.tensor([1.0, 1.0, 3.0, 1.0, 1.0, 1.0])[:, None, None].expand(6, 2, 3)
    assert torch.allclose(figures, expected, atol=1e-5)
    back = contribution_figures(h, h, Middle(h, 2 * h))  # the MLP takes away what attention added
    assert back[1].tolist() == [pytest.approx([0.5] * 3)] * 2
    assert back[4].tolist() == [pytest.approx([-1.0] * 3)] * 2
    assert not bool(contribution_figures(h, h, Middle(torch.zeros_like(h), h)).any())


def test_a_padding_token_whose_embedding_is_zero_counts_nothing(tmp_path: Path) -> None:
    """Gemma's token 0: nothing its first block adds has anything to be compared with."""
    tokens = SEEN.clone()
    found = series_of(scored(family("gemma2", tmp_path), "depth", tokens, depth=SMALL))
    tokens = torch.cat([torch.zeros(3, 1, dtype=torch.int64), tokens[:, :-1]], 1)
    padded = series_of(scored(family("gemma2", tmp_path), "depth", tokens, depth=SMALL))
    assert 0 < padded["block size"][0] < 2 * found["block size"][0]
    nothing, h = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    assert contribution_figures(nothing, h, Middle(h, h)).flatten().tolist() == [0.0] * 6


@pytest.mark.parametrize("statistic", ["mean", "max"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "opt"])
def test_skip_effects_are_those_of_a_whole_model_with_the_block_bypassed(
    name: str, statistic: str, tmp_path: Path
) -> None:
    folder = family(name, tmp_path)
    found = series_of(scored(folder, "depth", TOKENS, depth=SMALL | {"statistic": statistic}))
    whole = Whole(folder)
    _, around, logits = whole.run()
    added = [leaving - entering for entering, leaving in around]
    reduce: Callable[[Tensor], Tensor] = torch.max if statistic == "max" else torch.mean

    def effects(skipped: int, stop: int, start: int) -> tuple[list[Tensor], Tensor]:
        _, changed, after = whole.run(skipped=skipped, stop=stop)
        later = range(skipped + 1, len(added))
        gaps = [added[i] - (changed[i][1] - changed[i][0]) for i in later]
        return [(g.norm(dim=-1) / added[i].norm(dim=-1))[:, start:] for i, g in zip(later, gaps, strict=True)], after

    before = torch.softmax(logits.double(), -1)
    for skipped in range(3):
        current, after = effects(skipped, 16, 1)
        cuts = [effects(skipped, cut + 1, cut + 1)[0] for cut in (4, 8, 12)]
        future = [torch.cat([cut[place].flatten() for cut in cuts]) for place in range(2 - skipped)]
        for series, values in (("skip effect", current), ("skip effect future", future)):
            expected = reduce(torch.stack([reduce(value) for value in values])).item() if values else 0.0
            assert found[series][skipped] == pytest.approx(expected, rel=1e-3), series
        p = torch.softmax(after.double(), -1)
        distance = (before - p).norm(dim=-1)[:, 1:]
        divergence = (before * (before / p).log()).sum(-1)[:, 1:]
        assert found["skip output"][skipped] == pytest.approx(reduce(distance).item(), rel=1e-3)
        assert found["skip kl"][skipped] == pytest.approx(reduce(divergence).item(), rel=1e-3, abs=1e-6)


def test_a_zeroed_block_adds_nothing_and_is_not_missed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", llama_config(), shard_size="100MB")
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.1.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = series_of(scored(folder, "depth", TOKENS, depth=SMALL))
    assert set(found) == {*FIGURES, "skip effect", "skip effect future", "skip output", "skip kl"}
    for name, values in found.items():
        assert values[1] == 0, name
        assert values[0] != 0, name


@given(
    st.lists(st.floats(0.1, 2.0).flatmap(lambda c: st.sampled_from([c, -0.4 * c])), min_size=2, max_size=5),
    st.integers(0, 100),
)
@settings(deadline=None, max_examples=25)
def test_linear_residual_blocks_that_commute_have_a_closed_form(factors: list[float], seed: int) -> None:
    """Blocks `h + c_s a h` with `a` a diagonal: without s, what every later block adds is divided by `1 + c_s a`."""
    generator = torch.Generator().manual_seed(seed)
    diagonal = torch.rand(8, generator=generator, dtype=torch.float64)
    start = torch.randn(2, 9, 8, generator=generator, dtype=torch.float64)
    chains, hidden = SkipChains((current_span(9), *future_spans(9))), start
    for factor in factors:
        hidden = chains.advance(lambda h, factor=factor: h + factor * diagonal * h, hidden)  # type: ignore[misc]
    for chain in chains.chains:
        grown = 1 + factors[chain.skipped] * diagonal
        for place, effect in enumerate(chain.effects):
            later = chain.skipped + 1 + place
            added = factors[later] * diagonal * start
            for factor in factors[:later]:
                added = added * (1 + factor * diagonal)
            expected = (added * (1 - 1 / grown)).norm(dim=-1) / added.norm(dim=-1)
            if chain.span.stop == 9:
                assert torch.allclose(effect, expected[:, 1:])
            else:  # no token looks at another: the future does not change
                assert effect.shape[1] == 9 - chain.span.start
                assert float(effect.max()) < 1e-12
    effects = skip_effects([chains], len(factors), future=False, statistic="mean")
    assert effects[-1] == 0


def test_equal_factors_give_the_same_effect_everywhere() -> None:
    """Scalar blocks `h (1 + c)`: skipping any of them takes `c / (1 + c)` of what each later one adds."""
    chains, hidden = SkipChains((current_span(4),)), torch.ones(1, 4, 3)
    for _ in range(4):
        hidden = chains.advance(lambda h: 1.25 * h, hidden)
    for statistic in ("mean", "max"):
        effects = skip_effects([chains], 4, future=False, statistic=statistic)
        assert effects == pytest.approx([0.2, 0.2, 0.2, 0.0])


def test_the_first_token_is_never_skipped() -> None:
    chains = SkipChains((current_span(6), *future_spans(6)))
    entering = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    leaving = chains.advance(lambda h: 2 * h, entering)
    assert [chain.span.stop for chain in chains.chains] == [6, 2, 4, 5]
    for chain in chains.chains:
        assert torch.equal(chain.hidden[:, 0], leaving[:, 0])
        assert torch.equal(chain.hidden[:, 1 : chain.span.stop], entering[:, 1 : chain.span.stop])
        assert torch.equal(chain.hidden[:, chain.span.stop :], leaving[:, chain.span.stop :])


@pytest.mark.parametrize("tokens", [4, 8, 9, 64])
def test_future_spans_leave_something_to_skip_and_something_to_compare(tokens: int) -> None:
    assert future_spans(tokens)
    for span in future_spans(tokens):
        assert span.stop == span.start
        assert 2 <= span.start < tokens
    if tokens == 64:
        assert [span.start for span in future_spans(tokens)] == [17, 33, 49]


def test_output_effects_of_known_distributions() -> None:
    sure, other = torch.tensor([[[0.0, -200.0]]]), torch.tensor([[[-200.0, 0.0]]])
    even = torch.zeros(1, 1, 2)
    assert output_effects(sure, other)[0].item() == pytest.approx(2**0.5)
    assert output_effects(sure, even).flatten().tolist() == pytest.approx([0.5**0.5, 0.6931472])
    assert output_effects(even + 7, even).flatten().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("effect", ["output", "current", "future"])
@pytest.mark.parametrize("statistic", ["mean", "max"])
def test_importance_is_the_effect_asked_for(effect: str, statistic: str, llama: Path) -> None:
    """The last block, which has no later one, counts as the one before it."""
    measured = scored(llama, "depth", TOKENS, depth=SMALL | {"effect": effect, "statistic": statistic})
    name = {"output": "skip output", "current": "skip effect", "future": "skip effect future"}[effect]
    values = list(series_of(measured)[name])
    assert values[-1] > 0 if effect == "output" else values[-1] == 0
    if effect != "output":
        values[-1] = values[-2]
    importance = {layer.linear: layer.importance for layer in measured.layers}
    for info in job_for(llama).trace.blocks:
        for linear in info.linears:
            assert importance[linear.name] == values[info.index]


def test_a_model_of_one_block_can_be_scored(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "one", llama_config(num_hidden_layers=1))
    for effect in ("current", "future"):
        measured = scored(folder, "depth", TOKENS, depth=SMALL | {"effect": effect})
        assert {layer.importance for layer in measured.layers} == {1.0}
        assert series_of(measured)["skip effect"] == (0.0,)


def test_batches_do_not_matter(llama: Path) -> None:
    """Four samples in one batch, or five in two."""
    one = scored(llama, "depth", TOKENS[4:].repeat(4, 1), depth={"samples": 4})
    more = scored(llama, "depth", TOKENS[4:].repeat(6, 1), depth={"samples": 6})
    for name, values in series_of(one).items():
        assert values == pytest.approx(series_of(more)[name], rel=1e-4), name
