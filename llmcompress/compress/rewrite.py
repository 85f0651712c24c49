"""Rewrite a model before it is scored: a checkpoint of its own that computes the same and quantizes better.

Rewrites of blocks see one block at a time, on text that runs through what was stored so far. Those of the whole model
(`SCOPE == "model"`) come first and hold all of it in memory. Everything after this, from scores to the last shard,
takes the new checkpoint for its source.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.measuring import sequence_kld
from llmcompress.compress.output import copy_side_files
from llmcompress.compress.rewriting.clipping import ActivationQuantizer
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.compress.rewriting.work import Call, Rewritten, Subject
from llmcompress.compress.shards import INDEX_NAME, ShardMap, index_document, write_shard
from llmcompress.errors import InputError
from llmcompress.files import commit_bytes, commit_json, sync_folder
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import unseen_tokens
from llmcompress.options import RewriteOptions
from llmcompress.plugins import find
from llmcompress.types import RewriteOutcome, RewriteRecord

REPARAM = "llmcompress.compress.reparam"
RECORD_NAME = "rewriting.json"


@dataclass(frozen=True)
class RewriteJob:
    """What is rewritten, and how. `batches` are int64 `(batch, tokens)`, `probe` a short one to check edits with."""

    source: Path
    options: RewriteOptions
    batches: Sequence[Tensor]
    probe: Tensor
    device: str = "cpu"

    def methods(self, scope: str) -> list[tuple[str, ModuleType]]:
        """The methods of a scope with their names, in order. Raises InputError for one there is not."""
        found = [(name, find(REPARAM, name)) for name in self.options.methods]
        return [(name, module) for name, module in found if scope == module.SCOPE]


def check_methods(names: Sequence[str]) -> bool:
    """Whether one of these rewrites holds the whole model in memory. Raises InputError for a name there is not."""
    return any(find(REPARAM, name).SCOPE == "model" for name in names)


def rewrite(job: RewriteJob, folder: Path) -> Iterator[RewriteOutcome]:
    """Write the rewritten model into `folder`, which appears once it is complete; yields what was done on the way.

    Raises InputError where a rewrite cannot be done, or where the model's own class cannot hold its result.
    """
    staging, whole = folder.with_name(folder.name + ".partial"), folder.with_name(folder.name + ".whole")
    for path in (staging, whole):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    try:
        outcomes: list[RewriteOutcome] = []
        source = job.source
        if job.methods("model"):
            for outcome in _rewrite_whole(job, whole):
                outcomes.append(outcome)
                yield outcome
            source = whole
        for outcome in _BlockRewriter(replace(job, source=source), staging).run():
            outcomes.append(outcome)
            yield outcome
        copy_side_files(job.source, staging)
        record = RewriteRecord(outcomes=tuple(outcomes), storing_kld=_storing_kld(job, staging))
        commit_json(staging / RECORD_NAME, record.model_dump(mode="json"))
        sync_folder(staging)
        staging.rename(folder)
        sync_folder(folder.parent)
    finally:
        for path in (staging, whole):
            shutil.rmtree(path, ignore_errors=True)


def read_rewriting(folder: Path) -> RewriteRecord:
    """What was done to make a rewritten model."""
    return RewriteRecord.parse((folder / RECORD_NAME).read_bytes(), RECORD_NAME)


def _outcome(method: str, block: int | None, result: Rewritten) -> RewriteOutcome:
    if not result.native:
        raise InputError(
            f"rewrite {method}: {'; '.join(result.notes) or 'the result is not of the model’s own class'}",
            f"leave {method} out of rewrite.methods, or change its options",
        )
    sites, notes = len(result.sites), result.notes
    return RewriteOutcome(
        method=method, block=block, sites=sites, fallbacks=result.fallbacks, difference=result.difference, notes=notes
    )


def _rewrite_whole(job: RewriteJob, folder: Path) -> Iterator[RewriteOutcome]:
    """Rewrites of the whole model, saved by transformers in the dtype of most of its weights."""
    skeleton = Skeleton.open(job.source, job.device)
    if skeleton.names.converted:
        raise InputError(
            f"weights of a {skeleton.config.model_type} are merged while loading, and cannot be taken apart again",
            f"leave out {', '.join(name for name, _ in job.methods('model'))}",
        )
    skeleton.load_rest()
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index)
    model: Any = skeleton.model
    calls = [_whole_call(tokens, skeleton) for tokens in job.batches]
    for name, module in job.methods("model"):
        result = module.rewrite(Subject(model, calls, _whole_call(job.probe, skeleton)), job.options)
        yield _outcome(name, None, result)
    sizes: dict[str, int] = {}
    for entry in skeleton.files.tensors.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.elements
    model.to(TORCH_DTYPES[max(sizes, key=sizes.__getitem__)]).save_pretrained(folder)


def _whole_call(tokens: Tensor, skeleton: Skeleton) -> Call:
    return Call((), {"input_ids": tokens.to(skeleton.device), "use_cache": False})


class _BlockRewriter:
    """Rewrites of blocks, each stored before the next is looked at."""

    def __init__(self, job: RewriteJob, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.skeleton = Skeleton.open(job.source, job.device)
        blocks = tuple(self.skeleton.block_tensors(index) for index in range(len(self.skeleton.blocks)))
        rest = self.skeleton.rest_tensors()
        self.shards = ShardMap((rest, *blocks), self.skeleton.files.tensors, {}, "BF16")
        self.limits: dict[str, Tensor] = {}
        self.quantizers: dict[str, ActivationQuantizer] = {}

    def run(self) -> Iterator[RewriteOutcome]:
        """Every block in turn, then the small files."""
        shards, skeleton = self.shards, self.skeleton
        self._write(0, {})
        if self.job.methods("block"):
            yield from self._blocks()
        else:
            for place in range(1, len(shards.shards)):
                self._write(place, {})
        Hints(self.quantizers, self.limits).write(self.folder)
        commit_bytes(self.folder / "config.json", (self.job.source / "config.json").read_bytes())
        layouts = [(shards.name(place), shards.layout(place, {})) for place in range(len(shards.shards))]
        commit_json(self.folder / INDEX_NAME, index_document(layouts, skeleton.parameters))

    def _write(self, place: int, changed: Mapping[str, Tensor]) -> None:
        shards = self.shards
        entries = {name: shards.entries[name] for name in shards.shards[place]}
        write_shard(self.folder / shards.name(place), shards.layout(place, {}), {**entries, **changed})

    def _blocks(self) -> Iterator[RewriteOutcome]:
        stream = BlockStream(self.skeleton)
        text = len(self.job.batches)
        hidden, calls = stream.start([*self.job.batches, self.job.probe, *self._unseen()])
        self.skeleton.free_rest()
        for index in range(len(self.skeleton.blocks)):
            block = self.skeleton.load_block(index)
            here = [call[index] for call in calls]
            given = [Call((state, *call.args), call.kwargs) for state, call in zip(hidden, here, strict=True)]
            before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
            methods = self.job.methods("block")
            subject = Subject(block, given[:text], given[text], unseen=given[text + 1 :])
            for place, (name, module) in enumerate(methods):
                result = module.rewrite(subject, self.job.options)
                yield _outcome(name, index, result)
                self._keep_hints(index, name, result, last=place == len(methods) - 1)
            self._write(index + 1, self._stored(index, block, before))
            with torch.no_grad():  # not around all of it: a generator would leave gradients off for its caller
                hidden = [stream.run_block(index, *pair) for pair in zip(hidden, here, strict=True)]
            self.skeleton.free(block)

    def _unseen(self) -> list[Tensor]:
        """Tokens that the text lacks, for the rewrite that sets static ranges."""
        options = self.job.options
        if "repquant" not in options.methods or not options.repquant.unseen:
            return []
        vocabulary = int(self.skeleton.config.get_text_config().vocab_size)
        return unseen_tokens(self.job.batches, vocabulary, most=options.tokens)

    def _keep_hints(self, index: int, method: str, result: Rewritten, *, last: bool) -> None:
        """Note what rounding should know. Raises InputError where a later rewrite would make it untrue."""
        if (result.limits or result.quantizers) and not last:
            raise InputError(f"rewrite {method}: its ranges hold for what it leaves", f"name {method} last")
        start = self.skeleton.block_name(index)
        self.limits |= {f"{start}.{linear}": limit for linear, limit in result.limits.items()}
        self.quantizers |= {f"{start}.{linear}": found for linear, found in result.quantizers.items()}

    def _stored(self, index: int, block: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file that changed, as they will be read; the block is made to hold the same."""
        changed = {}
        start = self.skeleton.block_name(index) + "."
        after = dict(block.named_parameters())
        for name in self.skeleton.block_tensors(index):
            local = self.skeleton.names.module_of[name].removeprefix(start)
            parameter = after.get(local)
            if parameter is None or (local in before and torch.equal(parameter, before[local])):
                continue  # buffers, and what no rewrite touched
            entry = self.shards.entries[name]
            if name in self.skeleton.names.converted or tuple(parameter.shape) != entry.shape:
                raise InputError(
                    f"{name} is merged or split while loading, and cannot be stored rewritten",
                    f"leave out {', '.join(self.job.options.methods)}",
                )
            stored = parameter.detach().to(TORCH_DTYPES[entry.dtype])
            if not bool(torch.isfinite(stored).all()):
                raise InputError(f"{name} rewritten does not fit {entry.dtype}", "convert the model to bfloat16 first")
            parameter.data.copy_(stored)
            changed[name] = stored.cpu()
        return changed


@torch.no_grad()
def _storing_kld(job: RewriteJob, folder: Path) -> float:
    """KL in nats per token from the source to what was stored, on the probe."""
    logits = [next(iter(BlockStream(Skeleton.open(x, job.device)).logits([job.probe]))) for x in (job.source, folder)]
    before, after = (torch.log_softmax(found.float(), -1) for found in logits)
    return float(sequence_kld(before, after).mean())
