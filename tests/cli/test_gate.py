"""The gate as CI meets it: exit codes, the GitHub action's own steps, no torch, and an evaluation of a real model."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from gate_reports import HOSTILE, document, documents
from safetensors.torch import load_file, save_file

import llmcompress
from llmcompress.cli.gate import gate_command
from llmcompress.cli.report import report_command
from llmcompress.errors import CompressError
from llmcompress.files import to_json

ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
NEEDED = ("click", "numpy", "pydantic", "PyYAML", "rich")
ALONE = """
import sys
known = {"llmcompress", "click", "numpy", "pydantic", "pydantic_core", "annotated_types", "typing_extensions",
         "typing_inspection", "yaml", "rich", "markdown_it", "mdurl", "pygments", *sys.stdlib_module_names}
class NothingElse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in known and not name.startswith("_"):
            raise ModuleNotFoundError(f"{name} is not installed", name=name)
sys.meta_path.insert(0, NothingElse())
from llmcompress.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def outside_of_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.startswith("GITHUB_")]:
        monkeypatch.delenv(variable)


def write(path: Path, made: dict[str, Any]) -> Path:
    path.write_text(to_json(made))
    return path


def gate(*words: str | Path) -> Result:
    return CliRunner().invoke(gate_command, [*map(str, words)])


def refusal(*words: str | Path) -> CompressError:
    found = gate(*words)
    assert isinstance(found.exception, CompressError), found.output
    assert found.stdout == ""
    return found.exception


@pytest.mark.parametrize(("kld", "count", "code"), [(0.01, 32, 0), (0.4, 32, 1), (0.046, 10, 4)])
def test_a_reader_that_leaves_changes_no_exit_code(kld: float, count: int, code: int, tmp_path: Path) -> None:
    path = write(tmp_path / "report.json", document(kld, count=count))
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "llmcompress", "gate", str(path)]
    found = subprocess.run(words, stdout=writing, stderr=writing, check=False)
    os.close(writing)
    assert found.returncode == code


@pytest.mark.parametrize(("kld", "count", "code"), [(0.01, 32, 0), (0.4, 32, 1), (0.046, 10, 4)])
def test_exit_codes_and_json(kld: float, count: int, code: int, tmp_path: Path) -> None:
    path = write(tmp_path / "report.json", document(kld, count=count))
    found = gate(path, "--json", "--junit", tmp_path / "gate.xml")
    assert found.exit_code == code
    answer = json.loads(found.stdout)
    assert (answer["exit_code"], answer["verdict"]) == (code, {0: "pass", 1: "fail", 4: "undecided"}[code])
    open_questions = sum(criterion["verdict"] == "undecided" for criterion in answer["criteria"])
    assert (open_questions > 0) == (code == 4)
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("errors") == str(open_questions)
    allowed = gate(tmp_path, "--allow-undecided", "--junit", tmp_path / "gate.xml")
    assert allowed.exit_code == (0 if code == 4 else code)
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("skipped") == str(open_questions)


def test_too_few_samples_say_how_many(tmp_path: Path) -> None:
    path = write(tmp_path / "report.json", document(0.046, count=10))
    found = gate(path)
    assert found.exit_code == 4
    needed = re.search(r"UNDECIDED: about (\d+) sequences are needed", found.stdout)
    assert needed
    enough = write(tmp_path / "enough.json", document(0.046, count=int(needed.group(1))))
    assert gate(enough).exit_code == 0


def test_flags_config_and_suggestions_go_together(tmp_path: Path) -> None:
    path = write(tmp_path / "report.json", document(0.3))
    assert gate(path).exit_code == 1
    suggested = gate(path, "--suggest")
    assert suggested.exit_code == 0
    (tmp_path / "gate.yaml").write_text(suggested.stdout)
    assert gate(path, "--config", tmp_path / "gate.yaml").exit_code == 0
    assert gate(path, "--config", tmp_path / "gate.yaml", "--max-kld", "0.1").exit_code == 1
    assert gate(path, "--config", tmp_path / "gate.yaml", "--expect", "tokens=other").exit_code == 1
    assert "### llmcompress" in gate(path, "--format", "markdown").stdout
    assert gate(path, "--format", "junit").stdout.startswith("<?xml")
    assert yaml.safe_load(suggested.stdout) == json.loads(gate(path, "--suggest", "--json").stdout)
    assert "alpha: 0.000000001" in gate(path, "--suggest", "--alpha", "1e-9").stdout


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--profile", "strict"), "profile"),
        (("--max-drop", "2%"), "no documents of tasks"),
        (("--max-drop", "2"), "max_drop"),
        (("--expect", "tokens"), "WHAT=DIGEST"),
        (("--profile", "none"), "nothing to judge"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
        (("--baseline", "nowhere.json"), "nowhere.json"),
        (("--ref", "demo", "--max-drop", "2%"), "measures no tasks"),
        (("--alpha", "1e-300"), "alpha"),
        (("--max-regression", "10%"), "no --baseline"),
        (("-o", "folder"), "-o says nothing without --ref"),
        (("--max-samples", "64"), "--max-samples says nothing without --ref"),
        (("--data", "builtin"), "--data says nothing without --ref"),
    ],
)
def test_bad_flags_are_refused(words: tuple[str, ...], what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "report.json", document())
    found = refusal(path, *words)
    assert (found.exit_code, what in found.what, bool(found.hint)) == (2, True, True)


