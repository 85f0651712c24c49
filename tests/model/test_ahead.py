"""Reading ahead: the next block's bytes are in the system's cache, whichever way blocks are walked through."""

import errno
import os
from pathlib import Path

import pytest

from llmcompress.model.ahead import Direction, ReadAhead
from llmcompress.model.skeleton import Skeleton
from llmcompress.preflight.header import TensorEntry


def forget(paths: list[Path]) -> None:
    """Have the system drop files from its cache."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(entry: TensorEntry) -> bool:
    """Whether a tensor is there without going to the disk."""
    with entry.path.open("rb") as stream:
        try:
            found = os.preadv(stream.fileno(), [bytearray(entry.stop - entry.start)], entry.start, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            pytest.skip(f"this file system does not tell what is cached: {error}")
    return found == entry.stop - entry.start


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="needs Linux to ask what is cached")
def test_what_is_read_ahead_is_in_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(9 << 20))
    near = TensorEntry("near", "U8", (4096,), path, 0, 4096)
    far = TensorEntry("far", "U8", (5 << 20,), path, 4 << 20, 9 << 20)
    forget([path])
    if cached(far):
        pytest.skip("this file system keeps what it is told to drop")
    ahead = ReadAhead()
    ahead.begin([near, far])
    ahead.wait()
    assert cached(near)
    assert cached(far)


def test_a_file_that_is_gone_is_nobodys_trouble(tmp_path: Path) -> None:
    ahead = ReadAhead()
    ahead.begin([TensorEntry("gone", "U8", (10,), tmp_path / "gone", 0, 10)])
    ahead.wait()


@pytest.mark.parametrize(
    ("walk", "ahead"),
    [
        ((0, 1, 2, 3), (1, 2, 3, 4)),
        ((0, 1, 2, 2, 1, 0), (1, 2, 3, None, 0, -1)),  # forward, then back from the last
        ((0, 1, 0, 1), (1, 2, -1, 2)),
        ((0, 3, 4), (1, None, 5)),
    ],
)
def test_the_neighbour_on_the_way_is_next(walk: tuple[int, ...], ahead: tuple[int | None, ...]) -> None:
    direction = Direction()
    assert tuple(map(direction.after, walk)) == ahead


def test_a_skeleton_asks_for_the_block_that_follows(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(ReadAhead, "begin", lambda _, entries: asked.append({entry.name for entry in entries}))
    skeleton = Skeleton.open(llama)
    last = len(skeleton.blocks) - 1
    for index in (*range(last + 1), *range(last, -1, -1)):
        skeleton.load_block(index)
    wanted = [*range(1, last + 1), *range(last - 2, -1, -1)]
    assert asked == [set(skeleton.block_tensors(index)) for index in wanted]
