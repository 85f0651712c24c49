"""Reopen an output from disk and prove that it is what the plan says."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from llmcompress.compress.output import RECORD_NAME, FileRecord, OutputRecord, Probe, RunRecord
from llmcompress.errors import CompressError, InputError
from llmcompress.files import file_digest, parse_json
from llmcompress.model.checkpoint import CheckpointReader
from llmcompress.model.integrity import nonfinite, scan
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.preflight import SourceFiles, check_source
from llmcompress.preflight.header import TensorEntry
from llmcompress.runtime.adapter import reader_of
from llmcompress.runtime.packed import PackedReader
from llmcompress.types import LinearSpec

LOGIT_TOLERANCE = 1e-3
PROBE_PLACES = 64
NOTHING: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Check:
    """One thing that was verified, and what was found."""

    name: str
    passed: bool
    found: str


def read_record(folder: Path) -> OutputRecord:
    """`llmcompress.json` of an output, with the plan where it is quantized. Raises InputError when it is damaged."""
    path = folder / RECORD_NAME
    if not path.is_file():
        raise InputError(
            f"{folder.name}: no {RECORD_NAME}",
            "give a directory written by `llmcompress quantize` or `llmcompress heal`",
        )
    data = path.read_bytes()
    document = parse_json(data, RECORD_NAME)
    quantized = isinstance(document, dict) and "plan" in document
    return (RunRecord if quantized else OutputRecord).parse(data, RECORD_NAME)


def probe_of(tokens: Tensor, logits: Tensor) -> Probe:
    """Keep the logits of the last position at evenly spread places of the vocabulary."""
    last = logits[0, -1].double().cpu()
    places = torch.unique(torch.linspace(0, len(last) - 1, min(PROBE_PLACES, len(last))).long())
    return Probe(
        tokens=tuple(int(t) for t in tokens[0]),
        places=tuple(int(p) for p in places),
        logits=tuple(float(v) for v in last[places]),
    )


def verify(folder: Path, device: str = "cpu") -> Iterator[Check]:
    """Yield each check as it is made. Raises InputError where the directory cannot even be opened."""
    files = check_source(folder, packed=True)
    record = read_record(folder)
    yield Check("shards and index", True, f"{len(files.shards)} shards, {len(files.tensors)} tensors agree")
    known = _shard_digests(files)
    yield check_hashes(folder, record.files, known)
    if isinstance(record, RunRecord):
        yield _check_bits(PackedReader(CheckpointReader(files.tensors), files.config), files.tensors, record)
        yield _check_size(files.shards, folder, record)
    yield check_finite(folder, scanned=bool(known))
    yield check_logits(probe_logits(folder, record.probe.tokens, device), record.probe)


def _shard_digests(files: SourceFiles) -> dict[str, str]:
    """sha256 of every shard by name, from the pass that looks for NaN; nothing where it finds one."""
    try:
        return {found.name: found.sha256 for found in scan(files)}
    except InputError:
        return {}


def check_hashes(folder: Path, files: tuple[FileRecord, ...], known: Mapping[str, str] = NOTHING) -> Check:
    """Whether files of an output are those on record; `known` are digests that were just taken, by name."""
    for one in files:
        path = folder / one.name
        if not path.is_file():
            return Check("hashes", False, f"{one.name} is missing")
        if path.stat().st_size != one.size_bytes or (known.get(one.name) or file_digest(path)) != one.sha256:
            return Check("hashes", False, f"{one.name} is not the file that was written")
    return Check("hashes", True, f"{len(files)} files")


def _check_bits(reader: PackedReader, tensors: Mapping[str, TensorEntry], record: RunRecord) -> Check:
    """Recount storage bits from the tensors themselves."""
    allocation = record.plan.allocation
    bits = weights = 0
    formats: Counter[LinearSpec] = Counter()
    for stem in reader.stems():
        rows, columns = reader.size_of(stem)
        bits += sum(8 * (tensors[name].stop - tensors[name].start) for name in reader.parts(stem))
        weights += rows * columns
        formats[reader.spec_of(stem)] += 1
    if formats != Counter(a.spec for a in allocation.assigned):
        return Check("true bits", False, "the formats on disk are not those of the plan")
    exact = bits == allocation.storage_bits and bits <= allocation.budget_bits
    return Check(
        "true bits", exact, f"{bits / max(weights, 1):.4f} bits per weight, {bits} of {allocation.budget_bits}"
    )


def _check_size(shards: tuple[str, ...], folder: Path, record: RunRecord) -> Check:
    size = sum((folder / name).stat().st_size for name in shards)
    planned = record.plan.allocation.file_bytes
    return Check("size", size == planned, f"{size} bytes of shards, {planned} planned")


def check_finite(folder: Path, *, scanned: bool = False) -> Check:
    """Whether no weight of a checkpoint is NaN or infinite; `scanned`: `scan` has just found none that is refused."""
    try:
        files = check_source(folder, packed=True)
        if not scanned:
            scan(files)
    except InputError as error:
        return Check("finite", False, error.what)
    broken = nonfinite(files)
    return Check(
        "finite", True, f"NaN or infinity, as allowed, in {', '.join(broken)}" if broken else "no NaN or infinity"
    )


def probe_logits(folder: Path, tokens: tuple[int, ...], device: str) -> Tensor:
    """Logits `(1, tokens, vocabulary)` of a short input from the reopened files."""
    skeleton = Skeleton.open(folder, device, decode=reader_of(folder))
    return next(iter(BlockStream(skeleton).logits([torch.tensor([tokens])])))


def check_logits(found_logits: Tensor, probe: Probe) -> Check:
    """Whether logits `(1, tokens, vocabulary)` of the probe's tokens are those on record."""
    logits = found_logits[0, -1].double().cpu()
    expected = torch.tensor(probe.logits, dtype=torch.float64)
    found = (logits[list(probe.places)] - expected).abs()
    difference = float(found.max()) if len(found) else math.inf  # not a number where one of them is none
    passed = math.isfinite(difference) and difference <= LOGIT_TOLERANCE
    return Check("logits", passed, f"largest difference from the codes that were written: {difference:.2g}")


class VerifyError(CompressError):
    """What was written is not what was planned. As a command's answer this is the input's fault (2)."""

    exit_code = 2


def require(checks: Iterator[Check]) -> tuple[Check, ...]:
    """All checks, or VerifyError naming the first that failed."""
    found = []
    for check in checks:
        if not check.passed:
            raise VerifyError(
                f"verify: {check.name}: {check.found}", "the files were changed or damaged: make them again"
            )
        found.append(check)
    return tuple(found)
