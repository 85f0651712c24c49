"""Side by side with other quantizers: same model, same calibration tokens, same judge, same held-out tokens.

    python bench/quality.py demo --bits 2 3 4 3.5 --group-size 64 128 --work DIR --json OUT.json

Every peer runs in an environment of its own (made under --venvs on first use) with the settings of
bench/peers/table.py, writes its checkpoint, and is reloaded from it as its users would; what its weights then are is
judged by `llmcompress eval`. Ours is run as a command. Results of peers are kept under --work and not made again.
A fractional width is a mix: at most that many true bits per weight over the linears.
"""

import argparse
import functools
import hashlib
import json
import math
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from peers.cells import NOT_RUN, Cell, Row, best_ratios, tell
from peers.job import count, stored
from peers.process import Failed, environment, launch
from peers.table import PEERS, REVISION, VARIANTS, Variant
from peers.venvs import PINS, prepare, python_of
from torch import Tensor

from llmcompress.eval.fidelity import evaluate
from llmcompress.eval.report import summarize
from llmcompress.hub.source import Source, resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import Batches, TextRequest, token_batches
from llmcompress.model.trace import trace
from llmcompress.runtime.packed import PackedReader

HERE = Path(__file__).resolve().parent
JUDGED_TOGETHER = 8  # sequences


class Bench:
    """What every cell shares: the model, its linears, the tokens, and where things are kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.source: Source = resolve(options.model)
        skeleton = Skeleton.open(self.source.path)
        self.linears = [(x.name, x.rows, x.columns) for x in trace(skeleton).linears]
        context = getattr(skeleton.config.get_text_config(), "max_position_embeddings", 1 << 30)
        length = min(options.sequence_length, context)
        self.calibration = self._text(options.calibration, options.calibration_samples, length, "calibration")
        self.held_out = self._text(options.data, options.samples, length, "evaluation")
        self.work: Path = options.work / self.source.name
        self.cache: Path = options.work / "cache"
        for folder in (self.work, self.cache):
            folder.mkdir(parents=True, exist_ok=True)
        self.token_files: dict[str, str] = {}
        for name, batches in (("calibration", self.calibration), ("held_out", self.held_out)):
            path = self.work / f"{name}-{batches.digest[:16]}.npy"
            numpy.save(path, batches.tokens.numpy())
            self.token_files[name] = str(path)
        self.model_digest = hashlib.sha256(
            b"".join(p.read_bytes() for p in sorted(self.source.path.glob("*.safetensors")))
        ).hexdigest()

    def _text(self, spec: str, samples: int, length: int, split: Any) -> Batches:
        return token_batches(TextRequest(spec, samples, length, self.options.seed, split), self.source.path)

    @functools.cached_property
    def reference(self) -> list[Tensor]:
        """The model's own logits on the held-out tokens, batch by batch."""
        return list(self._logits(self.source.path))

    def _logits(self, folder: Path) -> Iterator[Tensor]:
        tokens = self.held_out.split(JUDGED_TOGETHER)
        stream = BlockStream(Skeleton.open(folder, decode=PackedReader))
        yield from stream.logits(tokens)

    def judge(self, folder: Path) -> dict[str, Any]:
        """KL and perplexity of a checkpoint against the model, as `llmcompress eval` measures them."""
        tokens = self.held_out.split(JUDGED_TOGETHER)
        sequences = evaluate(self.reference, self._logits(folder), tokens)
        found = summarize(sequences)
        klds = numpy.array([sequence.kld for sequence in sequences])
        return {
            "kld": float(klds.mean()),
            "kld_error": float(klds.std(ddof=1) / len(klds) ** 0.5),
            "perplexity": found.perplexity_candidate or math.inf,
            "perplexity_reference": found.perplexity_reference,
            "top1": found.top1.mean,
        }

    def peer(self, variant: Variant, cell: Cell) -> Row:
        """One peer in one cell, from the cache where it has been there before."""
        asked = {
            "peer": PINS[variant.peer],
            "settings": variant.settings,
            "bits": cell.bits,
            "group_size": cell.group_size,
            "model": self.model_digest,
            "calibration": self.calibration.digest,
            "held_out": self.held_out.digest,
            "threads": self.options.threads,
            "seed": self.options.seed,
            "revision": REVISION,
        }
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
        kept = self.cache / f"{digest}.json"
        if kept.is_file():
            row = Row(**json.loads(kept.read_text()))
            if not (row.failed and self.options.again):
                return row
        if self.options.cached_only:
            return Row(variant.label, variant.gptq, failed=NOT_RUN)
        prepare(self.options.venvs, [variant.peer])
        row = self._run_peer(variant, cell, digest)
        kept.write_text(json.dumps(asdict(row) | {"asked": asked}, indent=2, default=str))
        return row

    def _run_peer(self, variant: Variant, cell: Cell, digest: str) -> Row:
        folder = self.work / digest
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        document = {
            "model": str(self.source.path),
            "output": str(folder / "output"),
            "dense": str(folder / "dense"),
            **self.token_files,
            "bits": cell.bits,
            "group_size": cell.group_size,
            "settings": variant.settings,
            "linears": self.linears,
            "threads": self.options.threads,
            "seed": self.options.seed,
        }
        path = folder / "job.json"
        path.write_text(json.dumps(document))
        words = [str(python_of(self.options.venvs, variant.peer)), str(HERE / "peers" / f"run_{variant.peer}.py")]
        outside = environment(self.options.threads, folder / "home")
        try:
            made = launch([*words, "quantize", str(path)], outside, folder / "quantize.log", self.options.timeout)
            launch([*words, "reload", str(path)], outside, folder / "reload.log", self.options.timeout)
            first, second = (json.loads((folder / f"job.{x}.json").read_text()) for x in ("quantize", "reload"))
            judged = self.judge(folder / "dense")
        except (Failed, OSError, ValueError) as error:
            return Row(variant.label, variant.gptq, failed=" ".join(str(error).split())[-400:])
        if not self.options.keep:
            for name in ("dense", "output", "home"):
                shutil.rmtree(folder / name, ignore_errors=True)
        return Row(
            variant.label,
            variant.gptq,
            **judged,
            **{key: second[key] for key in ("bits_per_weight", "block_bits_per_weight", "weight_file_bytes", "left")},
            seconds=first["seconds"],
            wall_seconds=made.wall_seconds,
            cpu_seconds=made.cpu_seconds,
            peak_mib=made.peak_mib,
            facts={**first["facts"], **second["facts"], "reload_kld": second["reload_kld"], "note": variant.note},
            versions=first["versions"],
        )

    def ours(self, words: str, cell: Cell) -> Row:
        """Our own command in a cell; `words` are a recipe and changes of it, joined by `:`."""
        folder = Path(tempfile.mkdtemp(prefix="ours-", dir=self.work))
        command, output = self._command(words, cell, folder / "out"), folder / "out"
        outside, log, said = environment(self.options.threads, None), folder / "log", folder / "said.json"
        try:
            made = launch(command, outside, log, self.options.timeout, stdout=said)
            row = Row(
                f"ours {words}",
                **self.judge(output),
                **count(self.linears, stored(output)),
                seconds=json.loads(said.read_text())["seconds"],
                wall_seconds=made.wall_seconds,
                cpu_seconds=made.cpu_seconds,
                peak_mib=made.peak_mib,
                facts=self._same_tokens(output),
                versions={name: version(name) for name in ("llmcompress", "torch", "transformers")},
                ours=True,
            )
            if self.options.twice:
                first = output.rename(folder / "first")  # its README quotes the command, so the name must be the same
                launch(command, outside, log, self.options.timeout, stdout=said)
                row.facts["same_bytes_twice"] = _same(first, output)
        except (Failed, OSError, ValueError) as error:
            return Row(f"ours {words}", ours=True, failed=" ".join(str(error).split())[-400:])
        shutil.rmtree(folder, ignore_errors=True)
        return row

    def _command(self, words: str, cell: Cell, output: Path) -> list[str]:
        recipe, *changes = words.split(":")
        calibration = [f"calibration.samples={self.options.calibration_samples}"]
        calibration.append(f"calibration.sequence_length={self.options.sequence_length}")
        if cell.mix:
            cell_changes = [f"plan.group_size={cell.group_size}"]
        else:
            cell_changes = [f"plan.bits=[{cell.bits:.0f}]", f"plan.group_size={cell.group_size}", "plan.trials=false"]
        sets = [part for change in (*calibration, *cell_changes, *changes) for part in ("--set", change)]
        budget = f"{cell.bits}bits" if cell.mix else "16bits"
        return [sys.executable, "-m", "llmcompress", "quantize", self.options.model, "--budget", budget,
                "-o", str(output), "--recipe", recipe, "--calibration", self.options.calibration,
                "--seed", str(self.options.seed), "--json", *sets]  # fmt: skip

    def _same_tokens(self, folder: Path) -> dict[str, Any]:
        """Whether our run was calibrated on the very tokens that the peers were given."""
        plan = json.loads((folder / "llmcompress.json").read_text()).get("plan") or {}
        return {"same_calibration_tokens": plan.get("calibration_digest") == self.calibration.digest}


