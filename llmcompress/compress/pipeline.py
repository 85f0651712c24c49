"""The first half of the chain as functions of values: open, trace, read text, score. `planning.py` goes on."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low

import torch
from torch import Tensor

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.candidates import broken, resolve, sparing, tie_experts, unformatted
from llmcompress.compress.formats import maker
from llmcompress.compress.journal import Journal, check_output
from llmcompress.compress.rewrite import RewriteJob, check_methods, read_rewriting, rewrite
from llmcompress.compress.rewriting.hints import NAME as HINTS_NAME
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.compress.scoring import SCORERS, ScoreJob, run_scorers
from llmcompress.compress.settling import settled
from llmcompress.compress.shards import ShardMap, scale_dtype, shard_map
from llmcompress.hub.source import Source
from llmcompress.model.checkpoint import TORCH_DTYPES, folder_bytes
from llmcompress.model.crew import ALONE, Crew
from llmcompress.model.integrity import digest_source, nonfinite, scan
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import Batches, TextRequest, load_tokenizer, sample_tokens, token_batches
from llmcompress.model.trace import trace
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.runtime.attention import install
from llmcompress.runtime.skipping import SkipRecord
from llmcompress.types import Candidate, LayerScore, LinearSpec, ModelTrace, RewriteRecord, ScoreFile, Scores

QUANTIZERS = "llmcompress.compress.quantizers"
WORKING_SCORERS = ("working_point",)  # their figures depend on a base width
PROBE_TOKENS = 32
NO_SCORER = "none"  # in place of a scorer, where every linear has one candidate


@dataclass(frozen=True)
class Opened:
    """A validated model, traced, with the formats its linears could get.

    `rewriting` says what was done to it before, if anything was, and `hints` what rounding should know of that;
    `nonfinite` are tensors with NaN or infinity that the user allows, `kept` says of linears why they get no format.
    """

    source: Source
    skeleton: Skeleton
    trace: ModelTrace
    shards: ShardMap
    candidates: Mapping[str, tuple[LinearSpec, ...]]
    context_tokens: int | None
    source_bytes: int
    rewriting: RewriteRecord | None = None
    hints: Hints = field(default_factory=Hints)
    nonfinite: tuple[str, ...] = ()
    kept: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """sha256 over shard digests and config; scans the weights for NaN on the way. Process 0 does, for all."""
        skeleton = self.skeleton
        return str(skeleton.crew.first(lambda: digest_source(scan(skeleton.files), skeleton.files.config)))


def open_model(source: Source, recipe: Recipe, device: str, *, whole_file: bool = False) -> Opened:
    """Validate, build and trace a model; with `whole_file` its head may be quantized, too. Raises InputError."""
    check_methods(recipe.rewrite.methods)
    skeleton = Skeleton.open(source.path, device)
    quantizer, size = find(QUANTIZERS, recipe.quantizer), recipe.plan.group_size
    make = maker(quantizer, recipe.quantize, size)
    make_experts = maker(quantizer, recipe.quantize.model_copy(update={"inputs": "none"}), size)
    traced = tie_experts(trace(skeleton), recipe.plan.experts, make_experts)
    if recipe.quantize.rounds_attention:
        install(skeleton.model)
    files = skeleton.files
    resolved = resolve(traced, recipe.plan, whole_file, make=make, make_experts=make_experts)
    candidates = settled(traced, resolved, recipe)
    bad = nonfinite(files)
    kept = unformatted(traced, resolved, candidates, recipe.plan.runtime) | broken(traced, bad)
    if (record := SkipRecord.of(files.config)) is not None:  # zeros, as cheap as they can be
        candidates = {name: specs[:1] if record.covers(name) else specs for name, specs in candidates.items()}
    candidates = sparing(candidates, kept)
    return Opened(
        source=source,
        skeleton=skeleton,
        nonfinite=bad,
        kept=kept,
        trace=traced,
        shards=shard_map(skeleton, traced, scale_dtype(files.tensors), quantized=candidates, options=recipe.quantize),
        candidates=candidates,
        context_tokens=getattr(skeleton.config.get_text_config(), "max_position_embeddings", None),
        source_bytes=sum((source.path / name).stat().st_size for name in files.shards),
    )


def needs_data(recipe: Recipe) -> bool:
    """Whether a recipe's scorer, its quantizer or the ranges of inputs want calibration text."""
    scorer, quantizer = find(SCORERS, recipe.scorer), find(QUANTIZERS, recipe.quantizer)
    inputs = recipe.quantize.input_spec
    ranges = recipe.quantize.rounds_attention or (inputs is not None and inputs.scale == "tensor")
    return bool(scorer.NEEDS_DATA or quantizer.NEEDS_HESSIAN or recipe.rewrite.methods or ranges)


def text_request(opened: Opened, recipe: Recipe) -> TextRequest:
    """What to read for calibration; sequences never exceed the model's context."""
    part = recipe.calibration
    length = min(part.sequence_length, opened.context_tokens or part.sequence_length)
    return TextRequest(part.source, part.samples, length, recipe.seed, "calibration")


