"""What is compared some positions at a time comes out as if all had been there at once."""

from pathlib import Path

import pytest
import torch

from llmcompress.compress import measuring
from llmcompress.compress.measuring import DamageSums, sequence_dnll, sequence_kld, slices
from llmcompress.compress.scorers.fisher import output_gradient
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream


def logits(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    return torch.log_softmax(torch.randn(batch, length, vocabulary) * 3, -1)


@pytest.mark.parametrize("limit", [1, 3 * 2 * 11, 1 << 23])
def test_damage_of_parts_adds_up(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SLICE_LOGITS", limit)
    p, q, tokens = logits(2, 7, 11), logits(2, 7, 11), torch.randint(11, (2, 7))
    sums, parts = DamageSums(tokens), slices(tokens, 11)
    assert [n for part in parts for n in range(*part.indices(7))] == list(range(7))
    for part in parts:
        sums.add(part, p[:, part], q[:, part])
    exact = len(parts) == 1
    for found, expected in ((sums.kld, sequence_kld(p, q)), (sums.dnll, sequence_dnll(p, q, tokens))):
        assert torch.equal(found, expected) if exact else torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("labels", ["data", "model"])
def test_gradients_of_parts_are_those_of_the_whole(labels: str, llama: Path) -> None:
    stream = BlockStream(Skeleton.open(llama))
    tokens = torch.randint(96, (1, 16), generator=torch.Generator().manual_seed(2))
    hidden = stream.start([tokens])[0][0] * 30

    def gradient(*parts: slice) -> torch.Tensor:
        drawn = [torch.Generator().manual_seed(5)]
        return output_gradient(stream, tokens, hidden, drawn, labels=labels, parts=parts)

    whole = gradient(slice(None))
    assert float(whole.abs().max()) > 0
    found = gradient(slice(0, 5), slice(5, 15), slice(15, 16))
    if labels == "data":
        assert torch.allclose(found, whole, rtol=1e-4, atol=1e-6)
        assert not found[:, -1].any()
    else:
        assert found.shape == whole.shape
