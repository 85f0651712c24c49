"""Two models side by side: the same logits as each alone, hidden states compared, and never a whole model in memory."""

from pathlib import Path

import pytest
import torch
from conftest import llama_config, save_model
from torch import nn
from transformers import AutoModelForCausalLM

from llmcompress.eval.pair import Pair
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream

BATCHES = [torch.arange(24).view(2, 12) % 96, (torch.arange(24).view(2, 12) * 7) % 96]


@pytest.fixture(scope="module")
def other(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Llama with its linears moved a little."""
    model = AutoModelForCausalLM.from_pretrained(llama)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    folder = tmp_path_factory.mktemp("pair") / "other"
    model.save_pretrained(folder)
    return folder


def hidden_states(folder: Path) -> list[list[torch.Tensor]]:
    """What enters block 0 and leaves each block, of the whole model, for each batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found: list[list[torch.Tensor]] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for tokens in BATCHES:
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            model(tokens)
        found.append(seen)
    return found


def test_logits_and_hidden_states_are_those_of_the_whole_models(llama: Path, other: Path) -> None:
    pair = Pair(Skeleton.open(llama), Skeleton.open(other))
    found = list(pair.logits(BATCHES))
    for side, folder in enumerate((llama, other)):
        alone = BlockStream(Skeleton.open(folder)).logits(BATCHES)
        assert all(torch.equal(both[side], one) for both, one in zip(found, alone, strict=True))
    left, right = hidden_states(llama), hidden_states(other)
    assert [entry.block for entry in pair.trajectory] == [-1, 0, 1, 2]
    assert [cost.block for cost in pair.costs] == [0, 1, 2]
    assert all((cost.reference_seconds or 0) > 0 and (cost.candidate_seconds or 0) > 0 for cost in pair.costs)
    for point, entry in enumerate(pair.trajectory):
        pairs = [
            (p, q)
            for one, two in zip(left, right, strict=True)
            for p, q in zip(one[point].double().flatten(0, 1), two[point].double().flatten(0, 1), strict=True)
        ]
        errors = [float((q - p).norm() / p.norm()) for p, q in pairs]
        cosines = [float(torch.nn.functional.cosine_similarity(p, q, dim=0)) for p, q in pairs]
        assert entry.relative_error == pytest.approx(sum(errors) / len(errors), rel=1e-5, abs=1e-9)
        assert entry.cosine == pytest.approx(sum(cosines) / len(cosines), rel=1e-6)
    assert pair.trajectory[0].relative_error == 0.0
    assert (pair.trajectory[3].relative_error or 0.0) > 0.0


def test_one_block_at_a_time_is_loaded(llama: Path, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both models together; none while logits are made."""
    skeletons = [Skeleton.open(llama), Skeleton.open(other)]
    seen: list[int] = []

    def loaded() -> int:
        blocks = [block for skeleton in skeletons for block in skeleton.blocks]
        return sum(any(not p.is_meta for p in block.parameters()) for block in blocks)

    genuine = Skeleton.load_block

    def counting(self: Skeleton, index: int) -> nn.Module:
        block = genuine(self, index)
        seen.append(loaded())
        return block

    monkeypatch.setattr(Skeleton, "load_block", counting)
    pair = Pair(*skeletons)
    for _ in pair.logits(BATCHES):
        assert loaded() == 0
    assert len(seen) == 2 + 2 * 3  # what blocks return is learnt from the first ones
    assert set(seen) == {1}
    assert all(parameter.is_meta for skeleton in skeletons for parameter in skeleton.model.parameters())


def test_streams_in_different_bases_or_depths_are_not_compared(llama: Path, tmp_path: Path) -> None:
    deeper = save_model(tmp_path / "deeper", llama_config(num_hidden_layers=4))
    pair = Pair(Skeleton.open(llama), Skeleton.open(deeper))
    assert len(list(pair.logits(BATCHES))) == 2
    assert pair.trajectory == ()
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():  # another order of the hidden dimensions, as a rotation would give
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.flip(1))
    model.save_pretrained(tmp_path / "flipped")
    pair = Pair(Skeleton.open(llama), Skeleton.open(tmp_path / "flipped"))
    list(pair.logits(BATCHES))
    assert pair.trajectory == ()
