"""The end of a healing: write, measure what was written, keep it only where it measures no worse, verify."""

from dataclasses import dataclass
from pathlib import Path

import torch

from llmcompress import __version__
from llmcompress.compress.heal.card import healed_card
from llmcompress.compress.heal.lora import LoraTuning
from llmcompress.compress.heal.records import Figure, HealRecord
from llmcompress.compress.heal.request import HealRequest, settings_of
from llmcompress.compress.heal.state import Position
from llmcompress.compress.heal.training import Data, distances
from llmcompress.compress.heal.tuning import NormTuning
from llmcompress.compress.heal.write import write_adapter, write_checkpoint
from llmcompress.compress.output import RECORD_NAME, Origin, OutputRecord, Probe, file_records
from llmcompress.compress.pipeline import PROBE_TOKENS
from llmcompress.compress.run import environment
from llmcompress.compress.statistics import mean
from llmcompress.compress.verify import probe_logits, probe_of, read_record, require, verify
from llmcompress.files import commit_bytes, commit_json
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import Batches
from llmcompress.runtime.adapter import reader_of


@dataclass(frozen=True)
class Facts:
    """What was read before anything was trained: the model to heal, digests, the text, and what was asked."""

    student: Skeleton
    digest: str
    against_digest: str
    batches: Batches
    asked: dict[str, str]


@dataclass(frozen=True)
class Trained:
    """What training came to."""

    tuning: NormTuning | LoraTuning
    blocks: tuple[int, ...]
    parameters: int
    position: Position


def _judge(folder: Path, data: Data, request: HealRequest) -> tuple[list[float], list[float]]:
    """KL to the original and rise of the loss of a checkpoint on disk, by sequence of the text to judge by."""
    skeleton = Skeleton.open(folder, request.device, decode=reader_of(folder))
    size = request.schedule.batch_size
    batches = torch.split(data.original.tokens[list(data.judging)], size)
    klds, rises = distances(BlockStream(skeleton).logits(batches), data.original, data.judging, size)
    return klds.tolist(), rises.tolist()


@torch.no_grad()
def judged(student: Skeleton, data: Data, batch_size: int) -> tuple[list[float], list[float]]:
    """The same of a loaded model."""
    batches = torch.split(data.original.tokens[list(data.judging)], batch_size)
    answers = (student.model(input_ids=tokens.to(student.device), use_cache=False).logits for tokens in batches)
    klds, rises = distances(answers, data.original, data.judging, batch_size)
    return klds.tolist(), rises.tolist()


def finish(request: HealRequest, facts: Facts, data: Data, *, folder: Path, trained: Trained) -> HealRecord:
    """Everything but the rename. What was trained is written to `folder` only where it then measures no worse."""
    files, tuning = facts.student.files, trained.tuning
    probe_tokens = _probe_tokens(facts.student, request.schedule.seed)
    before, adapter_bytes = _judge(request.source.path, data, request), 0
    after, best = before, trained.position.best.step
    if best:
        write_checkpoint(files, tuning.tensors(), folder)
        if isinstance(tuning, LoraTuning) and tuning.packed:
            adapter_bytes = write_adapter(tuning, folder)
        after = _judge(folder, data, request)
    if not best or not mean(after[0]) <= mean(before[0]):
        best, after, adapter_bytes = 0, before, 0
        write_checkpoint(files, {}, folder)
        logits = probe_logits(folder, tuple(probe_tokens[0].tolist()), request.device)
    else:
        with torch.no_grad(), tuning.as_stored():
            logits = facts.student.model(input_ids=probe_tokens.to(facts.student.device), use_cache=False).logits
    record = _record(request, facts, data, trained=trained, figures=(before, after))
    record = record.model_copy(update={"best_step": best, "adapter_bytes": adapter_bytes})
    _close(request, facts, folder, record=record, probe=probe_of(probe_tokens, logits.float()))
    return record


def _probe_tokens(skeleton: Skeleton, seed: int) -> torch.Tensor:
    text_config = skeleton.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(text_config, "max_position_embeddings", None) or PROBE_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(int(text_config.vocab_size), (1, length), generator=generator)


def _record(
    request: HealRequest,
    facts: Facts,
    data: Data,
    *,
    trained: Trained,
    figures: tuple[tuple[list[float], list[float]], tuple[list[float], list[float]]],
) -> HealRecord:
    (kld_before, rise_before), (kld, rise) = figures
    position, length = trained.position, int(data.original.tokens.shape[1])
    return HealRecord(
        llmcompress=__version__,
        healed=request.source.name,
        healed_digest=facts.digest,
        against=request.against.name,
        against_digest=facts.against_digest,
        request=facts.asked,
        command=request.command,
        method=str(request.method),
        at=request.places.at,
        blocks=trained.blocks,
        parameters=trained.parameters,
        settings=settings_of(request),
        steps=position.step,
        best_step=position.best.step,
        tokens=min(position.step * request.schedule.batch_size, len(data.training)) * length,
        calibration=facts.batches.source,
        calibration_text_digest=facts.batches.text_digest,
        held_out_before=position.history[0].kld,
        held_out=position.best.kld,
        kld_before=Figure.of(kld_before),
        kld=Figure.of(kld),
        change=Figure.of([new - old for new, old in zip(kld, kld_before, strict=True)]),
        rise_before=Figure.of(rise_before),
        rise=Figure.of(rise),
        sequences=len(kld),
    )


def _close(request: HealRequest, facts: Facts, folder: Path, *, record: HealRecord, probe: Probe) -> None:
    """The card and the record; then everything is opened again and must hold."""
    origin = Origin.of(request.source, facts.digest)
    commit_bytes(folder / "README.md", healed_card(request.source.path, origin, record).encode())
    if (request.source.path / RECORD_NAME).is_file():
        known = read_record(request.source.path)
        known = known.model_copy(
            update={"healing": (*known.healing, record), "files": file_records(folder), "probe": probe}
        )
    else:
        known = OutputRecord(
            llmcompress=__version__,
            origin=origin,
            request=facts.asked,
            calibration_text_digest=facts.batches.text_digest,
            probe=probe,
            environment=environment(),
            files=file_records(folder),
            healing=(record,),
        )
    commit_json(folder / RECORD_NAME, known.model_dump(mode="json"))
    require(verify(folder, request.device))
