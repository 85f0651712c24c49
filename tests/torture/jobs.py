"""What is tortured: commands that publish, what each leaves undisturbed, and how a disturbed run is judged."""

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.torture.starts import Ended, run

PLAN = ("--set", "plan.group_size=32", "--set", "plan.bits=[2,3,4]")
SHORT = (
    *("--calibration", "../inputs/text.txt", "--set", "calibration.samples=8", "--set", "calibration.score_samples=4"),
    *("--set", "calibration.sequence_length=32", *PLAN),
)
HEAL = (
    *("--method", "norms", "--steps", "4", "--every", "2", "--held-out", "2", "--samples", "12"),
    *("--sequence-length", "16", "--batch-size", "2", "--calibration", "../inputs/text.txt"),
)
MODEL = "../inputs/model"
QUICK = ("quantize", MODEL, "--recipe", "fast", "--budget", "4.5bits", "-o", "out")
VOLATILE = ("date", "command", "environment", "costs")  # of a report.json: what may differ between equal runs


@dataclass(frozen=True)
class Job:
    """One command, run in a folder of its own beside `inputs`; it may leave `outputs` there and nothing else."""

    name: str
    words: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def resumes(self) -> bool:
        """Whether an interrupted run is gone on with."""
        return self.words[0] in ("quantize", "heal")

    @property
    def rewrites(self) -> bool:
        """Whether a finished run may be repeated onto the same files."""
        return self.words[0] in ("eval", "report", "score", "plan", "gate")


JOBS = {
    job.name: job
    for job in (
        Job("quantize fast", (*QUICK, *PLAN), ("out",)),
        Job("quantize balanced", ("quantize", MODEL, "--budget", "3.6bits", "-o", "out", *SHORT), ("out",)),
        Job(
            "quantize rewritten",
            ("quantize", MODEL, "--budget", "3.6bits", "-o", "out", *SHORT, "--set", "rewrite.methods=[smooth]",
             "--set", "plan.trials=false"),
            ("out",),
        ),
        Job(
            "quantize --force",
            (*QUICK, *PLAN, "--force"),
            ("out",),
        ),
        Job("rewrite", ("rewrite", MODEL, "--smooth", "-o", "out", *SHORT), ("out",)),
        Job("prune", ("prune", MODEL, "--blocks", "1", "-o", "out", *SHORT), ("out",)),
        Job("export", ("export", "../inputs/packed", "--format", "bf16", "-o", "out"), ("out",)),
        Job("heal", ("heal", "../inputs/packed", "--against", MODEL, "-o", "out", *HEAL), ("out",)),
        Job(
            "eval",
            ("eval", "../inputs/packed", "--ref", MODEL, "--samples", "8", "--sequence-length", "32",
             "--data", "../inputs/text.txt", "-o", "out"),
            ("out/report.json", "out/report.html"),
        ),
        Job("report", ("report", "../inputs/eval", "-o", "page.html"), ("page.html",)),
        Job("score", ("score", MODEL, "-o", "scores.json", *SHORT), ("scores.json",)),
        Job(
            "plan",
            ("plan", MODEL, "--scores", "../inputs/scores.json", "--budget", "3.6bits", "-o", "plan.json", *SHORT),
            ("plan.json",),
        ),
        Job(
            "gate",
            ("gate", "../inputs/eval/report.json", "--profile", "none", "--max-kld", "99", "--junit", "junit.xml"),
            ("junit.xml",),
        ),
    )
}  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that is not an input, without what differs between equal runs; folders end in `/`."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        found[name + "/" if path.is_dir() else name] = b"" if path.is_dir() else comparable(name, path.read_bytes())
    return found


def comparable(name: str, data: bytes) -> bytes:
    """The bytes of a file; of reports without times, of their pages whether they are complete."""
    if name == "out/report.html":
        return b"complete" if data.rstrip().endswith(b"</html>") else data
    if name == "out/report.json":
        try:
            document = json.loads(data)
        except ValueError:
            return data
        return json.dumps({key: value for key, value in document.items() if key not in VOLATILE}).encode()
    if name == "junit.xml":
        return data.partition(b"<testcase")[2] if data.rstrip().endswith(b">") else data
    return data


@dataclass
class Tally:
    """What was tried in one part, and every violation found."""

    part: str
    counts: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)

    def add(self, *words: str) -> None:
        """Count one of each."""
        for word in words:
            self.counts[word] = self.counts.get(word, 0) + 1

    def wrong(self, text: str) -> None:
        """Note a violation."""
        self.violations.append(text)


