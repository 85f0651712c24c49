"""What an unfinished run keeps: used only as it was written, and gone when it is of no use."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.compress import output, rewrite
from llmcompress.compress.export import records as export
from llmcompress.compress.journal import CommitRecord, Journal, check_output
from llmcompress.compress.kept import seal, sealed, unchanged
from llmcompress.compress.prune import records as prune
from llmcompress.compress.remade import once
from llmcompress.compress.tie import records as tie
from llmcompress.errors import BusyError, InputError, Stopped
from llmcompress.files import commit_bytes
from llmcompress.model.crew import ALONE

ASKED = {"model": "a", "recipe": "b"}


def record(step: int = 0) -> CommitRecord:
    return CommitRecord(step=step, shard="s", shard_digest="d", hidden_digest="", previous="", outcome=None)


def test_no_bit_of_a_sealed_record_can_turn_over_unseen(tmp_path: Path) -> None:
    path = tmp_path / "commit-00000.json"
    seal(path, record())
    assert sealed(path, CommitRecord) == record()
    good = path.read_bytes()
    for place in range(len(good)):
        path.write_bytes(bytes([*good[:place], good[place] ^ (1 << place % 8), *good[place + 1 :]]))
        found = sealed(path, CommitRecord)
        # white space between words may become other white space, and says the same
        assert found is None or (found == record() and chr(good[place]) in " \n")
    path.unlink()
    assert sealed(path, CommitRecord) is None


def test_a_record_of_another_kind_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    for text in ("", "{}", "[]", '{"sha256": 1, "value": {}}', '{"sha256": "x", "value": {"step": 1}}'):
        path.write_text(text)
        assert sealed(path, CommitRecord) is None
    assert unchanged(path, record())
    assert unchanged(path, record())
    assert not unchanged(path, record(1))


def test_a_folder_that_no_run_left_is_kept(tmp_path: Path) -> None:
    """Whatever has the name that a run gives to its data; what a run left of its own is cleared away."""
    journal = Journal(tmp_path / "out")
    journal.partial.mkdir()
    mine = journal.partial / "thesis.txt"
    mine.write_text("all of it")
    for _ in range(2):
        with pytest.raises(InputError, match=r"out\.partial is not of an unfinished run"), journal.locked():
            pytest.fail("it goes on")
        assert mine.read_text() == "all of it"
        assert not journal.state.exists()
    journal.state.mkdir()
    with journal.locked():
        journal.begin(ASKED)
    assert not journal.partial.exists()


def test_force_replaces_only_what_we_wrote(tmp_path: Path) -> None:
    """`-o . --force` in a home folder must not delete what is in it."""
    written = {output.RECORD_NAME, prune.RECORD_NAME, tie.TYING_NAME, export.RECORD_NAME, rewrite.RECORD_NAME}
    for name in written:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("{}")
        check_output(tmp_path / name, tmp_path / "model", force=True)
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty", tmp_path / "model", force=True)
    check_output(tmp_path / "absent", tmp_path / "model", force=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for strange in (tmp_path / "home", tmp_path / "home" / "letters.txt", tmp_path / "link"):
        for force in (False, True):
            with pytest.raises(InputError, match="already exists") as refusal:
                check_output(strange, tmp_path / "model", force)
            assert "only what llmcompress wrote" in refusal.value.hint


def test_force_does_not_delete_what_others_put_into_an_output(tmp_path: Path) -> None:
    out, model = tmp_path / "out", tmp_path / "model"
    (out / "adapter").mkdir(parents=True)
    listed = [{"name": "config.json"}, {"name": "adapter/adapter_config.json"}]
    (out / output.RECORD_NAME).write_text(json.dumps({"files": listed}))
    for name in ("config.json", "adapter/adapter_config.json", "report.html", "report.json"):
        (out / name).write_text("{}")
    check_output(out, model, force=True)
    for name, folder in (("notes.txt", False), (".git", True), ("scores", True)):
        (out / name).mkdir() if folder else (out / name).write_text("mine")
        with pytest.raises(InputError, match=name):
            check_output(out, model, force=True)
        (tmp_path / "link").symlink_to(out)
        check_output(tmp_path / "link", model, force=True)  # only the link goes
        (tmp_path / "link").unlink()
        (out / name).rmdir() if folder else (out / name).unlink()
    (out / output.RECORD_NAME).write_text("{}")  # lists nothing
    (out / "notes.txt").write_text("mine")
    check_output(out, model, force=True)
    (out / ".git").mkdir()
    with pytest.raises(InputError, match=r"\.git/"):
        check_output(out, model, force=True)


def test_what_has_no_request_on_record_is_discarded(tmp_path: Path) -> None:
    """As where `--restart` was killed half-way: a plan of another recipe may not be gone on with."""
    journal = Journal(tmp_path / "out")
    with journal.locked():
        journal.record_request(ASKED, {})
        (journal.state / "plan.json").write_text("of another recipe")
        journal.prepare()
        journal.run_file.unlink()
        assert journal.begin(ASKED) is False
        assert not (journal.state / "plan.json").exists()
        assert not journal.partial.exists()
        journal.record_request(ASKED, {})
        assert journal.begin(ASKED) is True
        with pytest.raises(InputError, match="recipe"):
            journal.begin(ASKED | {"recipe": "c"})


def test_discarding_begins_with_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "out")
    with journal.locked():
        journal.record_request(ASKED, {})
        journal.prepare()

        def killed(*_: object, **__: object) -> None:
            raise Stopped(15)

        monkeypatch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Stopped):
            journal.discard()
        monkeypatch.undo()
        assert not journal.run_file.exists()


def test_a_damaged_request_is_refused_with_the_way_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out")
    with journal.locked():
        for text in ("{", "[]", '{"request": 1, "environment": {}}'):
            journal.run_file.write_text(text)
            with pytest.raises(InputError, match="damaged") as caught:
                journal.begin(ASKED)
            assert "--restart" in caught.value.hint


def fails(journal: Journal) -> None:
    with journal.locked():
        journal.prepare()
        raise InputError("refused", "")


def finishes(journal: Journal) -> None:
    with journal.locked():
        journal.record_request(ASKED, {})
        journal.prepare()
        journal.publish(force=False)


def refused_at_once(journal: Journal) -> None:
    """A run was killed after it had published and before its state was gone."""
    journal.output.mkdir()
    journal.state.mkdir()
    (journal.state / "lock").touch()
    check_output(journal.output, journal.output.with_name("model"), False)


@pytest.mark.parametrize("end", [fails, finishes, refused_at_once])
def test_nothing_is_left_of_a_run_that_has_nothing_to_go_on_with(
    end: Callable[[Journal], None], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "out")
    with contextlib.suppress(InputError):
        end(journal)
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


def test_state_of_a_run_at_work_is_not_swept(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path / "out"), Journal(tmp_path / "out")
    with journal.locked():
        other.sweep()
        assert journal.state.is_dir()
        with pytest.raises(BusyError), other.locked():
            pass
        assert (journal.state / "lock").exists()


def test_a_checkpoint_of_the_run_is_made_once_and_again_where_it_is_damaged(tmp_path: Path) -> None:
    journal, made = Journal(tmp_path / "out"), []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    journal.state.mkdir()
    assert once(ALONE, journal, "rewritten", make) == (journal.state / "rewritten", False)
    assert once(ALONE, journal, "rewritten", make) == (journal.state / "rewritten", True)
    (journal.state / "rewritten" / "config.json").write_text("{ }")
    assert once(ALONE, journal, "rewritten", make)[1] is False
    (journal.state / "made-rewritten.json").unlink()
    assert once(ALONE, journal, "rewritten", make)[1] is False
    assert len(made) == 3


def test_what_dead_processes_left_beside_a_file_goes_and_that_of_living_ones_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = tmp_path / "report.json"
    names = {f"report.json.tmp-{dead.pid}": False, f"report.json.tmp-{os.getpid()}": False}
    names |= {f"report.json.tmp-{os.getppid()}": True, f"other.tmp-{dead.pid}": True, "report.json.tmp-x": True}
    for name in names:
        (tmp_path / name).write_text("half")
    commit_bytes(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_nothing_is_left_where_a_signal_arrives_while_a_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arrives(_: int) -> None:
        raise Stopped(15)

    monkeypatch.setattr(os, "fsync", arrives)
    with pytest.raises(Stopped):
        commit_bytes(tmp_path / "x", b"one", b"two")
    assert not list(tmp_path.iterdir())


def test_a_signal_is_no_exception() -> None:
    """Libraries catch those around imports and callbacks, and would go on."""
    assert not issubclass(Stopped, Exception)
