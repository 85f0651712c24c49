"""The void rule by hand, its laws, and both phases against the whole model."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_help import job_for, scored
from test_scorers_lim_zd import block_states
from torch import Tensor

from llmcompress.compress.scorers.voids import RunningRange, continue_greedily, generation_sizes, lengths, voids_of
from llmcompress.compress.scoring import run_scorers
from llmcompress.errors import InputError
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.options import VoidsOptions

SEEDS = st.integers(0, 1_000_000)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with blocks enough for ranges to matter."""
    return save_model(tmp_path_factory.mktemp("models") / "deep", llama_config(num_hidden_layers=8), seed=1)


def voids_of_token(norms: list[float], alpha: float) -> list[bool]:
    """The rule for one token, in plain arithmetic, from the norm before the first step on."""
    changes = [after - before for before, after in pairwise(norms)]
    found = []
    for place, change in enumerate(changes):
        earlier = changes[:place] or [0.0]
        found.append(change < alpha * (max(earlier) - min(earlier)))
    return found


def usage_of(states: list[list[Tensor]], tokens: slice, alpha: float, *, from_embedding: bool) -> list[float]:
    """Share of active tokens by block, token by token, from the hidden states of the whole model."""
    decided = []
    for batch in states:
        norms = torch.stack([lengths(hidden[:, tokens]) for hidden in batch]).flatten(1)
        for token in norms.T.tolist():
            known = token if from_embedding else token[1:]
            decided.append([*([] if from_embedding else [False]), *voids_of_token(known, alpha)])
    return [1 - sum(column) / len(decided) for column in zip(*decided, strict=True)]


def walk(seed: int, steps: int, tokens: int) -> Tensor:
    return torch.randn(steps, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(0)


def test_the_table_by_hand() -> None:
    norms = [1, 2, 3, 3.1, 5, 5.2]
    assert voids_of(torch.tensor(norms, dtype=torch.float64), 0.8).tolist() == [False] * 4 + [True]
    assert voids_of(torch.tensor(norms[:-1], dtype=torch.float64), 0.8).tolist() == [False] * 4
    rule = RunningRange(torch.tensor(1.0, dtype=torch.float64))
    for norm, spread in ((2, 0.0), (3, 0.0), (3.1, 0.9), (5, 1.8)):
        rule.voids(torch.tensor(norm, dtype=torch.float64), 0.8)
        assert rule.highest is not None
        assert rule.lowest is not None
        assert float(rule.highest - rule.lowest) == pytest.approx(spread)
    # up to the second change there is no range: only a loss of norm is a void
    assert voids_of(torch.tensor([5.0, 4.0, 3.5]), 0.8).tolist() == [True, True]
    assert voids_of(torch.tensor([5.0, 5.0, 5.0]), 0.8).tolist() == [False, False]


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, steps=st.integers(1, 9), alpha=st.floats(0, 3))
def test_equals_the_rule_token_by_token(seed: int, steps: int, alpha: float) -> None:
    norms = walk(seed, steps, 7)
    expected = [voids_of_token(token, alpha) for token in norms.T.tolist()]
    assert voids_of(norms, alpha).T.tolist() == expected


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_alpha_at_its_ends(seed: int) -> None:
    norms = walk(seed, 9, 20)
    assert torch.equal(voids_of(norms, 0.0), norms[1:] < norms[:-1])
    assert bool(voids_of(norms, 1e12)[2:].all())  # two changes that differ are behind every later step
    level = torch.arange(9.0)[:, None].expand(9, 3)
    assert not voids_of(level, 1e12).any()  # a constant rise has no range


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, low=st.floats(0, 2), more=st.floats(0, 2))
def test_raising_alpha_makes_no_void_active(seed: int, low: float, more: float) -> None:
    norms = walk(seed, 8, 30)
    assert not (voids_of(norms, low) & ~voids_of(norms, low + more)).any()


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, factor=st.sampled_from([1e-3, 0.7, 20.0]))
def test_blind_to_rotation_and_scale(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, 2, 15, 8, generator=generator, dtype=torch.float64).cumsum(0)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    expected = voids_of(lengths(hidden), 0.8)
    assert torch.equal(voids_of(lengths(factor * hidden @ rotation), 0.8), expected)
    assert bool(expected.any())
    assert not bool(expected.all())


@pytest.mark.parametrize("from_embedding", [True, False])
@pytest.mark.parametrize("skip_first", [True, False])
def test_the_prompt_phase_equals_the_whole_model(skip_first: bool, from_embedding: bool, deep: Path) -> None:
    job = job_for(deep)
    options = {"skip_first": skip_first, "from_embedding": from_embedding, "alpha": 0.8, "new_tokens": 0}
    found = scored(deep, "voids", voids=options)
    states = block_states(deep, job.batches.split(job.batch_size))
    expected = usage_of(states, slice(int(skip_first), None), 0.8, from_embedding=from_embedding)
    assert [line.name for line in found.series] == ["usage prompt"]
    assert found.series[0].values == pytest.approx(expected)
    assert len(set(expected)) > 3
    importance = {layer.linear: layer.importance for layer in found.layers}
    assert [importance[info.linears[0].name] for info in job.trace.blocks] == pytest.approx(
        [max(value, 1e-6) for value in expected]
    )


