"""`eval`: run two models over the same held-out tokens and write down what differs."""

import datetime
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llmcompress.errors import InputError, MachineError
from llmcompress.eval.needs import keep_to
from llmcompress.eval.pair import Pair
from llmcompress.eval.report import (
    DataFacts,
    EvalReport,
    Footprint,
    ModelFacts,
    Sampling,
    Speed,
    per_sequence,
    summarize,
)
from llmcompress.eval.sampling import TEMPERATURES, continued
from llmcompress.eval.speed import speeds
from llmcompress.eval.tasks import TaskRequest, run_tasks
from llmcompress.eval.tokens import Tally
from llmcompress.files import commit_bytes, read_json, to_json
from llmcompress.hub.source import Source
from llmcompress.model.checkpoint import folder_bytes
from llmcompress.model.crew import ALONE, Crew
from llmcompress.model.integrity import digest_source, scan
from llmcompress.model.shares import Share
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import (
    Batches,
    TextRequest,
    load_tokenizer,
    same_text,
    token_batches,
    tokenizer_digest,
)
from llmcompress.runtime.adapter import adapter_bytes, reader_of
from llmcompress.runtime.packed import PackedReader

RECORD_NAME = "llmcompress.json"
REPORT_NAME = "report.json"


@dataclass(frozen=True)
class EvalRequest:
    """Which model, against which, on what text.

    sweep       also greedy continuations of both, and KL at several temperatures
    speed       also tokens per second of both
    max_memory  bytes that comparing them keeps to: not sweep, speed and tasks, for which a model is whole
    tasks       of lm-evaluation-harness, each `NAME` or `NAME=FILE`; `task_limit` documents of each, or all
    crew        the processes that do it together, each with the same request
    """

    model: Source
    reference: Source
    text: TextRequest
    batch_size: int
    device: str
    command: str
    sweep: bool = False
    speed: bool = False
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    max_memory: int | None = None
    crew: Crew = ALONE


def run_eval(request: EvalRequest) -> EvalReport:
    """Compare `model` with `reference`, both streamed a block at a time; sweep, speed and tasks load each as a whole.

    The report of process 0 is whole: it alone does what a model is loaded as a whole for.

    Raises InputError when their vocabularies or tokenizers differ, when the text was the one the model was calibrated
    on, or when tasks cannot be run.
    """
    candidate, reference = (_opened(request, source) for source in (request.model, request.reference))
    digest = _common_tokenizer(request)
    text = _fitted(request.text, reference)
    size = keep_to(reference, candidate, text, batch_size=request.batch_size, limit=request.max_memory)
    record = _record(request.model.path)
    batches = token_batches(text, request.reference.path)
    request.crew.same(batches.digest, "evaluation text")
    if any(same_text(str(part.get("calibration_text_digest")), batches) for part in (record, *_healing(record))):
        raise InputError(
            f"{batches.source} is the text the model was calibrated on", "evaluate on other text: --data FILE"
        )
    scored = _by_first(request, lambda: _scored(request))
    pair, tally = Pair(reference, candidate), Tally(TEMPERATURES if request.sweep else ())
    tokens = batches.split(size)
    share = Share(len(tokens), request.crew)
    for (left, right), place in zip(pair.logits(tokens), share.places, strict=True):
        tally.add(left, right, tokens[place], first=place * size)
    sequences = tally.together(share)
    whole = _by_first(request, lambda: _run_whole(request, batches.tokens, tally))
    return EvalReport(
        model=_facts(request.model, candidate),
        ref=_facts(request.reference, reference),
        data=_data(batches, digest, request.text.seed),
        finite=all(s.finite for s in sequences),
        summary=summarize(sequences),
        per_sequence=per_sequence(sequences),
        footprint=_footprint(candidate, reference, whole.get("speed", ())),
        tokens=tally.facts(load_tokenizer(request.reference.path)),
        trajectory=pair.trajectory,
        costs=pair.costs,
        plan=record.get("plan"),
        environment=_environment() | {"batch_size": str(request.batch_size)},
        command=request.command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **whole,
        **scored,
    )


def _opened(request: EvalRequest, source: Source) -> Skeleton:
    skeleton = Skeleton.open(source.path, request.device, decode=reader_of(source.path))
    skeleton.join(request.crew)
    return skeleton


