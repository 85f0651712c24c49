"""What reaches a terminal or a log of a CI job is text, whatever it came from; what is not installed is said."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from llmcompress.cli import say
from llmcompress.errors import Finding, InputError, Refused, one_line
from llmcompress.hub.source import Source

DEMO = str(Path(say.__file__).parents[1] / "demo")
NASTY = [
    "ends with \\",
    "a\\\\",
    "[red]x[/y]",
    "\\[b]",
    ":smile:",
    "a\x1b[31mb",
    "x\n::error::y",
    "\u202egpj.exe",
    "\ud800",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_text_is_shown_as_it_is_but_for_what_is_dangerous(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    speaker = say.Speaker(json=False, quiet=False, verbose=False)
    speaker.talk(text)
    speaker.result(None, [text])
    speaker.table(text, [text], [[text]])
    found = capsys.readouterr()
    assert found.err == one_line(text) + "\n"
    assert [line.rstrip() for line in found.out.splitlines()] == [one_line(text)] * 2 + [one_line(text)] * 2


@given(st.text(st.characters(exclude_categories=())))
def test_one_line_is_one_line_that_can_be_printed(text: str) -> None:
    found = one_line(text)
    assert len(found.splitlines()) <= 1
    found.encode()
    assert len(found) == len(text)
    assert "\x1b" not in found
    assert one_line(found) == found
    if text.isprintable():
        assert found == text == Text(found).plain


def test_an_error_cannot_start_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    say.tell_error(InputError("bad \n::error::name", "try\r\nthat"))
    assert capsys.readouterr().err == "error: bad ?::error::name\n  hint: try??that\n"


def test_every_finding_has_a_line_and_a_hint_where_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    error = Refused([Finding("a", "one"), Finding("b\n", "one"), Finding("c", "two"), Finding("a", "one")])
    say.tell_error(error)
    assert capsys.readouterr().err == "error: a\nerror: b?\n  hint: one\nerror: c\n  hint: two\n"
    assert (str(error), error.what, error.hint) == ("a\nb?\nc", "a\nb?\nc", "one; two")
    assert error.exit_code == 2


@pytest.mark.parametrize(("hints", "shown"), [(1, 4), (1000, 2), (2, 2)])
def test_a_thousand_findings_are_cut_short(hints: int, shown: int, capsys: pytest.CaptureFixture[str]) -> None:
    say.tell_error(Refused([Finding(str(place), f"h{place % hints}") for place in range(1000)]))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= say.MOST_LINES
    assert [line for line in lines if line[-1].isdigit() and line.startswith("error")] == [
        f"error: {n}" for n in range(shown)
    ]
    assert lines[-1] == f"error: and {1000 - shown} more; --log-file has all of them"


def test_six_lines_are_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    say.tell_error(Refused([Finding(str(place), "h") for place in range(say.MOST_LINES - 1)]))
    assert "more" not in capsys.readouterr().err


def test_a_command_on_record_is_what_a_shell_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = ["quantize", "a model", "--budget", "kld<=0.05", "--set=plan.bits=[2, 3]", "-o", "$HOME's", "--nproc", "2"]
    monkeypatch.setattr("sys.argv", ["llmcompress", *words])
    assert shlex.split(say.command_line()) == ["llmcompress", *words[:-2]]
    monkeypatch.chdir(tmp_path)
    source = Source(tmp_path / "größe *", "größe *")
    assert shlex.split(say.typed(source)) == ["größe *"]


@pytest.mark.parametrize("words", [["verify", DEMO], ["quantize", "demo", "--budget", "4bits"], ["bench"]])
def test_without_torch_the_user_is_told_what_to_install(words: list[str]) -> None:
    code = f"import sys; sys.modules['torch'] = None\nfrom llmcompress.cli import main\nmain({words!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 3, found.stderr
    assert found.stderr == "error: PyTorch is not installed\n  hint: pip install torch\n"
