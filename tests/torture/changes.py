"""What changes between a kill and the next run: the request, the model, the text, or bits of what was kept."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

from tests.torture.jobs import JOBS, MODEL, Bench, Job, Tally, contents
from tests.torture.starts import Running, run

TEXT = "calibration tokens"
NAMED = {"recipe": "recipe", "budget": "budget", "source": "model", "config": "model", "calibration": TEXT}
KEPT = ("*.safetensors", "hidden-*", "commit-*.json", "plan.json", "scores.json", "run.json", "rewritten/*")


def killed_midway(bench: Bench, job: Job, commits: int, pattern: str = "commit-*.json") -> bool:
    """A run of a job, killed once it has left `commits` records; False where it was too quick."""
    bench.fresh(job)
    running = Running(job.words, bench.trial)
    state = bench.trial / ".out.llmcompress"
    end = time.monotonic() + 60
    while len(list(state.glob(pattern))) < commits and time.monotonic() < end:
        if (bench.trial / "out").exists():
            break
        time.sleep(0.001)
    running.strike(signal.SIGKILL)
    running.wait()
    return (state / "run.json").exists()


def changes(bench: Bench) -> Tally:
    """Another recipe, budget, model, config or text than before: refused by name, and what was kept is untouched."""
    tally = Tally("changed between runs")
    job = JOBS["quantize balanced"]
    bench.expected(job)
    for what in NAMED:
        if not killed_midway(bench, job, 2):
            tally.add("too quick")
            continue
        before = contents(bench.trial)
        words = _changed(bench, job, what)
        refused = run(words, bench.trial)
        wrong = []
        if refused.status != 2 or NAMED[what] not in refused.err:
            wrong.append(f"not refused by name: {refused.status} {refused.err[-200:]}")
        if contents(bench.trial) != before:
            wrong.append("a refused run changed what was kept")
        wrong += bench.rerun(job)[1]
        tally.add("runs", "refused by name")
        wrong += _restarted(bench, job, words)
        for text in wrong:
            tally.wrong(f"{what} changed: {text}")
    return tally


def _restarted(bench: Bench, job: Job, words: list[str]) -> list[str]:
    """With --restart the changed request gives what it gives from nothing."""
    if not killed_midway(bench, job, 2):
        return []
    found = run([*words, "--restart"], bench.trial)
    restarted = contents(bench.trial)
    bench.fresh()
    run(words, bench.trial)
    if found.status or restarted != {**contents(bench.trial), **_card(restarted, contents(bench.trial))}:
        return [f"--restart gives something else: {found.status} {found.err[-200:]}"]
    return []


def _card(restarted: dict[str, bytes], anew: dict[str, bytes]) -> dict[str, bytes]:
    """The model card quotes the command, with its --restart, and the record has the digest of the card."""
    card = "out/README.md"
    plain = {name: data.replace(b" --restart", b"") for name, data in restarted.items()}
    if plain.get(card) != anew.get(card):
        return {}
    records = [json.loads(found["out/llmcompress.json"]) for found in (restarted, anew)]
    for record in records:
        record["files"] = [file for file in record["files"] if file["name"] != "README.md"]
    same = records[0] == records[1]
    return {name: restarted[name] for name in (card, "out/llmcompress.json")} if same else {}


def _changed(bench: Bench, job: Job, what: str) -> list[str]:
    words = list(job.words)
    if what == "recipe":
        return [*words, "--set", "quantize.damp=0.02"]
    if what == "budget":
        words[words.index("--budget") + 1] = "3.7bits"
        return words
    if what == "calibration":
        other = bench.scratch / "inputs" / "other.txt"
        other.write_text((bench.scratch / "inputs" / "text.txt").read_text().replace("fox", "dog"))
        words[words.index("--calibration") + 1] = "../inputs/other.txt"
        return words
    other = bench.scratch / "inputs" / f"model-{what}"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(bench.scratch / "inputs" / "model", other)
    if what == "source":
        flip(sorted(other.glob("*.safetensors"))[-1], random.Random(0), low=True)
    else:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    words[words.index(MODEL)] = f"../inputs/{other.name}"
    return words


def flip(path: Path, source: random.Random, *, low: bool = False) -> None:
    """Turn one bit over, somewhere in a file; with `low` one of little weight in its last number."""
    data = bytearray(path.read_bytes())
    place, bit = (len(data) - 4, 0) if low else (source.randrange(len(data)), source.randrange(8))
    data[place] ^= 1 << bit
    path.write_bytes(bytes(data))


def flips(bench: Bench, times: int, seed: int) -> Tally:
    """A bit turned over in what was kept: redone, or refused with advice that helps; never other bytes."""
    tally, source = Tally("bits flipped in what was kept"), random.Random(f"flip {seed}")
    for place in range(times):
        job = JOBS["quantize rewritten"] if place % 2 else JOBS["quantize balanced"]
        bench.expected(job)
        pattern = KEPT[place % len(KEPT)]
        if not killed_midway(bench, job, source.choice((1, 2, 2))) or not (files := _kept(bench, pattern)):
            tally.add("nothing there yet")
            continue
        victim = source.choice(files)
        flip(victim, source)
        _flipped(bench, job, tally, f"{job.name}, {victim.name}, flip {place} of seed {seed}")
    for place in range(times // 4):
        job = JOBS["heal"]
        bench.expected(job)
        if killed_midway(bench, job, 1, "heal-*.json") and (files := _kept(bench, "heal-*")):
            victim = source.choice(files)
            flip(victim, source)
            _flipped(bench, job, tally, f"{job.name}, {victim.name}, flip {place} of seed {seed}")
    return tally


def _kept(bench: Bench, pattern: str) -> list[Path]:
    """Files of an unfinished run, in the order of their names."""
    state, partial = bench.trial / ".out.llmcompress", bench.trial / "out.partial"
    return sorted(path for folder in (state, partial) for path in folder.glob(pattern) if path.is_file())


def _flipped(bench: Bench, job: Job, tally: Tally, where: str) -> None:
    found = run(job.words, bench.trial)
    tally.add("runs")
    if found.status == 2 and "--restart" in found.err:
        tally.add("refused, --restart")
        wrong = bench.rerun(job, ["--restart"])[1]
        wrong = [text for text in wrong if "README.md" not in text and "llmcompress.json" not in text]
    else:
        tally.add("redone")
        wrong = [] if found.status == 0 else [f"ends with {found.status}: {found.err[-300:]}"]
        left, expected = contents(bench.trial), bench.expected(job)
        wrong += [f"{name} differs" for name in expected if left.get(name) != expected[name]]
        wrong += [f"{name} is left over" for name in left if name not in expected]
    for text in wrong:
        tally.wrong(f"{where}: {text}")