def _same(*folders: Path) -> bool:
    """Whether two folders hold the same files with the same bytes."""
    left, right = ({str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    return left == right


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=float, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--peers", nargs="*", default=list(PEERS), help=f"of {', '.join(PEERS)}; or a word of a label")
    parser.add_argument("--ours", nargs="*", default=["default"], help="RECIPE[:key=value...], or none")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=7200, help="seconds for one step of one peer")
    parser.add_argument("--work", type=Path, required=True, help="jobs and the cache of results")
    parser.add_argument("--venvs", type=Path, help="environments of the peers; default WORK/venvs")
    parser.add_argument("--cached-only", action="store_true", help="peers from the cache, none run")
    parser.add_argument("--again", action="store_true", help="run again what failed")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints of the peers")
    parser.add_argument("--twice", action="store_true", help="run ours twice and compare the bytes")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.venvs = (options.venvs or options.work / "venvs").resolve()
    return options


def _wanted(options: argparse.Namespace, cell: Cell) -> list[Variant]:
    chosen: Callable[[Variant], bool] = lambda v: any(w == v.peer or w == v.label for w in options.peers)  # noqa: E731
    return [v for v in VARIANTS if chosen(v) and v.fits(cell.bits, cell.group_size)]


def main() -> None:
    """Every cell: peers, ours, a table; then means over the cells."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    cells = [Cell(bits, size) for bits in options.bits for size in options.group_size]
    for cell in cells:
        print(f"\n== {bench.source.name}, {cell.label}", flush=True)
        for variant in _wanted(options, cell):
            tell(cell.add(bench.peer(variant, cell)))
        for words in options.ours:
            tell(cell.add(bench.ours(words, cell)))
    means = best_ratios(cells, [f"ours {words}" for words in options.ours])
    if options.json:
        document = {
            "model": bench.source.name,
            "calibration": Path(options.calibration).name,
            "calibration_tokens": list(bench.calibration.tokens.shape),
            "data": Path(options.data).name,
            "held_out_tokens": list(bench.held_out.tokens.shape),
            "seed": options.seed,
            "threads": options.threads,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, CPU",
            "peers": {peer: list(PINS[peer]) for peer in PEERS},
            "ratios": means,
            "cells": [cell.document() for cell in cells],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
