"""Terminals, disks, users and numbers that are not as usual: what is said, and how it ends."""

import io
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llmcompress.cli.options import evaluation_folder
from llmcompress.cli.say import Speaker, json_of, path_word
from llmcompress.cli.streams import Outliving
from llmcompress.compress.journal import Journal
from llmcompress.errors import InputError
from llmcompress.files import LARGEST_NUMBER, cache_folder
from llmcompress.hub.source import Source
from llmcompress.recipes import load_recipe
from tests.conftest import SMALL, program

Run = Callable[..., subprocess.CompletedProcess[str]]
FULL = Path("/dev/full")
BEYOND = str(LARGEST_NUMBER + 1)


def stream(coding: str) -> tuple[io.BytesIO, io.TextIOWrapper]:
    raw = io.BytesIO()
    return raw, io.TextIOWrapper(raw, coding, errors="strict")


@pytest.mark.parametrize("coding", ["ascii", "latin-1", "koi8-r"])
def test_letters_that_a_terminal_lacks_end_nothing_and_json_stays_json(
    coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, wrapped = stream(coding)
    out = Outliving(wrapped)
    out.write("größe 模型 ± µs")
    out.flush()
    assert raw.getvalue().decode(coding).endswith("s")
    raw, wrapped = stream(coding)
    monkeypatch.setattr(sys, "stdout", wrapped)
    said = {"größe": ["模型", "🙂", "a\\u0041"]}
    wrapped.write(json_of(said))
    wrapped.flush()
    assert json.loads(raw.getvalue()) == said


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_disk_behind_stderr_changes_no_exit_code(tmp_path: Path) -> None:
    with FULL.open("w") as full:
        for words, out, code in ((["gate", "nowhere"], subprocess.PIPE, 2), (["list", "recipes"], full, 3)):
            done = subprocess.run(program(*words), stderr=full, stdout=out, cwd=tmp_path, check=False)
            assert done.returncode == code


@pytest.mark.parametrize("columns", ["0", "20"])
def test_nothing_of_a_table_is_cut(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    speaker = Speaker(json=False, quiet=False, verbose=False)
    speaker.table("title", ["name", "number"], [["a long name of a linear", "123,456,789"]])
    speaker.result(None, ["a line that is longer than a narrow terminal is"])
    found = capsys.readouterr().out
    assert "a long name of a linear  123,456,789" in found
    assert "a line that is longer than a narrow terminal is" in found


def test_a_user_without_a_home_has_no_cache_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder("native") == tmp_path / ".cache" / "llmcompress" / "native"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user whom the system does not know
    with pytest.raises(FileNotFoundError):
        cache_folder()
    code = (
        "import os.path; os.path.expanduser = lambda path: path\n"
        "from llmcompress.kernels.compiled import library; found, why = library(); assert found is None; print(why)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "FileNotFoundError" in done.stdout) == (0, True), done.stderr


def test_a_proposed_path_is_a_path_and_no_option() -> None:
    for name in ("-out", "--force", "a b", "plain"):
        (word,) = shlex.split(path_word(Path(name)))
        assert not word.startswith("-")
        assert Path(word) == Path(name)


def test_a_link_that_is_replaced_leaves_nothing_and_what_it_led_to_stays(llama: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "latest").symlink_to("real")
    words = ["quantize", llama, "--budget", "3.5bits", "--recipe", "fast", *SMALL, "--force", "-q", "-o"]
    for _ in range(2):
        assert run(*words, "latest").returncode == 0
        assert {path.name for path in tmp_path.iterdir()} == {"real", "latest"}
    assert not (tmp_path / "latest").is_symlink()
    (tmp_path / "kept").symlink_to("latest")
    assert run(*words, "kept").returncode == 0
    assert (tmp_path / "latest" / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"real", "latest", "kept"}


def test_a_link_in_the_place_of_data_is_dropped_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("mine")
    journal = Journal(tmp_path / "out")
    journal.state.mkdir()
    journal.partial.symlink_to("real")
    journal.discard()
    assert not journal.partial.is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "mine"


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_a_wrong_word_is_no_bug_however_much_is_told(value: str, shown: bool, run: Run) -> None:
    done = run("inspect", "nowhere", env={"LLMCOMPRESS_DEBUG": value})
    assert (done.returncode, "bug" in done.stderr, "Traceback" in done.stderr) == (2, False, shown)


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_too_long_is_the_users(length: int, llama: Path, run: Run, tmp_path: Path) -> None:
    done = run("quantize", llama, "--budget", "3.5bits", "-o", "a" * length)
    assert (done.returncode, "too long" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "demo", "--ref", "demo", "--batch-size", BEYOND],
        ["heal", "demo", "--against", "demo", "--seed", BEYOND],
        ["quantize", "demo", "--budget", "3bits", "--seed", BEYOND],
        ["bench", "--tokens", BEYOND],
        ["prune", "demo", "--beam", BEYOND],
        ["gate", "report.json", "--ref", "demo", "--samples", BEYOND],
    ],
    ids=lambda words: words[0],
)
def test_numbers_beyond_counting_are_refused(words: list[str], run: Run) -> None:
    done = run(*words)
    assert (done.returncode, f"more than {LARGEST_NUMBER}" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("key", ["seed", "calibration.batch_size", "plan.pin.q_proj", "rewrite.rotate.seed"])
def test_numbers_beyond_counting_are_refused_in_recipes(key: str) -> None:
    with pytest.raises(InputError, match=f"{key}: more than"):
        load_recipe("balanced", (f"{key}={BEYOND}",))
    with pytest.raises(InputError, match=r"plan\.bits\.1: more than"):
        load_recipe("balanced", (f"plan.bits=[2, -{BEYOND}]",))
    assert load_recipe("balanced", (f"seed={LARGEST_NUMBER}",)).seed == LARGEST_NUMBER


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", ","], "--tasks names no task"),
        (["--tasks", ""], "--tasks names no task"),
        (["--task-limit", "3"], "--task-limit says nothing without --tasks"),
        (["--void-alpha", "0.8"], "--void-alpha says nothing without --skip-voids"),
    ],
)
def test_eval_refuses_options_that_nothing_reads(words: list[str], said: str, run: Run, tmp_path: Path) -> None:
    done = run("eval", "demo", "--ref", "demo", *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--period", "20"], "--period says nothing without --lisa"),
        (["--method", "norms", "--alpha", "3"], "--alpha is of adapters"),
        (["--method", "norms", "--rank", "32"], "--rank is of adapters"),
    ],
)
def test_heal_refuses_options_that_nothing_reads(words: list[str], said: str, run: Run, tmp_path: Path) -> None:
    done = run("heal", "demo", "--against", "demo", *words)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_evaluation_goes_where_it_is_looked_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there" / "out").mkdir(parents=True)
    (tmp_path / "here" / "latest").symlink_to("../there/out")
    monkeypatch.chdir(tmp_path / "here")
    for word in ("latest", "../there/out"):
        folder = Path(os.path.abspath(word))
        assert evaluation_folder(Source(folder, folder.name)) == Path("../there/out-eval")
    assert evaluation_folder(Source(llama, "org/name@v1", "org/name", "1" * 40)) == Path("name-v1-eval")
    assert evaluation_folder(Source(llama, "demo")) == Path("demo-eval")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert evaluation_folder(Source(llama, "llama")) == Path("llama-eval")


def test_too_little_text_is_answered_in_the_words_of_the_command(llama: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("too short for this, but not by much\n" * 20)
    for words in (
        ["heal", llama, "--against", llama, "--calibration", "text.txt"],
        ["eval", llama, "--ref", llama, "--data", "text.txt"],
    ):
        done = run(*words)
        assert (done.returncode, "--samples 11 --sequence-length 64" in done.stderr) == (2, True), done.stderr
    done = run("quantize", llama, "--budget", "3bits", "--calibration", "text.txt")
    assert "--set calibration.samples=11 --set calibration.sequence_length=64" in done.stderr