def greedy(folder: Path, prompts: Tensor, new: int) -> Tensor:
    """What transformers' own generate goes on with."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=new,
        eos_token_id=None,
        pad_token_id=0,
    )
    return found[:, prompts.shape[1] :]  # type: ignore[no-any-return]


@pytest.mark.parametrize("from_embedding", [True, False])
def test_the_generation_phase_equals_the_whole_model(from_embedding: bool, deep: Path) -> None:
    job = job_for(deep)
    sizes = {"prompts": 5, "prompt_tokens": 10, "new_tokens": 7}
    options = sizes | {"phase": "generation", "from_embedding": from_embedding, "alpha": 0.8}
    found = scored(deep, "voids", voids=options)
    prompts = job.batches.tokens[:5, :10]
    states = block_states(deep, [torch.cat([prompts, greedy(deep, prompts, 7)], dim=1)])
    expected = usage_of(states, slice(10, None), 0.8, from_embedding=from_embedding)
    assert {line.name: line.values for line in found.series}["usage generation"] == pytest.approx(expected)
    assert len(set(expected)) > 3
    importance = {layer.linear: layer.importance for layer in found.layers}
    assert [importance[info.linears[0].name] for info in job.trace.blocks] == pytest.approx(
        [max(value, 1e-6) for value in expected]
    )


def continued(folder: Path, prompts: Tensor, draft: Tensor, *, hold: bool) -> tuple[Tensor, int, int]:
    """The continuation, the number of passes, and the most blocks that were loaded at once."""
    skeleton = Skeleton.open(folder)
    passes, most = 0, 0

    def see(index: int, rows: Tensor, hidden: Tensor) -> None:
        nonlocal passes, most
        passes += index < 0
        most = max(most, sum(not any(p.is_meta for p in block.parameters()) for block in skeleton.blocks))
        assert hidden.shape == (len(rows), prompts.shape[1] + draft.shape[1], 64)

    found = continue_greedily(BlockStream(skeleton), prompts, draft, hold=hold, see=see)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    return found, passes, most


FAMILIES: dict[str, Any] = {
    "llama": llama_config(),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64),
    "bloom": transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=3, n_head=4),
    "mistral": transformers.MistralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("hold", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_continuation_is_the_greedy_one(name: str, hold: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path / name, FAMILIES[name])
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(96, (4, 9), generator=generator)
    draft = torch.randint(96, (4, 6), generator=generator)
    expected = greedy(folder, prompts, 6)
    found, passes, most = continued(folder, prompts, draft, hold=hold)
    assert torch.equal(found, expected)
    assert passes <= 7
    assert most == (3 if hold else 1)
    again, passes, _ = continued(folder, prompts, expected, hold=hold)
    assert torch.equal(again, expected)
    assert passes == 1


def test_generation_is_seen_once_settled(llama: Path) -> None:
    """For every row the last hidden states shown are those of the answer, also where rows settle at different times."""
    generator = torch.Generator().manual_seed(4)
    prompts = torch.randint(96, (4, 9), generator=generator)
    expected = greedy(llama, prompts, 6)
    draft = torch.randint(96, (4, 6), generator=generator)
    draft[1] = expected[1]
    last: dict[int, Tensor] = {number: torch.zeros(4, 15, 64) for number in range(-1, 3)}
    seen: list[int] = []

    def see(index: int, rows: Tensor, hidden: Tensor) -> None:
        last[index][rows] = hidden
        seen.append(len(rows))

    continue_greedily(BlockStream(Skeleton.open(llama)), prompts, draft, hold=False, see=see)
    states = block_states(llama, [torch.cat([prompts, expected], dim=1)])[0]
    for number, hidden in last.items():
        assert torch.allclose(hidden, states[number + 1], atol=1e-4)
    assert seen[0] == 4
    assert seen[-1] < 4


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.integers(2, 40), new=st.integers(0, 40), rows=st.integers(1, 20), width=st.integers(8, 60),
    context=st.one_of(st.none(), st.integers(1, 50)),
)  # fmt: skip
def test_generation_fits_the_context(prompt: int, new: int, rows: int, width: int, context: int | None) -> None:
    options = VoidsOptions(prompts=8, prompt_tokens=prompt, new_tokens=new)
    width = min(width, context or width)
    taken, begun, more = generation_sizes(options, (rows, width), context)
    assert taken == min(rows, 8)
    assert 1 <= begun <= min(prompt, width)
    assert 0 <= more <= new
    assert context is None or begun + more <= context
    if new and (context is None or context > 1):
        assert more
    if context is None or context >= prompt + new:
        assert more == new


def test_generation_stays_within_learned_positions(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=24)
    folder = save_model(tmp_path / "gpt2", config)
    options = {"prompt_tokens": 20, "new_tokens": 30, "phase": "generation"}
    found = {line.name: line.values for line in scored(folder, "voids", voids=options).series}
    assert len(found["usage generation"]) == 2


def test_generation_without_tokens_is_refused(llama: Path) -> None:
    with pytest.raises(InputError, match="generation"):
        scored(llama, "voids", voids={"phase": "generation", "new_tokens": 0})


@pytest.mark.parametrize(("rows", "held"), [(6, 1), (64, 3)])
def test_blocks_stay_only_where_the_hidden_states_were_larger(
    rows: int, held: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, most = Skeleton.load_block, 0

    def watching(self: Skeleton, index: int) -> torch.nn.Module:
        nonlocal most
        block = genuine(self, index)
        most = max(most, sum(not any(p.is_meta for p in each.parameters()) for each in self.blocks))
        return block

    tokens = torch.randint(96, (rows, 48), generator=torch.Generator().manual_seed(5))
    job = job_for(llama, tokens)
    weights = sum(parameter.numel() for parameter in job.skeleton.blocks.parameters())
    assert (weights <= tokens.numel() * 64) == (held > 1)
    monkeypatch.setattr(Skeleton, "load_block", watching)
    run_scorers(("voids",), job)
    assert most == held
    assert all(parameter.is_meta for parameter in job.skeleton.model.parameters())
