"""Manners of the real program: exit codes, one JSON document, short errors, nothing written on bad input."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from conftest import llama_config, save_model
from safetensors.numpy import load_file, save_file

Run = Callable[..., subprocess.CompletedProcess[str]]
QUANTIZE = ("quantize", "--budget", "4bits", "-o", "out", "--recipe", "fast")


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy to damage, away from where the program runs."""
    folder = tmp_path / "elsewhere" / "model"
    shutil.copytree(llama, folder)
    return folder


def refused(found: subprocess.CompletedProcess[str], word: str, folder: Path) -> None:
    assert found.returncode == 2, found.stderr
    assert found.stdout == ""
    errors = found.stderr[found.stderr.index("error:") :].strip().splitlines()
    assert len(errors) <= 6
    assert word in " ".join(errors)
    assert "hint:" in found.stderr
    assert "Traceback" not in found.stderr
    left = [p.name for p in folder.iterdir() if p.name not in ("elsewhere",)]
    assert left == []


def damage_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def poison(folder: Path) -> None:
    path = first_shard(folder)
    tensors = load_file(path)
    next(iter(tensors.values())).flat[1] = numpy.nan
    save_file(tensors, path)


def lying_index(folder: Path, target: str | None = None) -> None:
    path = folder / "model.safetensors.index.json"
    document = json.loads(path.read_text())
    tensor, shard = next(iter(document["weight_map"].items()))
    others = sorted(p.name for p in folder.glob("*.safetensors") if p.name != shard)
    document["weight_map"][tensor] = target or others[0]
    path.write_text(json.dumps(document))


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-9]), "bytes"),
    "missing shard": (lambda f: first_shard(f).unlink(), "model-00001"),
    "traversal": (lambda f: lying_index(f, "../../outside.safetensors"), "index"),
    "lying index": (lying_index, "index"),
    "pickle only": (only_pickles, "pickled"),
    "auto_map": (lambda f: damage_config(f, auto_map={"AutoModelForCausalLM": "x.Y"}), "auto_map"),
    "not causal": (lambda f: damage_config(f, architectures=["BertModel"]), "causal"),
    "unknown type": (lambda f: damage_config(f, model_type="lllama"), "llama"),
    "already quantized": (lambda f: damage_config(f, quantization_config={"quant_method": "awq"}), "awq"),
    "NaN": (poison, "NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_models_are_refused(fault: str, model: Path, run: Run, tmp_path: Path) -> None:
    damage, word = FAULTS[fault]
    damage(model)
    refused(run(*QUANTIZE, model), word, tmp_path)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--budget", "fish"), "fish"),
        (("--budget", "1.1bits"), "smallest possible"),
        (("--budget", "10kB"), "smallest possible"),
        (("--recipe", "fasst"), "fast"),
        (("--set", "plan.bitz=[2]"), "plan.bits"),
        (("--set", "plan.bits=[1]"), "widths"),
        (("--set", "nonsense"), "key=value"),
        (("--recipe", "balanced", "--calibration", "none.txt"), "none.txt"),
        (("--device", "cuda:7"), "--device"),
        (("--set", "quantizer=gptqq"), "gptq"),
        (("--set", "scorer=fishr"), "fisher"),
    ],
)
def test_bad_flags_are_refused(words: tuple[str, ...], expected: str, llama: Path, run: Run, tmp_path: Path) -> None:
    refused(run(*QUANTIZE, llama, *words), expected, tmp_path)


def test_short_calibration_says_how_much_is_missing(llama: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "short.txt").write_text("too short")
    found = run("quantize", llama, "--budget", "4bits", "-o", "out", "--calibration", "elsewhere/short.txt")
    refused(found, "are needed", tmp_path)


def test_unknown_models_get_the_nearest_names(run: Run, tmp_path: Path) -> None:
    refused(run(*QUANTIZE, "lama-7b"), "llama-7b", tmp_path)
    refused(run(*QUANTIZE, "./nowhere"), "nowhere", tmp_path)


def test_outputs_that_would_hurt_the_input_are_refused(model: Path, run: Run) -> None:
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    for output in (model, model / "out", model.parent):
        found = run("quantize", model, "--budget", "4bits", "-o", output, "--recipe", "fast", "--force")
        assert found.returncode == 2
        assert "error: " in found.stderr
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before


def test_an_output_without_a_parent_is_refused(llama: Path, run: Run) -> None:
    found = run("quantize", llama, "--budget", "4bits", "-o", "no/such/out", "--recipe", "fast")
    assert found.returncode == 2
    assert "folder" in found.stderr


def test_a_folder_that_cannot_be_written_is_the_machines_fault(llama: Path, run: Run) -> None:
    found = run("quantize", llama, "--budget", "4bits", "-o", "/proc/out", "--recipe", "fast")
    assert found.returncode == 3
    assert "Traceback" not in found.stderr


def test_json_is_one_document_and_quiet_is_quiet(llama: Path, run: Run, tmp_path: Path) -> None:
    found = run(*QUANTIZE, llama, "--json", "-q")
    assert found.returncode == 0
    assert found.stderr == ""
    answer = json.loads(found.stdout)
    assert answer["bits_per_weight"] <= 4
    assert all(check["passed"] for check in answer["checks"])
    looked = json.loads(run("inspect", "out", "--json").stdout)
    assert looked["bits_per_weight"] == pytest.approx(answer["bits_per_weight"])
    assert looked["shard_bytes"] == answer["shard_bytes"]