def _by_first(request: EvalRequest, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Fields of the report that only process 0 fills; where it fails all do."""
    found: dict[str, Any] = {}
    request.crew.first(lambda: found.update(make()))
    return found


def _common_tokenizer(request: EvalRequest) -> str:
    """The digest of the tokenizer that both models have."""
    digest = tokenizer_digest(request.reference.path)
    if digest != tokenizer_digest(request.model.path):
        raise InputError(
            f"{request.model.name} and {request.reference.name} have different tokenizers",
            "compare a compressed model with the model it came from",
        )
    return digest


def _run_whole(request: EvalRequest, tokens: Tensor, tally: Tally) -> dict[str, Any]:
    """Fields of the report for which a model has to be whole in memory, one model after the other."""
    found: dict[str, Any] = {}
    folders = request.reference.path, request.model.path
    if request.sweep:
        written = continued(folders, tokens, request.device)
        found["sampling"] = Sampling(temperatures=tally.tempered(), continuations=written)
    if request.speed:
        found["speed"] = speeds(folders, tokens, request.device)
    return found


def _scored(request: EvalRequest) -> dict[str, Any]:
    """Fields of the report that public tasks fill; before all else, so that a wrong name is told at once."""
    if not request.tasks:
        return {}
    wanted = TaskRequest(request.tasks, request.task_limit, request.batch_size, request.device)
    return vars(run_tasks(wanted, request.reference.path, request.model.path))


def _fitted(text: TextRequest, skeleton: Skeleton) -> TextRequest:
    """Sequences never exceed the model's context."""
    context = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    length = min(text.sequence_length, context or text.sequence_length)
    return replace(text, sequence_length=length)


def _record(folder: Path) -> Mapping[str, Any]:
    path = folder / RECORD_NAME
    if not path.is_file():
        return {}
    document = read_json(path)
    return document if isinstance(document, dict) else {}


def _healing(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What was healed after the rest, and on which text."""
    found = record.get("healing")
    return [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []


def _facts(source: Source, skeleton: Skeleton) -> ModelFacts:
    digest = skeleton.crew.first(lambda: digest_source(scan(skeleton.files), skeleton.files.config))
    return ModelFacts(name=source.name, model_digest=digest, revision=source.revision)


def _data(batches: Batches, tokenizer: str, seed: int) -> DataFacts:
    sequences, length = batches.tokens.shape
    return DataFacts(
        source=batches.source,
        text_digest=batches.text_digest,
        tokens_digest=batches.digest,
        tokenizer_digest=tokenizer,
        sequences=sequences,
        sequence_length=length,
        seed=seed,
    )


def shard_bytes(skeleton: Skeleton) -> int:
    """Size of a model's weight shards, headers included, and of an adapter beside them."""
    folder = skeleton.files.folder
    return sum((folder / name).stat().st_size for name in skeleton.files.shards) + adapter_bytes(folder)


def packed_bits(skeleton: Skeleton) -> int:
    """Storage bits of packed linears, counted from the tensors, adapters included; 0 where nothing is packed."""
    reader, tensors = skeleton.reader, skeleton.files.tensors
    if not isinstance(reader, PackedReader):
        return 0
    names = [name for stem in reader.stems() for name in reader.parts(stem)]
    own = sum(8 * (tensors[name].stop - tensors[name].start) for name in names)
    return own + 8 * adapter_bytes(skeleton.files.folder)


def _footprint(candidate: Skeleton, reference: Skeleton, speed: Sequence[Speed]) -> Footprint:
    resident = {found.side: found.resident_bytes for found in speed}
    reader = candidate.reader
    weights = 0
    if isinstance(reader, PackedReader):
        for name in reader.row_major:
            weights += candidate.model.get_parameter(candidate.names.module_of[name]).numel()
    parameters = candidate.parameters
    size = shard_bytes(candidate)
    bits = packed_bits(candidate)
    return Footprint(
        shard_bytes=size,
        directory_bytes=folder_bytes(candidate.files.folder),
        reference_shard_bytes=shard_bytes(reference),
        parameters=parameters,
        quantized_weights=weights,
        bits_per_weight=bits / weights if weights else None,
        file_bits_per_weight=size * 8 / parameters,
        resident_bytes=resident.get("candidate"),
        reference_resident_bytes=resident.get("reference"),
        reference_parameters=reference.parameters,
    )


def _environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def write_report(report: EvalReport, folder: Path) -> Path:
    """Write report.json into `folder`. Raises MachineError when it cannot be written, InputError for no folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        kind = InputError if isinstance(error, FileExistsError | NotADirectoryError) else MachineError
        raise kind(f"{folder.name}: {error.strerror}", "choose another -o") from None
    path = folder / REPORT_NAME
    commit_bytes(path, to_json(report.model_dump(mode="json")).encode())
    return path