def calibration(opened: Opened, recipe: Recipe) -> Batches:
    """The calibration tokens of a run. Raises InputError where the text is missing or too short."""
    found = read_text(text_request(opened, recipe), opened.skeleton)
    opened.skeleton.crew.same(found.digest, "calibration text")
    return found


def read_text(request: TextRequest, skeleton: Skeleton) -> Batches:
    """Tokens of a model's text, or sampled from the model. Raises InputError where the text is missing or too short."""
    folder = skeleton.files.folder
    if request.spec != "self":
        return token_batches(request, folder)
    skeleton.load_rest()
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index)
    tokens = sample_tokens(
        skeleton.model,
        load_tokenizer(folder),
        samples=request.samples,
        sequence_length=request.sequence_length,
        seed=request.seed,
    )
    skeleton.free(skeleton.model)
    return Batches(tokens.cpu(), "self", hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest())


NO_DATA = Batches(torch.empty((0, 0), dtype=torch.int64), "none", hashlib.sha256(b"").hexdigest())


def settings_digest(recipe: Recipe, scorer: str, working_bits: int | None) -> str:
    """What the figures of a scorer depend on besides model and text: candidates, rounding, options."""
    parts = {
        "scorer": scorer,
        "quantizer": recipe.quantizer,
        "bits": recipe.plan.bits,
        "group_size": recipe.plan.group_size,
        "pin": recipe.plan.pin,
        "candidates": recipe.plan.candidates,
        "head_bits": recipe.plan.head_bits,
        "experts": recipe.plan.experts,
        "rounding": recipe.quantize.model_dump(mode="json"),
        "options": recipe.score.model_dump(mode="json"),
        "working_bits": working_bits if scorer in WORKING_SCORERS else None,
    }
    if recipe.plan.runtime != "any":
        parts["runtime"] = recipe.plan.runtime
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def score_batches(recipe: Recipe, batches: Batches) -> Batches:
    """The part of the calibration text that scorers read."""
    return Batches(batches.tokens[: recipe.calibration.score_samples], batches.source, batches.text_digest)


def score_job(opened: Opened, recipe: Recipe, batches: Batches, working_bits: int | None = None) -> ScoreJob:
    """What scorers are given; `batches` is the whole calibration text."""
    return ScoreJob(
        skeleton=opened.skeleton,
        trace=opened.trace,
        batches=score_batches(recipe, batches),
        candidates=opened.candidates,
        scale_dtype=TORCH_DTYPES[opened.shards.scale_dtype],
        quantizer=find(QUANTIZERS, recipe.quantizer),
        rounding=recipe.quantize,
        options=recipe.score,
        batch_size=recipe.calibration.batch_size,
        seed=recipe.seed,
        working_bits=working_bits,
    )


def score_all(
    opened: Opened,
    recipe: Recipe,
    batches: Batches,
    *,
    scorers: Sequence[str],
    model_digest: str,
    working_bits: int | None = None,
) -> tuple[Scores, ...]:
    """Run scorers by name, those that only watch in one pass. Raises InputError when the text does not fit."""
    job = score_job(opened, recipe, batches, working_bits)
    return tuple(
        Scores(
            scorer=name,
            unit=find(SCORERS, name).UNIT,
            model_digest=model_digest,
            calibration_digest=job.batches.digest,
            settings_digest=settings_digest(recipe, name, working_bits),
            seed=recipe.seed,
            layers=measured.layers,
            series=measured.series,
        )
        for name, measured in run_scorers(scorers, job).items()
    )


def _nothing_to_choose(opened: Opened, recipe: Recipe, batches: Batches, model_digest: str) -> Scores:
    """Scores where every linear has one candidate: no measure could change the outcome, so none is taken."""
    layers = tuple(
        LayerScore(linear=name, candidates=tuple(Candidate(spec=spec, damage=0.0) for spec in specs))
        for name, specs in opened.candidates.items()
    )
    return Scores(
        scorer=NO_SCORER,
        unit="unitless",
        model_digest=model_digest,
        calibration_digest=score_batches(recipe, batches).digest,
        settings_digest=settings_digest(recipe, NO_SCORER, None),
        seed=recipe.seed,
        layers=layers,
    )


def score(opened: Opened, recipe: Recipe, batches: Batches, model_digest: str) -> Scores:
    """Run the recipe's scorer, where there is anything to choose."""
    if all(len(specs) == 1 for specs in opened.candidates.values()):
        return _nothing_to_choose(opened, recipe, batches, model_digest)
    return score_all(opened, recipe, batches, scorers=(recipe.scorer,), model_digest=model_digest)[0]