def test_nothing_is_written_over_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "report.json", document())
    before = path.read_bytes()
    (tmp_path / "link.json").symlink_to(path)
    for words in ((path, "--junit", path), (tmp_path, "--junit", path), (path, "--junit", tmp_path / "link.json")):
        assert "is read here" in refusal(*words).what
    base = write(tmp_path / "base.json", document(name="base"))
    assert "is read here" in refusal(path, "--baseline", base, "--junit", base).what
    for folder in (path, tmp_path):
        found = CliRunner().invoke(report_command, [str(folder), "-o", str(path)])
        assert "is read here" in getattr(found.exception, "what", "")
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": "1"}', "\xff"])
def test_bad_reports_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    assert refusal(tmp_path / "report.json").exit_code == 2
    (tmp_path / "empty").mkdir()
    assert "no report.json" in refusal(tmp_path / "empty").what


def test_a_verdict_needs_no_torch_and_half_a_second(tmp_path: Path) -> None:
    """The program in an interpreter that has nothing but what the action installs."""
    tasks = {"arc": documents(1000, 5, 5, 700)}
    path = write(tmp_path / "report.json", document(0.01, documents=tasks))
    old = write(tmp_path / "old.json", document(0.02, name="old", documents=tasks))
    words = [sys.executable, "-c", ALONE, "gate", str(path), "--baseline", str(old), "--junit", str(tmp_path / "j.xml")]
    seconds = []
    for _ in range(3):  # the first may have modules to compile, and other work may slow any of them down
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        found = subprocess.run(words, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert (found.returncode, "PASS" in found.stdout) == (0, True), found.stderr
        # processor time, which is the time on the wall of a machine that does nothing else
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) <= 0.5
    evaluating = subprocess.run([*words[:5], "--ref", "demo"], capture_output=True, text=True, check=False)
    assert (evaluating.returncode, evaluating.stdout) == (2, "")
    assert "error: --ref evaluates a model, which needs torch" in evaluating.stderr


