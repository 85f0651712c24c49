"""Asking for huge pages: only for memory that is wholly a tensor's own, and without touching what is in it."""

import pytest
import torch

from llmcompress.kernels import pages
from llmcompress.kernels.pages import HUGE, in_huge_pages


@pytest.mark.parametrize("size", [0, 100, HUGE - 1, 3 * HUGE, 5 * HUGE + 77])
@pytest.mark.parametrize("start", [0, 1, 4096 + 64])
def test_only_whole_pages_inside_are_asked_for(size: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda begin, length, advice: asked.append((begin, length)))
    tensor = torch.empty(start + size, dtype=torch.uint8)[start:]
    in_huge_pages(tensor)
    first, last = tensor.data_ptr(), tensor.data_ptr() + size
    whole = [place for place in range(first // HUGE * HUGE, last, HUGE) if first <= place and place + HUGE <= last]
    assert asked == [(whole[0], len(whole) * HUGE)] * len(pages.ADVICE) if whole else not asked


def test_contents_and_place_stay() -> None:
    tensor = torch.randint(256, (5 * HUGE,), dtype=torch.uint8)
    before, place = tensor.clone(), tensor.data_ptr()
    in_huge_pages(tensor)
    assert tensor.data_ptr() == place
    assert torch.equal(tensor, before)
    in_huge_pages(torch.empty(4 * HUGE, device="meta"))
