"""The built-in text: splits share nothing, and damaged installations do not matter."""

import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import llmcompress
from llmcompress.model import corpus

SPLITS: tuple[corpus.Split, ...] = ("train", "calibration", "evaluation")


@pytest.fixture(scope="module")
def text() -> dict[str, list[tuple[str, str]]]:
    return {split: corpus.documents(split) for split in SPLITS}


def test_every_split_has_text(text: dict[str, list[tuple[str, str]]]) -> None:
    characters = {split: sum(len(document) for _, document in text[split]) for split in SPLITS}
    assert min(characters.values()) > 200_000
    assert characters["train"] > characters["calibration"] + characters["evaluation"]


def test_splits_share_no_file_and_no_document(text: dict[str, list[tuple[str, str]]]) -> None:
    for one, other in itertools.combinations(SPLITS, 2):
        assert not {name for name, _ in text[one]} & {name for name, _ in text[other]}
        assert not {document for _, document in text[one]} & {document for _, document in text[other]}


def test_documents_are_whole_files_in_the_order_of_their_digests(text: dict[str, list[tuple[str, str]]]) -> None:
    root = Path(hashlib.__file__).parent
    for split in SPLITS:
        names = [name for name, _ in text[split]]
        assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        assert len(names) == len(set(names))
        for name, document in text[split]:
            if not name.startswith("topics/"):
                assert document == (root / name).read_text(encoding="utf-8", errors="replace")


def test_a_file_keeps_its_split_in_every_version() -> None:
    """Frozen on purpose: a change here would mix the text of earlier and later runs."""
    frozen = {
        "json/decoder.py": "train",
        "wave.py": "train",
        "topics/if": "train",
        "poplib.py": "calibration",
        "multiprocessing/managers.py": "calibration",
        "chunk.py": "evaluation",
        "multiprocessing/dummy/__init__.py": "evaluation",
    }
    assert {name: corpus.split_of(name) for name in frozen} == frozen


def test_broken_links_and_folders_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "test").mkdir()
    for name in ("one.py", "two.py", "test/three.py"):
        (tmp_path / name).write_text(f"# {name}\n" * 100)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    names = {name for split in SPLITS for name, _ in corpus.documents(split) if not name.startswith("topics/")}
    assert names == {"one.py", "two.py"}


def test_another_process_sees_the_same_text(text: dict[str, list[tuple[str, str]]]) -> None:
    script = (
        "import hashlib; from llmcompress.model.corpus import documents;"
        "print(hashlib.sha256(repr(documents('calibration')).encode()).hexdigest())"
    )
    root = str(Path(llmcompress.__file__).parents[1])
    other = {"PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", script], env=other, cwd=root, capture_output=True, check=True)
    assert found.stdout.decode().strip() == hashlib.sha256(repr(text["calibration"]).encode()).hexdigest()