class Bench:
    """A scratch folder with inputs made once, and a fresh `trial` folder for every disturbed run."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.trial = scratch / "trial"
        self._expected: dict[str, tuple[dict[str, bytes], float]] = {}

    def fresh(self, job: Job | None = None) -> Path:
        """An empty trial folder, with an older output where the job replaces one."""
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir()
        if job is not None and "--force" in job.words:
            shutil.copytree(self.scratch / "inputs" / "packed", self.trial / "out")
        return self.trial

    def expected(self, job: Job) -> dict[str, bytes]:
        """What an undisturbed run leaves."""
        return self._undisturbed(job)[0]

    def seconds(self, job: Job) -> float:
        """How long an undisturbed run takes."""
        return self._undisturbed(job)[1]

    def _undisturbed(self, job: Job) -> tuple[dict[str, bytes], float]:
        if job.name not in self._expected:
            times, left = [], []
            for _ in range(2):
                folder = self.fresh(job)
                began = time.monotonic()
                found = run(job.words, folder)
                if found.status:
                    raise RuntimeError(f"{job.name} fails undisturbed: {found.err[-600:]}")
                times.append(time.monotonic() - began)
                left.append(contents(folder))
            if left[0] != left[1]:
                names = [name for name in left[0] | left[1] if left[0].get(name) != left[1].get(name)]
                raise RuntimeError(f"two undisturbed runs of {job.name} differ in {names}")
            self._expected[job.name] = (left[0], min(times))
        return self._expected[job.name]

    def half_written(self, job: Job) -> list[str]:
        """What is wrong with what is seen of the outputs at this moment; nothing where they are absent or complete."""
        expected, seen = self.expected(job), contents(self.trial)
        found = []
        for output in job.outputs:
            names = [name for name in expected if name == output or name.startswith(output + "/")]
            there = {name: data for name, data in seen.items() if name == output or name.startswith(output + "/")}
            older = "--force" in job.words and there == self._older(output)
            if there and not older and there != {name: expected[name] for name in names}:
                found += [f"{name} is not what it should be" for name in names if there.get(name) != expected[name]]
        return found

    def _older(self, output: str) -> dict[str, bytes]:
        packed = contents(self.scratch / "inputs" / "packed")
        return {f"{output}/": b""} | {f"{output}/{name}": data for name, data in packed.items()}

    def rerun(self, job: Job, words: Iterable[str] = ()) -> tuple[Ended, list[str]]:
        """The same command again, and what is wrong afterwards: bytes, names, exit status."""
        complete = all((self.trial / output).exists() for output in job.outputs)
        found = run([*job.words, *words], self.trial)
        wrong = []
        allowed = {0, 2} if complete and not job.rewrites and "--force" not in job.words else {0}
        if found.status not in allowed or (found.status == 2 and "already exists" not in found.err):
            wrong.append(f"the rerun ends with {found.status}: {found.err.strip()[-300:]}")
        left, expected = contents(self.trial), self.expected(job)
        wrong += [f"after the rerun {name} differs" for name in expected if left.get(name) != expected[name]]
        wrong += [f"after the rerun {name} is left over" for name in left if name not in expected]
        return found, wrong


def complaints(ended: Ended, allowed: Iterable[int]) -> list[str]:
    """What is wrong with how a disturbed run ended: its status, or a traceback."""
    found = []
    if ended.status not in allowed:
        found.append(f"it ends with {ended.status}: {ended.err.strip()[-400:]}")
    if "Traceback" in ended.err or "Logging error" in ended.err:
        found.append(f"it shows a traceback: {ended.err.strip()[-400:]}")
    errors = ended.err[ended.err.find("error:") :].splitlines() if "error:" in ended.err else []
    if len(errors) > 6:
        found.append(f"its error takes {len(errors)} lines")
    return found


def make_inputs(scratch: Path, jobs: Iterable[Job]) -> None:
    """A tiny random model and text; an output of it, its evaluation, scores, where a job reads them."""
    from tests.conftest import TEXT

    inputs, work = scratch / "inputs", scratch / "work"
    inputs.mkdir()
    work.mkdir()
    _save_model(inputs / "model")
    (inputs / "text.txt").write_text(TEXT * 60, encoding="utf-8")
    wanted = {Path(word).parts[2] for job in jobs for word in job.words if word.startswith("../inputs/")}
    if any("--force" in job.words for job in jobs) or "eval" in wanted:
        wanted.add("packed")
    steps: dict[str, tuple[str, ...]] = {
        "packed": ("quantize", MODEL, "--recipe", "fast", "--budget", "3.3bits", "-o", "../inputs/packed", *PLAN),
        "eval": (*JOBS["eval"].words[:-1], "../inputs/eval"),
        "scores.json": (*JOBS["score"].words[:3], "../inputs/scores.json", *SHORT),
    }
    for name, words in steps.items():
        if name not in wanted:
            continue
        found = run(words, work)
        if found.status:
            raise RuntimeError(f"{words[0]}: {found.err[-600:]}")


def _save_model(folder: Path) -> None:
    """In a process of its own, so that this one stays without threads."""
    pid = os.fork()
    if pid:
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError("the model cannot be made")
        return
    status = 1
    try:
        from tests.conftest import llama_config, save_model

        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        save_model(folder, llama_config(num_hidden_layers=2, **sizes), shard_size="20KB")
        status = 0
    finally:
        os._exit(status)
