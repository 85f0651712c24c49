"""What is not run again is what would have come out: blocks with and without replay, drift summed up early or late."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import llama_config, save_model
from torch import Tensor

from llmcompress.compress import observe, replay
from llmcompress.compress.group import Method
from llmcompress.compress.observe import InputSums, Reading
from llmcompress.compress.quantizers import gptq
from llmcompress.compress.replay import Replay
from llmcompress.compress.rounds import BlockRounds, Streams
from llmcompress.compress.targets import Targets
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.trace import trace
from llmcompress.types import ChildEnd, InputSpec, LinearSpec, QuantizerOptions

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[Any, tuple[ChildEnd, ...]]] = {
    "llama": (
        llama_config(intermediate_size=192),
        (
            ChildEnd(child="self_attn", linear="self_attn.o_proj", beside=1),
            ChildEnd(child="mlp", linear="mlp.down_proj"),
        ),
    ),
    "gpt2": (
        transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64),
        (ChildEnd(child="attn", linear="attn.c_proj", beside=1), ChildEnd(child="mlp", linear="mlp.c_proj")),
    ),
    "neox, attention and MLP side by side": (
        transformers.GPTNeoXConfig(**SMALL, intermediate_size=128, use_parallel_residual=True),
        (
            ChildEnd(child="attention", linear="attention.dense", beside=1),
            ChildEnd(child="mlp", linear="mlp.dense_4h_to_h"),
        ),
    ),
    "opt, linears of the block itself": (
        transformers.OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64),
        (ChildEnd(child="self_attn", linear="self_attn.out_proj", beside=1),),
    ),
}


@contextmanager
def nothing_kept(self: Replay, *_: Any, **__: Any) -> Iterator[None]:
    yield


def outcome(model: Path, inputs: InputSpec | None = None) -> list[Tensor]:
    """Stored weights of both blocks of a model, and the hidden states that leave them, in both models."""
    skeleton = Skeleton.open(model)
    blocks, found = trace(skeleton).blocks, []
    stream = BlockStream(skeleton)
    tokens = [torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    hidden, calls = stream.start(tokens)
    full = list(hidden)
    method = Method(gptq, QuantizerOptions(sweeps=1), torch.bfloat16)
    for info in blocks:
        block, here = skeleton.load_block(info.index), [call[info.index] for call in calls]
        specs = {x.name: LinearSpec(bits=3, group_size=32, inputs=inputs) for x in info.linears}
        rounds = BlockRounds(method, block, info, specs, Streams(hidden, full, here))
        found += [x.result.codes.dequantize() for x in rounds.rounded()]
        leaving = [rounds.leave_full(place) for place in range(len(here))]
        hidden = [rounds.leave_stored(place, call) for place, call in enumerate(here)]
        full = leaving
        found += [*hidden, *full]
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_of_children_are_found_by_watching(family: str, tmp_path: Path) -> None:
    config, ends = FAMILIES[family]
    for block in trace(Skeleton.open(save_model(tmp_path / "model", config))).blocks:
        assert block.ends == ends


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_block_gives_what_a_block_run_again_gives(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_model(tmp_path / "model", FAMILIES[family][0])
    found = outcome(model)
    monkeypatch.setattr(replay, "INPUT_BYTES", 2 * 24 * 64 * 4 * 3)  # room for three batches of four
    short = outcome(model)
    monkeypatch.setattr(Replay, "on", nothing_kept)
    slow = outcome(model)
    for other in (short, slow):
        assert len(found) == len(other)
        assert all(torch.equal(a, b) for a, b in zip(found, other, strict=True))


def test_inputs_that_are_kept_are_mixed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hadamard matrix is its own inverse: applied to what is kept as well, it would undo itself."""
    model, mixing = save_model(tmp_path / "model", FAMILIES["llama"][0]), InputSpec(scale="token", hadamard=64)
    found = outcome(model, mixing)
    monkeypatch.setattr(Replay, "on", nothing_kept)
    assert all(torch.equal(a, b) for a, b in zip(found, outcome(model, mixing), strict=True))


def test_a_replayed_block_runs_its_attention_once_in_each_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    genuine = torch.nn.functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        runs.append(1)
        return genuine(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    config, _ = FAMILIES["llama"]
    outcome(save_model(tmp_path / "model", config))
    batches, models, learning = 4, 2, 3  # block 0 is run to trace it, and to learn what it returns, twice
    assert len(runs) == batches * models * config.num_hidden_layers + learning


def test_the_hessian_is_symmetric_and_that_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "STRIPE", 5)
    generator, sums = torch.Generator().manual_seed(0), InputSums()
    parts = [torch.randn(count, 13, generator=generator) for count in (7, 40, 1)]
    for part in parts:
        sums.add(Reading(part, {}))
    seen, _ = sums.means()
    whole = torch.cat(parts).double()
    assert torch.equal(seen.hessian, seen.hessian.T)
    assert torch.allclose(seen.hessian.double(), whole.T @ whole / len(whole), rtol=1e-5, atol=1e-6)
    assert seen.tokens == len(whole)


def test_drift_summed_up_where_it_arrives_gives_the_same_target() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 24, generator=generator)
    stored = torch.randn(500, 24, generator=generator)
    full = stored + 0.1 * torch.randn(500, 24, generator=generator)
    before, beside = torch.randn(500, 6, generator=generator), torch.randn(500, 6, generator=generator)
    found = []
    for whole in (False, True):
        sums, wrote = InputSums(whole=whole), (stored @ weight.T, full @ weight.T) if whole else (0, 0)
        sums.add(Reading(stored, {"down": before + wrote[0]}), Reading(full, {"down": beside + wrote[1]}))
        seen, terms = sums.means()
        assert (seen.drift is None) == whole
        found.append(Targets(seen, 1e-6, 0.5).of(weight, terms["down"]))
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-4)
    assert float((found[0] - weight).abs().max()) > 0.01
