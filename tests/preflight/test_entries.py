"""Every way into the program that reads a checkpoint refuses the same ones, and before PyTorch is there."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attacks
import pytest
from click.testing import CliRunner

import llmcompress
from llmcompress import preflight
from llmcompress.cli import cli
from llmcompress.compress import pipeline
from llmcompress.compress.heal.run import heal
from llmcompress.compress.prune.run import PruneRequest, prune
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.compress.verify import verify
from llmcompress.errors import InputError
from llmcompress.eval.loading import opened
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.hub.source import Source
from llmcompress.model import integrity
from llmcompress.model.integrity import scan_small
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import TextRequest
from llmcompress.preflight import check_source
from llmcompress.recipes import load_recipe
from llmcompress.runtime.adapter import reader_of

RECIPE = load_recipe("fast")
TEXT = TextRequest("builtin", 2, 8, 0, "evaluation")


def source(folder: Path) -> Source:
    return Source(folder, folder.name)


def quantizing(folder: Path) -> object:
    from llmcompress.compress.allocate.budget import parse_budget

    output = folder.parent / "out"
    return list(quantize(QuantizeRequest(source(folder), output, RECIPE, parse_budget("4bits"), "cpu", "")))


def healing(folder: Path) -> object:
    from llmcompress.compress.heal.lora import LoraOptions
    from llmcompress.compress.heal.places import Places
    from llmcompress.compress.heal.request import HealRequest
    from llmcompress.compress.heal.training import Schedule

    return list(
        heal(
            HealRequest(
                source=source(folder), against=source(folder), output=folder.parent / "out", text=TEXT, device="cpu",
                command="", method="norms", places=Places("all", None), lora=LoraOptions(2, 4.0),
                schedule=Schedule(), held_out=2, force=False, restart=False,
            )
        )
    )  # fmt: skip


PLAIN: dict[str, Callable[[Path], object]] = {
    "quantize": quantizing,
    "score": lambda f: pipeline.score_file(source(f), RECIPE, "cpu"),
    "plan": lambda f: pipeline.open_model(source(f), RECIPE, "cpu"),
    "rewrite": lambda f: pipeline.rewrite_model(source(f), RECIPE, f.parent / "out", device="cpu"),
    "prune": lambda f: list(prune(PruneRequest(source(f), None, RECIPE, "cpu", ""))),
}
PACKED: dict[str, Callable[[Path], object]] = {
    "eval": lambda f: run_eval(EvalRequest(source(f), source(f), TEXT, 1, "cpu", "")),
    "heal": healing,
    "verify": lambda f: list(verify(f)),
    "load": llmcompress.load,
    "load dense": lambda f: llmcompress.load(f, dense=True),
    "sampling, speed and tasks": lambda f: opened(f, "cpu"),
}


def refusal(call: Callable[[Path], object], folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        call(folder)
    return caught.value.what


@pytest.mark.parametrize("fault", attacks.FAULTS)
def test_all_ways_in_refuse_alike(fault: str, tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    made = attacks.FAULTS[fault]
    made.damage(folder)
    calls = PLAIN if made.plain else PLAIN | PACKED
    found = {name: refusal(call, folder) for name, call in calls.items()}
    assert {name for name, what in found.items() if made.word not in what} == set()
    assert len(set(found.values())) == 1 or "quantized" in fault
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("outside")) == ["model"]


@pytest.mark.parametrize("fault", attacks.WEIGHTS)
def test_nan_is_never_read(fault: str, tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    attacks.WEIGHTS[fault].damage(folder)
    for decode in (None, reader_of(folder)):
        with pytest.raises(InputError, match=attacks.WEIGHTS[fault].word):
            Skeleton.open(folder, decode=decode).load_rest()


@pytest.mark.parametrize("fault", attacks.MISFITS)
def test_what_does_not_fit_the_models_class_is_found_before_any_work(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the class alone, as of families whose tensors are not known from headers."""
    monkeypatch.setattr(preflight, "check_fit", lambda config, tensors: iter(()))
    folder = attacks.good(tmp_path / "model")
    Skeleton.open(folder)
    made = attacks.MISFITS[fault]
    made.damage(folder)
    for decode in (None, reader_of(folder)):
        with pytest.raises(InputError, match=made.word):
            Skeleton.open(folder, decode=decode)


COMMANDS: dict[str, list[str]] = {
    "quantize": ["quantize", "model", "--budget", "4bits", "-o", "out"],
    "quantize --dry-run": ["quantize", "model", "--budget", "4bits", "--dry-run"],
    "score": ["score", "model"],
    "plan": ["plan", "model", "--budget", "4bits"],
    "rewrite": ["rewrite", "model", "--smooth", "-o", "out"],
    "prune": ["prune", "model"],
    "heal": ["heal", "model", "--against", "model"],
    "eval": ["eval", "model", "--ref", "model"],
    "verify": ["verify", "model"],
    "inspect": ["inspect", "model"],
    "bench": ["bench", "model"],
    "tune": ["tune", "model"],
}


READING = [name for name in COMMANDS if name.split()[0] not in ("verify", "inspect", "bench", "tune")]


def without_pytorch(words: list[list[str]], folder: Path) -> subprocess.CompletedProcess[str]:
    """Several commands, one after another; with an import of either library every one of them would end with 3."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'accelerate', 'safetensors'): sys.modules[name] = None\n"
        "from llmcompress.cli import main\n"
        f"for words in {words!r}:\n"
        "    try: main(words)\n"
        "    except SystemExit as end: print(end.code)\n"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


def test_weights_of_small_models_are_scanned_before_pytorch_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = attacks.good(tmp_path / "model")
    attacks.WEIGHTS["NaN"].damage(folder)
    found = without_pytorch([COMMANDS[name] for name in READING], tmp_path)
    assert found.stdout.split() == ["2"] * len(READING), found.stderr
    assert found.stderr.count("has NaN or infinity at index 26") == len(READING)
    files = check_source(folder)
    with pytest.raises(InputError, match="index 26"):
        scan_small(files)
    monkeypatch.setattr(integrity, "SMALL_BYTES", sum(entry.stop - entry.start for entry in files.tensors.values()) - 1)
    scan_small(files)


def test_commands_refuse_before_pytorch_is_imported(tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    attacks.config(folder, hidden_size=-1, auto_map={})
    found = without_pytorch(list(COMMANDS.values()), tmp_path)
    assert found.stdout.split() == ["2"] * len(COMMANDS), found.stderr
    lines = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 2 * len(COMMANDS)
    assert sum("hidden_size" in line for line in lines) == sum("auto_map" in line for line in lines) == len(COMMANDS)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_in_this_process(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks.INDICES["traversal"].damage(attacks.good(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    found: Any = CliRunner().invoke(cli, COMMANDS[command])
    assert isinstance(found.exception, InputError), found.exception
    assert attacks.HEAD in found.exception.what
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_template_is_copied_and_not_rendered(tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(attacks.HOSTILE)
    recipe = RECIPE.model_copy(update={"plan": RECIPE.plan.model_copy(update={"bits": (4,), "group_size": 8})})
    from llmcompress.compress.allocate.budget import parse_budget

    request = QuantizeRequest(source(folder), tmp_path / "out", recipe, parse_budget("16bits"), "cpu", "")
    list(quantize(request))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == attacks.HOSTILE
