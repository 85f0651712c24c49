"""Numbers of a run go to the library that was named; what fails there does not reach the run."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import TEXT

from llmcompress.cli import cli, trackers
from llmcompress.cli.say import Speaker
from llmcompress.errors import MachineError

FAST = ["quantize", "model", "--recipe", "fast", "--budget", "4.5bits", "-o", "out"]
Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


class Standin(ModuleType):
    """A module whose every function notes its call; `fail` raises what a library of its own would."""

    def __init__(self, name: str, fail: str = "") -> None:
        super().__init__(name)
        self.calls: Calls = []
        self._fail = fail

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*given: Any, **more: Any) -> Any:
            sys.stdout.write("chatter\n")
            assert not sys.stdin.isatty()
            if name == self._fail:
                raise LookupError("the server is down\nand more")
            self.calls.append((name, given, more))
            return SimpleNamespace(log=self.log, finish=self.finish)

        return call

    def named(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(given, more) for found, given, more in self.calls if found == name]


@pytest.fixture
def folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").symlink_to(llama)
    (tmp_path / "text.txt").write_text(TEXT * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def standin(monkeypatch: pytest.MonkeyPatch, name: str, fail: str = "") -> Standin:
    found = Standin(name, fail)
    monkeypatch.setitem(sys.modules, name, found)
    return found


LOGS = {"wandb": "log", "trackio": "log", "mlflow": "log_metrics"}


@pytest.mark.parametrize("library", LOGS)
def test_a_run_is_logged_block_by_block(library: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = standin(monkeypatch, library)
    found = CliRunner().invoke(cli, [*FAST, "--log-to", f"{library}:mine", "--json"], catch_exceptions=False)
    assert found.exit_code == 0
    assert found.stdout.startswith("{")
    assert "chatter" not in found.stdout
    first, *rest = module.calls
    assert "mine" in (*first[1], *first[2].values())
    logged = module.named(LOGS[library])
    assert [more["step"] for _, more in logged] == [0, 1, 2, None]
    assert [given[0]["progress"] for given, _ in logged[:3]] == pytest.approx([1 / 3, 2 / 3, 1])
    assert all(given[0]["block_seconds"] > 0 and given[0]["peak_memory_bytes"] > 1 << 20 for given, _ in logged[:3])
    assert logged[-1][0][0]["bits_per_weight"] <= 4.5
    assert rest[-1][0] == {"wandb": "finish", "trackio": "finish", "mlflow": "end_run"}[library]


@pytest.mark.parametrize("fail", ["init", "log", "finish"])
def test_a_library_that_fails_is_a_warning(fail: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    standin(monkeypatch, "wandb", fail)
    found = CliRunner().invoke(cli, [*FAST, "--log-to", "wandb"], catch_exceptions=False)
    assert found.exit_code == 0
    assert found.stderr.count("warning: --log-to wandb: the server is down; the run goes on") == 1
    assert (folder / "out" / "config.json").is_file()


def test_a_run_that_fails_is_said_to_have_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = standin(monkeypatch, "mlflow")
    (folder / "out").mkdir()
    assert CliRunner().invoke(cli, [*FAST, "--log-to", "mlflow"]).exit_code
    assert module.named("end_run") == [(("FAILED",), {})]


def test_an_evaluation_is_logged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = standin(monkeypatch, "wandb")
    words = ["eval", "model", "--ref", "model", "--samples", "4", "--sequence-length", "16", "--data", "text.txt"]
    found = CliRunner().invoke(cli, [*words, "-o", "eval", "--log-to", "wandb"], catch_exceptions=False)
    assert found.exit_code == 0
    *blocks, (end, _) = module.named("log")
    assert len(blocks) == 3
    assert end[0]["kld"] == pytest.approx(0, abs=1e-6)
    assert end[0]["perplexity_ratio"] == pytest.approx(1)
    assert "bits_per_weight" not in end[0]  # nothing is packed, so there is none


def test_a_library_that_is_missing_or_unknown_is_said_before_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    found = CliRunner().invoke(cli, [*FAST, "--log-to", "trackio"])
    assert "llmcompress[trackio]" in found.exception.hint  # type: ignore[union-attr]
    found = CliRunner().invoke(cli, [*FAST, "--log-to", "tensorboard"])
    assert "wandb, mlflow, trackio" in found.exception.hint  # type: ignore[union-attr]
    assert sorted(path.name for path in folder.iterdir()) == ["model", "text.txt"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"wandb.py": "from os import nothing_of_this_name"}, "nothing_of_this_name"),
        ({"wandb.py": "raise RuntimeError('built for another numpy\\nsee there')"}, "built for another numpy"),
        ({"wandb.py": "import nothing_of_this_name"}, "nothing_of_this_name"),
        ({"wandb/run-1/log": "a folder that it wrote to before"}, "not installed"),
    ],
    ids=["broken", "raises", "half", "folder"],
)
def test_a_library_that_is_half_installed_is_said_before_work(
    files: dict[str, str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MachineError, match=said) as found:
        trackers.Tracker("wandb", Speaker(json=False, quiet=True, verbose=False))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    assert "\n" not in found.value.what
    assert found.value.hint


def test_signals_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    module = standin(monkeypatch, "wandb")
    module.log = lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    speaker = Speaker(json=False, quiet=True, verbose=False)
    tracker = trackers.Tracker("wandb", speaker)
    tracker.start("run", {})
    with pytest.raises(KeyboardInterrupt):
        tracker.log({"a": 1.0})