def probe_tokens(opened: Opened, seed: int) -> Tensor:
    """A short random input, int64 `(1, tokens)`: the same for every run of a seed."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(opened.skeleton.config.get_text_config().vocab_size)
    length = min(PROBE_TOKENS, opened.context_tokens or PROBE_TOKENS)
    return torch.randint(vocabulary, (1, length), generator=generator)


def rewrite_job(opened: Opened, recipe: Recipe, batches: Batches) -> RewriteJob:
    """The rewrites of a recipe, on the text that scorers read."""
    options, awq = recipe.rewrite, recipe.rewrite.awq
    bits, group_size = awq.bits or median_low(recipe.plan.bits), awq.group_size or recipe.plan.group_size
    return RewriteJob(
        source=opened.source.path,
        options=options.model_copy(update={"awq": awq.model_copy(update={"bits": bits, "group_size": group_size})}),
        batches=score_batches(recipe, batches).split(recipe.calibration.batch_size),
        probe=probe_tokens(opened, recipe.seed),
        device=str(opened.skeleton.device),
    )


def reopen(opened: Opened, recipe: Recipe, folder: Path, *, whole_file: bool) -> Opened:
    """The model as a rewrite left it in `folder`."""
    source, device = replace(opened.source, path=folder), str(opened.skeleton.device)
    found = open_model(source, recipe, device, whole_file=whole_file)
    found.skeleton.shelf, found.skeleton.crew = opened.skeleton.shelf, opened.skeleton.crew
    return replace(found, rewriting=read_rewriting(folder), hints=Hints.read(folder))


@contextmanager
def rewritten(opened: Opened, recipe: Recipe, batches: Batches, *, whole_file: bool = False) -> Iterator[Opened]:
    """The model a recipe scores: as it is, or rewritten in a temporary folder."""
    if not recipe.rewrite.methods:
        yield opened
        return
    with tempfile.TemporaryDirectory(prefix="llmcompress-") as place:
        folder = Path(place) / "rewritten"
        for _ in rewrite(rewrite_job(opened, recipe, batches), folder):
            pass
        yield reopen(opened, recipe, folder, whole_file=whole_file)


def rewrite_model(
    source: Source, recipe: Recipe, output: Path, *, device: str, force: bool = False
) -> tuple[RewriteRecord, int]:
    """Write a rewritten model to `output`, which appears by one rename; returns what was done and its size in bytes.

    Raises InputError, and BusyError where another run holds the output.
    """
    check_output(output, source.path, force)
    opened = open_model(source, recipe, device)
    scan(opened.skeleton.files)
    batches, journal = calibration(opened, recipe), Journal(output)
    with journal.in_one_go():
        check_output(output, source.path, force)
        made = journal.state / "rewritten"
        for _ in rewrite(rewrite_job(opened, recipe, batches), made):
            pass
        made.rename(journal.partial)
        record = read_rewriting(journal.partial)
        (journal.partial / HINTS_NAME).unlink()  # for rounding in the same run, and not a shard
        size = folder_bytes(journal.partial)
        journal.publish(force)
    return record, size


def request_of(opened: Opened, recipe: Recipe, batches: Batches, model_digest: str, budget: Budget) -> dict[str, str]:
    """What a run was asked, as digests: a resumed run must agree on every one."""
    return {
        "model": model_digest,
        "recipe": recipe.digest(),
        "calibration tokens": batches.digest,
        "budget": budget.text,
        "algorithm": "4",
    }


def score_file(
    source: Source,
    recipe: Recipe,
    device: str,
    scorers: Sequence[str] = (),
    *,
    fit: Callable[[Opened, Recipe, bool], Recipe] | None = None,
    crew: Crew = ALONE,
) -> ScoreFile:
    """Open a model and score it with the recipe's scorer, or with those named. Raises InputError.

    `fit` makes the recipe keep to a limit of memory, and is told whether text is read.
    """
    opened = open_model(source, recipe, device)
    opened.skeleton.join(crew)
    names = tuple(scorers) or (recipe.scorer,)
    wants = bool(recipe.rewrite.methods) or any(find(SCORERS, name).NEEDS_DATA for name in names)
    recipe = fit(opened, recipe, wants) if fit is not None else recipe
    batches = calibration(opened, recipe) if wants else NO_DATA
    with rewritten(opened, recipe, batches) as opened:
        found = score_all(opened, recipe, batches, scorers=names, model_digest=opened.digest())
    return as_score_file(opened, recipe, found)


def as_score_file(opened: Opened, recipe: Recipe, found: tuple[Scores, ...]) -> ScoreFile:
    """Scores with what is needed to plan from them without the model."""
    blank = {layer.linear: "" for scores in found for layer in scores.layers if not layer.candidates}
    specs = {name: options[0] for name, options in sparing(opened.candidates, blank).items()}
    bits = sum(specs[x.name].storage_bits(x.rows, x.columns) for x in opened.trace.linears if x.name in specs)
    return ScoreFile(
        model=opened.source.name,
        trace=opened.trace,
        scores=found,
        group_size=recipe.plan.group_size,
        other_bytes=opened.shards.file_bytes(specs) - bits // 8,
    )