def test_scores_can_be_planned_without_the_model(llama: Path, run: Run, tmp_path: Path) -> None:
    scored = run("score", llama, "--recipe", "fast", "-o", "scores.json", "--json")
    assert scored.returncode == 0, scored.stderr
    assert len(json.loads(scored.stdout)["scores"]) == 1
    found = run("plan", "scores.json", "--budget", "3.7bits", "-o", "plan.json", "--frontier")
    assert found.returncode == 0, found.stderr
    assert "q_proj+k_proj+v_proj" in found.stdout
    assert "frontier" in found.stdout
    from_scores = json.loads((tmp_path / "plan.json").read_text())
    direct = json.loads(run("plan", llama, "--recipe", "fast", "--budget", "3.7bits", "--json").stdout)["allocation"]
    assert from_scores["assigned"] == direct["assigned"]
    assert from_scores["storage_bits"] == direct["storage_bits"]
    assert abs(from_scores["file_bytes"] - direct["file_bytes"]) < 200
    made = json.loads(run(*QUANTIZE[:1], llama, *QUANTIZE[3:], "--budget", "3.7bits", "--json").stdout)
    assert made["bits_per_weight"] == from_scores["bits_per_weight"]
    assert abs(made["shard_bytes"] - from_scores["file_bytes"]) < 200


def test_a_plan_is_not_written_over_its_scores(run: Run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    assert run("score", llama, "--recipe", "fast", "-o", "elsewhere/scores.json", "-q").returncode == 0
    before = (tmp_path / "elsewhere" / "scores.json").read_bytes()
    scores = "elsewhere/scores.json"
    refused(run("plan", scores, "--budget", "4bits", "-o", scores), "is read here", tmp_path)
    words = ["plan", llama, "--recipe", "fast", "--scores", scores, "--budget", "4bits"]
    refused(run(*words, "-o", f"../{tmp_path.name}/{scores}"), "is read here", tmp_path)
    assert (tmp_path / scores).read_bytes() == before


def test_planning_from_a_damaged_file_names_the_place(run: Run, llama: Path, tmp_path: Path) -> None:
    run("score", llama, "--recipe", "fast", "-o", "scores.json")
    document = json.loads((tmp_path / "scores.json").read_text())
    document["scores"][0]["layers"][0]["candidates"][0]["damage"] = -1
    (tmp_path / "scores.json").write_text(json.dumps(document))
    found = run("plan", "scores.json", "--budget", "4bits")
    assert found.returncode == 2
    assert "scores.0.layers.0.candidates.0.damage" in found.stderr


def test_a_plan_of_scores_refuses_what_only_scoring_reads(run: Run, llama: Path) -> None:
    run("score", llama, "--recipe", "fast", "-o", "scores.json")
    for words in (("--seed", "3"), ("--calibration", "builtin")):
        found = run("plan", "scores.json", "--budget", "4bits", *words)
        assert found.returncode == 2
        assert f"error: {words[0]}: nothing is scored" in found.stderr
    found = run("inspect", llama, "--allow-nonfinite")
    assert found.returncode == 2
    assert "No such option" in found.stderr


@pytest.mark.parametrize("what", ["scorers", "quantizers", "recipes", "formats", "models"])
def test_lists_are_not_empty_and_say_what_things_are(what: str, run: Run) -> None:
    found = json.loads(run("list", what, "--json").stdout)
    assert found
    assert all(len(row["about"]) > 3 for row in found)


def test_env_names_versions_and_nobody(run: Run, tmp_path: Path) -> None:
    found = json.loads(run("env", "--json").stdout)
    assert found["torch"].startswith("2.")
    assert str(Path.home()) not in json.dumps(found)


def test_commands_and_options_get_suggestions(run: Run) -> None:
    assert "quantize" in run("quantise").stderr
    assert run("quantise").returncode == 2
    assert "--budget" in run("quantize", "demo", "--bugdet", "4bits").stderr


def test_hostile_names_are_shown_harmless(run: Run, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "[red]x[/y]\x1b[31m", llama_config(num_hidden_layers=2))
    found = run("quantize", folder, "--budget", "4bits", "-o", "out", "--recipe", "fast")
    assert found.returncode == 0, found.stderr
    assert "\x1b" not in found.stdout + found.stderr
    assert "\x1b" not in (tmp_path / "out" / "README.md").read_text()


def test_a_bug_ends_with_5_and_goes_to_the_log(run: Run, tmp_path: Path, llama: Path) -> None:
    code = (
        "import llmcompress.compress.run as run, llmcompress.cli as cli\n"
        "def broken(_):\n    raise ZeroDivisionError\n"
        "run.quantize = broken\n"
        f"cli.main(['quantize', {str(llama)!r}, '--budget', '4bits', '-o', 'out', '--log-file', 'run.log'])\n"
    )
    import sys

    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 5
    assert "bug in llmcompress" in found.stderr
    assert "Traceback" not in found.stderr
    assert "ZeroDivisionError" in (tmp_path / "run.log").read_text()
