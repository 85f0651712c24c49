"""`heal`: train, resumable, on one output; write, measure what was written, publish by one rename."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.compress.heal.finish import Facts, Trained, finish
from llmcompress.compress.heal.lora import LoraTuning, peft_library
from llmcompress.compress.heal.places import seams_of, select
from llmcompress.compress.heal.records import HealRecord
from llmcompress.compress.heal.request import LORA, NORMS, RATES, HealRequest, asked_of
from llmcompress.compress.heal.state import Position, Saves
from llmcompress.compress.heal.training import Data, Original, Trainer
from llmcompress.compress.heal.tuning import NormTuning, by_name, gradients_pass
from llmcompress.compress.journal import Journal, check_output
from llmcompress.compress.pipeline import read_text
from llmcompress.compress.prune.records import RECORD_NAME as PRUNE_NAME
from llmcompress.compress.prune.records import PruneRecord
from llmcompress.compress.run import Warned, environment
from llmcompress.compress.verify import read_record, require, verify
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import folder_bytes
from llmcompress.model.integrity import digest_source, scan
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import TextRequest, tokenizer_digest
from llmcompress.runtime.adapter import FOLDER, reader_of

PATH_SEQUENCES = 32  # that RDP looks at


@dataclass(frozen=True)
class Started:
    """What will be trained: numbers in some blocks."""

    method: str
    blocks: tuple[int, ...]
    parameters: int
    resumed_at: int | None


@dataclass(frozen=True)
class Healed:
    """The output is published."""

    record: HealRecord
    directory_bytes: int


Event = str | Warned | Started | Position | Healed


def heal(request: HealRequest) -> Iterator[Event]:
    """Run it, yielding stages, what is trained, every look at held-out text, and what came of it.

    Raises InputError before anything is written where the input is at fault, BusyError where another run holds the
    output, MachineError with the state kept where the machine fails.
    """
    journal = Journal(request.output)
    published = None if request.force else journal.published_request()
    for source in (request.against, request.source):
        check_output(request.output, source.path, request.force or published is not None)
    yield "opening"
    request, student = _open(request)
    against = Skeleton.open(request.against.path, request.device, decode=reader_of(request.against.path))
    _check_pair(request, student, against)
    mine, its = (digest_source(scan(each.files), each.files.config) for each in (student, against))
    batches = read_text(_fitted(request.text, student), against)
    facts = Facts(student, mine, its, batches, asked_of(request, (mine, its), batches))
    with journal.locked():
        if published == facts.asked:
            require(verify(request.output, request.device))
            record = read_record(request.output).healing[-1]
            journal.clear()
            yield Healed(record, folder_bytes(request.output))
            return
        check_output(request.output, request.source.path, request.force)
        yield from _locked(request, journal, facts)


def _open(request: HealRequest) -> tuple[HealRequest, Skeleton]:
    """The model to heal, and the request with everything settled that depends on it."""
    student = Skeleton.open(request.source.path, request.device, decode=reader_of(request.source.path))
    if (request.source.path / FOLDER).is_dir():
        raise InputError(f"{request.source.name} has an adapter already", "heal the checkpoint it was made for")
    request.places.check(len(student.blocks))
    method = request.method or (NORMS if "quantization_config" in student.files.config else LORA)
    if method == LORA:
        peft_library()
    lisa = request.schedule.lisa
    if lisa is not None and lisa > len(student.blocks):
        raise InputError(f"--lisa {lisa}: the model has {len(student.blocks)} blocks", "train fewer at a time")
    if request.text.samples < 2 * request.held_out + request.schedule.batch_size:
        least = 2 * request.held_out + request.schedule.batch_size
        raise InputError(f"--samples {request.text.samples}: too few", f"use at least {least}, or fewer --held-out")
    schedule = replace(request.schedule, rate=request.schedule.rate or RATES[method])
    return replace(request, method=method, schedule=schedule), student


def _check_pair(request: HealRequest, student: Skeleton, against: Skeleton) -> None:
    """Raises InputError where the two models do not answer in the same words."""
    sizes = [int(each.config.get_text_config().vocab_size) for each in (student, against)]
    tokenizers = [tokenizer_digest(source.path) for source in (request.source, request.against)]
    if sizes[0] != sizes[1] or tokenizers[0] != tokenizers[1]:
        raise InputError(
            f"{request.source.name} and {request.against.name} have different tokenizers",
            "heal against the model it came from",
        )


def _fitted(text: TextRequest, skeleton: Skeleton) -> TextRequest:
    """Sequences never exceed the model's context."""
    context = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    length = min(text.sequence_length, context or text.sequence_length)
    return replace(text, sequence_length=length)


def _locked(request: HealRequest, journal: Journal, facts: Facts) -> Iterator[Event]:
    if request.restart:
        journal.discard()
    if not journal.begin(facts.asked):
        journal.record_request(facts.asked, environment())
    elif changed := journal.changed_environment(environment()):
        yield Warned(f"going on with another {', '.join(changed)}: the result may differ in its last bits")
    journal.prepare()
    yield "running the original"
    data = parts_of(
        request.against.path,
        facts.batches.tokens,
        held_out=request.held_out,
        batch_size=request.schedule.batch_size,
        device=request.device,
    )
    yield "choosing blocks"
    student, saves = facts.student, Saves(journal.state)
    load_whole(student)
    looked = torch.split(data.original.tokens[list(data.training[:PATH_SEQUENCES])], request.schedule.batch_size)
    seams = _seams(request.source.path, len(student.blocks))
    blocks = select(request.places, student, looked, request.schedule.seed, seams=seams)
    tuning: NormTuning | LoraTuning = (
        LoraTuning(student, blocks, request.lora, seed=request.schedule.seed)
        if request.method == LORA
        else NormTuning(student, blocks)
    )
    parameters = sum(p.numel() for p in by_name(tuning.trained, blocks).values())
    found = saves.latest()
    yield Started(str(request.method), blocks, parameters, None if found is None else found[0].step)
    position = None
    for position in Trainer(student, tuning, data, request.schedule).run(saves):
        yield position
    if position is not None:
        yield "writing and opening again"
        trained = Trained(tuning, blocks, parameters, position)
        record = finish(request, facts, data, folder=journal.partial, trained=trained)
        size = folder_bytes(journal.partial)
        journal.publish(request.force)
        yield Healed(record, size)


def _seams(folder: Path, blocks: int) -> tuple[int, ...]:
    """The blocks beside those that `prune` removed, where it did and the model has as many blocks as it left."""
    path = folder / PRUNE_NAME
    if not path.is_file():
        return ()
    record = PruneRecord.parse(path.read_bytes(), PRUNE_NAME)
    return seams_of(record.removed, record.blocks) if record.blocks - len(record.removed) == blocks else ()


def load_whole(student: Skeleton) -> None:
    """Load the whole model, in float32, and let gradients through all of it."""
    student.load_rest()
    for index in range(len(student.blocks)):
        student.load_block(index)
    gradients_pass(student)


def parts_of(against: Path, tokens: Tensor, *, held_out: int, batch_size: int, device: str) -> Data:
    """The original's answers, and the text in three parts: what is held out, twice, lies evenly among the rest."""
    original = Original(against, tokens, batch_size=batch_size, device=device)
    places = [place * (len(tokens) - 1) // (2 * held_out - 1) for place in range(2 * held_out)]
    training = tuple(row for row in range(len(tokens)) if row not in {*places})
    return Data(original, training, tuple(places[0::2]), tuple(places[1::2]))
