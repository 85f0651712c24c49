"""Rank of attention maps: maps with a known rank, and the maps whole models really have."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_help import job_for, scored

from llmcompress.compress.scorers.arank import eager_attention, effective_rank, exact_rank, score, without_diagonal
from llmcompress.errors import InputError

TOKENS = torch.randint(96, (6, 24), generator=torch.Generator().manual_seed(0))
BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
GEMMA = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", BASE | {"num_key_value_heads": 2}),
    "gemma2": ("Gemma2Config", BASE | GEMMA),
    "gpt_neox": ("GPTNeoXConfig", BASE),
    "gpt2": ("GPT2Config", {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (
        "OPTConfig",
        {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    ),
    "bloom": ("BloomConfig", {"vocab_size": 96, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
}


def family(name: str, folder: Path) -> Path:
    kind, sizes = FAMILIES[name]
    return save_model(folder / name, getattr(transformers, kind)(**sizes))


def uniform(tokens: int) -> torch.Tensor:
    """Causal attention that looks at everything alike."""
    return torch.tril(torch.ones(tokens, tokens)) / torch.arange(1, tokens + 1)[:, None]


def random_attention(tokens: int, seed: int) -> torch.Tensor:
    logits = torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(seed)) * 2
    return torch.softmax(logits.masked_fill(torch.triu(torch.ones_like(logits), 1) > 0, -torch.inf), -1)


@pytest.mark.parametrize("tokens", [2, 5, 24])
def test_uniform_attention(tokens: int) -> None:
    assert exact_rank(without_diagonal(uniform(tokens))).item() == tokens - 1
    assert 1 <= effective_rank(without_diagonal(uniform(tokens))).item() <= tokens - 1 + 1e-4


def test_attention_to_the_first_token_only() -> None:
    first = torch.zeros(3, 16, 16)
    first[..., 0] = 1
    assert exact_rank(without_diagonal(first)).tolist() == [1.0] * 3
    assert effective_rank(without_diagonal(first)).tolist() == pytest.approx([1.0] * 3, abs=1e-4)


def test_the_diagonal_hides_everything() -> None:
    """Kept, it makes any causal map of full rank, one that looks only at the first token included."""
    sink = torch.full((12, 12), 0.0)
    sink[:, 0], sink[range(12), range(12)] = 0.9, 0.1
    sink[0, 0] = 1
    assert exact_rank(sink).item() == 12
    assert exact_rank(without_diagonal(sink)).item() == 1
    assert sink[3, 3] == pytest.approx(0.1)  # a copy is changed


def test_attention_to_oneself_has_no_rank() -> None:
    nothing = without_diagonal(torch.eye(8))
    assert (exact_rank(nothing).item(), effective_rank(nothing).item()) == (0.0, 0.0)


@given(st.integers(2, 20), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_effective_rank_is_bounded_and_blind_to_order(tokens: int, seed: int) -> None:
    attention = without_diagonal(random_attention(tokens, seed))
    rank = effective_rank(attention).item()
    assert 1 - 1e-5 <= rank <= tokens - 1 + 1e-4
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(tokens, generator=generator) for _ in range(2))
    assert effective_rank(attention[rows][:, columns]).item() == pytest.approx(rank, rel=1e-4)
    assert effective_rank(3 * attention).item() == pytest.approx(rank, rel=1e-4)


def test_effective_rank_of_equal_singular_values_is_their_number() -> None:
    basis = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(0))).Q
    for kept in (1, 4, 10):
        assert effective_rank(basis[:, :kept] @ basis[:kept]).item() == pytest.approx(kept, rel=1e-3)


@pytest.mark.parametrize("rank", ["effective", "exact"])
@pytest.mark.parametrize("name", FAMILIES)
def test_ranks_are_those_of_the_whole_model(name: str, rank: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path)
    measured = scored(folder, "arank", TOKENS, arank={"rank": rank, "samples": 5, "tokens": 20})
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        maps = model(TOKENS[:5, :20], output_attentions=True, use_cache=False).attentions
    expected = []
    for each in maps:
        free = each * (1 - torch.eye(20))
        values = torch.linalg.svdvals(free.double())
        share = values / values.sum(-1, keepdim=True)
        effective = (-(share * share.clamp_min(1e-300).log()).sum(-1)).exp()
        exact = torch.linalg.matrix_rank(free).double()
        expected.append((effective if rank == "effective" else exact).mean().item())
    (series,) = measured.series
    assert series.name == "arank"
    assert series.values == pytest.approx(expected, rel=1e-3)
    importance = {layer.linear: layer.importance for layer in measured.layers}
    for info in job_for(folder).trace.blocks:
        for linear in info.linears:
            assert importance[linear.name] == series.values[info.index]


def test_attention_is_put_back(llama: Path) -> None:
    job = job_for(llama)
    model: Any = job.skeleton.model
    before = model.config._attn_implementation
    assert before != "eager"
    score(job)
    assert model.config._attn_implementation == before
    seen = []

    def fail() -> None:
        with eager_attention(model):
            seen.append(model.config._attn_implementation)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == ["eager"]
    assert model.config._attn_implementation == before


def test_a_model_without_attention_weights_is_refused(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8, expand=2)
    folder = save_model(tmp_path / "mamba", config)
    with pytest.raises(InputError, match="does not return its weights") as caught:
        score(job_for(folder))
    assert "mamba" in caught.value.hint


def test_a_block_with_queries_of_zeros_attends_uniformly(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", llama_config(), shard_size="100MB")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    exact = scored(folder, "arank", TOKENS, arank={"rank": "exact"}).series[0].values
    assert exact[1] == 23
    effective = scored(folder, "arank", TOKENS).series[0].values
    assert effective[1] == pytest.approx(effective_rank(without_diagonal(uniform(24))).item(), rel=1e-4)