class Runner:
    """GitHub's runner, as far as a composite action of bash steps needs one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        shim = folder / "bin" / "python3"  # records what pip was asked for, and runs the rest
        recorded = f'printf "%s\\n" "$@" > "{folder}/pip"'
        shim.write_text(f'#!/bin/bash\nif [ "$2" = pip ]; then {recorded}; else exec "{sys.executable}" "$@"; fi\n')
        shim.chmod(0o755)

    def __call__(self, **inputs: str) -> "subprocess.CompletedProcess[str]":
        """Run the steps in turn, stopping at one that fails."""
        given = {name.replace("_", "-"): value for name, value in inputs.items()}
        values = {name: given.get(name, each.get("default", "")) for name, each in ACTION["inputs"].items()}
        assert set(given) <= set(values)
        for name in ("output", "summary"):
            (self.folder / name).write_text("")
        for step in ACTION["runs"]["steps"]:
            environment = {
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "GITHUB_ACTIONS": "true",
                "GITHUB_ACTION_PATH": str(ROOT), "RUNNER_TEMP": str(self.folder),
                "GITHUB_OUTPUT": str(self.folder / "output"), "GITHUB_STEP_SUMMARY": str(self.folder / "summary"),
            }  # fmt: skip
            for name, template in step.get("env", {}).items():
                environment[name] = re.sub(r"\$\{\{ inputs\.([a-z-]+) \}\}", lambda m: values[m.group(1)], template)
            assert "${{" not in step["run"]  # inputs never become part of a script
            words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
            found = subprocess.run(words, env=environment, cwd=self.folder, capture_output=True, text=True, check=False)
            if found.returncode:
                break
        return found


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_the_action_installs_what_the_gate_imports(runner: Runner, tmp_path: Path) -> None:
    write(tmp_path / "report.json", document(0.01))
    assert runner(report="report.json").returncode == 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [each for each in project["dependencies"] if re.split("[<>=]", each)[0] in NEEDED]
    asked = [word for word in (tmp_path / "pip").read_text().split() if ">=" in word]
    assert sorted(asked) == sorted(wanted)


def test_a_pull_request_from_good_to_bad(runner: Runner, tmp_path: Path) -> None:
    """A better model passes, one of 2 bits fails with annotations, a small sample asks for more."""
    tasks = {"arc": documents(1000, 20, 22, 700)}
    write(tmp_path / "release.json", document(0.030, name="release", documents=tasks))
    write(tmp_path / "good.json", document(0.024, name="org/good", documents=tasks))
    good = runner(report="good.json", baseline="release.json", junit="gate.xml")
    assert good.returncode == 0, good.stderr
    assert good.stdout.splitlines()[-1].startswith("::notice title=llmcompress gate::PASS")
    assert (tmp_path / "output").read_text() == "verdict=pass\n"
    assert "<code>org/good</code>" in (tmp_path / "summary").read_text()
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("failures") == "0"

    worse = {"arc": tasks["arc"] | {"candidate": [0.0] * 150 + tasks["arc"]["candidate"][150:]}}
    write(tmp_path / "two-bits.json", document(0.35, name=HOSTILE[1], documents=worse))
    bad = runner(report="two-bits.json", baseline="release.json")
    assert bad.returncode == 1
    errors = [line for line in bad.stdout.splitlines() if line.startswith("::")]
    assert len(errors) == 5
    assert errors[0].startswith("::error title=llmcompress gate%2C KL divergence::0.35 nats/token [0.3")
    assert "limit 0.05 nats/token, 32 sequences" in errors[0]
    assert not any("forged" in line for line in errors)
    assert (tmp_path / "output").read_text() == "verdict=fail\n"
    assert "❌" in (tmp_path / "summary").read_text()

    write(tmp_path / "few.json", document(0.046, count=10, name="few"))
    few = runner(report="few.json")
    assert few.returncode == 4
    assert re.search(r"^::error .*about \d+ sequences are needed, there are 10$", few.stdout, re.MULTILINE)
    assert (tmp_path / "output").read_text() == "verdict=undecided\n"
    allowed = runner(report="few.json", allow_undecided="true", arguments="--max-top1-loss=10%\n--alpha=0.01\n")
    assert allowed.returncode == 0
    assert "::warning " in allowed.stdout
    assert (tmp_path / "output").read_text() == "verdict=undecided\n"


def test_inputs_of_the_action_are_words_and_not_code(runner: Runner, tmp_path: Path) -> None:
    write(tmp_path / "report.json", document(0.01))
    for inputs in ({"profile": "$(touch owned)"}, {"baseline": "`touch owned`"}, {"arguments": "; touch owned"}):
        assert runner(report="report.json", **inputs).returncode == 2
    assert runner(report="--version").returncode == 2
    assert not (tmp_path / "owned").exists()


def test_examples_of_the_docs_use_what_there_is() -> None:
    text = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    steps = [step for block in blocks for job in block.get("jobs", {}).values() for step in job["steps"]]
    ours = [step for step in steps if "/llmcompress@" in step.get("uses", "")]
    assert ours
    assert all(set(step["with"]) <= set(ACTION["inputs"]) for step in ours)
    flags = {option for parameter in gate_command.params for option in parameter.opts}
    for page in ("ci.md", "gate.md"):
        for line in re.findall(r"llmcompress gate ([^`\n]*)", (ROOT / "docs" / page).read_text(encoding="utf-8")):
            assert set(re.findall(r"(?<![\w-])--[a-z0-9-]+", line)) <= flags, line


def round_to_two_bits(folder: Path) -> Path:
    """The demo model with every matrix rounded to four levels a row, on disk as it was."""
    shutil.copytree(Path(llmcompress.__file__).parent / "demo", folder)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if weight.ndim == 2 and "embed" not in name:
            step = weight.float().abs().amax(1, keepdim=True) / 1.5
            tensors[name] = ((weight.float() / step).round().clamp(-2, 1) * step).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_real_evaluation_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ("--ref", "demo", "--samples", "8", "--sequence-length", "32")
    bad = gate(round_to_two_bits(tmp_path / "two"), *short)
    assert bad.exit_code == 1, bad.output
    assert "8 sequences: fail" in bad.stderr
    assert gate("two-eval").exit_code == 1
    assert gate("demo", *short, "-o", "same").exit_code == 0
    assert json.loads((tmp_path / "same" / "report.json").read_text())["data"]["sequences"] == 8
