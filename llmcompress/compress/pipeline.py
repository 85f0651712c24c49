"""The whole chain as functions of values: open, trace, score, plan. Carrying the plan out is in `run.py`."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.allocate.spend import narrower_widths, priced, spend, with_widths
from llmcompress.compress.scoring import ScoreJob, candidates_for
from llmcompress.compress.shards import ShardMap, shard_map
from llmcompress.compress.trial import TrialJob, measure_allocations
from llmcompress.errors import InputError
from llmcompress.model.hub import Source
from llmcompress.model.integrity import digest_source, scan
from llmcompress.model.preflight import check_tokenizer
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import Batches, TextRequest, load_tokenizer, sample_tokens, token_batches
from llmcompress.model.trace import trace
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.types import BitAllocation, LinearSpec, ModelTrace, Plan, ScoreFile, Scores, Trial

SCORERS = "llmcompress.compress.scorers"
QUANTIZERS = "llmcompress.compress.quantizers"
RIVAL = "hessian"
PROBE_TOKENS = 32


@dataclass(frozen=True)
class Opened:
    """A validated model, traced, with the formats its linears could get."""

    source: Source
    skeleton: Skeleton
    trace: ModelTrace
    shards: ShardMap
    candidates: Mapping[str, tuple[LinearSpec, ...]]
    context_tokens: int | None
    source_bytes: int

    def digest(self) -> str:
        """sha256 over shard digests and config; scans the weights for NaN on the way."""
        return digest_source(scan(self.skeleton.files), self.skeleton.files.config)


def open_model(source: Source, recipe: Recipe, device: str) -> Opened:
    """Validate, build and trace a model. Raises InputError."""
    skeleton = Skeleton.open(source.path, device)
    text_config = skeleton.config.get_text_config()
    check_tokenizer(source.path, int(text_config.vocab_size))
    traced = trace(skeleton)
    files = skeleton.files
    halves = sum(1 for entry in files.tensors.values() if entry.dtype == "F16")
    scale_dtype = "F16" if halves * 2 > len(files.tensors) else "BF16"
    return Opened(
        source=source,
        skeleton=skeleton,
        trace=traced,
        shards=shard_map(skeleton, traced, scale_dtype),
        candidates=candidates_for(traced, recipe.plan.bits, recipe.plan.group_size),
        context_tokens=getattr(text_config, "max_position_embeddings", None),
        source_bytes=sum((source.path / name).stat().st_size for name in files.shards),
    )


def outside_linears(skeleton: Skeleton) -> tuple[str, ...]:
    """Linears outside the blocks (the head): never quantized, and named so in config.json."""
    inside = {id(module) for module in skeleton.blocks.modules()}
    return tuple(
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    )


def needs_data(recipe: Recipe) -> bool:
    """Whether a recipe's scorer or quantizer wants calibration text."""
    scorer, quantizer = find(SCORERS, recipe.scorer), find(QUANTIZERS, recipe.quantizer)
    return bool(scorer.NEEDS_DATA or quantizer.NEEDS_HESSIAN)


def text_request(opened: Opened, recipe: Recipe) -> TextRequest:
    """What to read for calibration; sequences never exceed the model's context."""
    part = recipe.calibration
    length = min(part.sequence_length, opened.context_tokens or part.sequence_length)
    return TextRequest(part.source, part.samples, length, recipe.seed, "calibration")


def calibration(opened: Opened, recipe: Recipe) -> Batches:
    """The calibration tokens of a run. Raises InputError where the text is missing or too short."""
    request = text_request(opened, recipe)
    if request.spec != "self":
        return token_batches(request, opened.source.path)
    skeleton = opened.skeleton
    skeleton.load_rest()
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index)
    tokens = sample_tokens(
        skeleton.model,
        load_tokenizer(opened.source.path),
        samples=request.samples,
        sequence_length=request.sequence_length,
        seed=request.seed,
    )
    skeleton.free(skeleton.model)
    return Batches(tokens.cpu(), "self", hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest())


NO_DATA = Batches(torch.empty((0, 0), dtype=torch.int64), "none", hashlib.sha256(b"").hexdigest())


def score(opened: Opened, recipe: Recipe, batches: Batches, model_digest: str) -> Scores:
    """Run the recipe's scorer. Raises InputError when the calibration tokens do not fit the model."""
    scorer = find(SCORERS, recipe.scorer)
    chosen = Batches(batches.tokens[: recipe.calibration.score_samples], batches.source, batches.text_digest)
    job = ScoreJob(
        skeleton=opened.skeleton,
        trace=opened.trace,
        batches=chosen,
        candidates=opened.candidates,
        scale_dtype=torch.float16 if opened.shards.scale_dtype == "F16" else torch.bfloat16,
        quantizer=find(QUANTIZERS, recipe.quantizer),
        rounding=recipe.quantize,
        options=recipe.score,
        batch_size=recipe.calibration.batch_size,
        seed=recipe.seed,
    )
    return Scores(
        scorer=recipe.scorer,
        unit=scorer.UNIT,
        model_digest=model_digest,
        calibration_digest=chosen.digest,
        seed=recipe.seed,
        layers=scorer.score(job),
    )


def make_plan(opened: Opened, recipe: Recipe, batches: Batches, scores: Scores, budget: Budget) -> Plan:
    """Spend the budget. Raises InputError with the nearest feasible budget when it is too small.

    With `plan.trials`, allocations from narrower sets of widths, and one that follows the local proxy
    loss, are carried out on calibration text as well, and the one with the least measured KL divergence
    is taken: sums of single damages mislead when damage is large.
    """
    size, file_bytes = recipe.plan.group_size, opened.shards.file_bytes
    allocations = [spend(opened.trace, scores, budget, group_size=size, file_bytes=file_bytes)]
    trials: tuple[Trial, ...] = ()
    if recipe.plan.trials and batches.tokens.numel():
        for rival in _rival_scores(opened, recipe, batches, scores=scores, first=allocations[0]):
            try:
                found = spend(opened.trace, rival, budget, group_size=size, file_bytes=file_bytes)
            except InputError:
                continue  # these widths alone cannot meet the budget
            if all(found.assigned != known.assigned for known in allocations):
                allocations.append(priced(found, scores, allocations[0]))
    if len(allocations) > 1:
        trials = run_trials(opened, recipe, batches, allocations)
        best = min(range(len(trials)), key=lambda place: trials[place].measured_kld)
        allocations = [allocations[best]]
    return Plan(
        model=opened.source.name,
        model_digest=scores.model_digest,
        calibration=batches.source,
        calibration_digest=batches.digest,
        scorer=scores.scorer,
        quantizer=recipe.quantizer,
        options=recipe.quantize,
        allocation=allocations[0],
        trials=trials,
        seed=recipe.seed,
        batch_size=recipe.calibration.batch_size,
    )


def _rival_scores(
    opened: Opened, recipe: Recipe, batches: Batches, *, scores: Scores, first: BitAllocation
) -> Iterator[Scores]:
    """Scores that lead to other plausible allocations: fewer widths, and the local proxy loss over two of them."""
    pairs = narrower_widths(first, recipe.plan.bits, opened.trace)
    for widths in pairs:
        yield with_widths(scores, widths)
    if pairs and scores.scorer != RIVAL and find(QUANTIZERS, recipe.quantizer).NEEDS_HESSIAN:
        fewer = {name: tuple(s for s in specs if s.bits in pairs[0]) for name, specs in opened.candidates.items()}
        local = recipe.model_copy(update={"scorer": RIVAL})
        yield score(replace(opened, candidates=fewer), local, batches, scores.model_digest)


def run_trials(opened: Opened, recipe: Recipe, batches: Batches, found: list[BitAllocation]) -> tuple[Trial, ...]:
    """Measure allocations on the calibration text: part of it to quantize with, the rest to judge by."""
    job = TrialJob(
        skeleton=opened.skeleton,
        trace=opened.trace,
        quantizer=find(QUANTIZERS, recipe.quantizer),
        options=recipe.quantize,
        dtype=torch.float16 if opened.shards.scale_dtype == "F16" else torch.bfloat16,
    )
    tokens = batches.tokens
    cut = min(recipe.calibration.score_samples, max(len(tokens) // 2, 1))
    parts = [list(torch.split(part, recipe.calibration.batch_size)) for part in (tokens[:cut], tokens[cut:])]
    measured = measure_allocations(job, found, *parts)
    return tuple(
        Trial(
            widths=tuple(sorted({a.spec.bits for a in allocation.assigned})),
            bits_per_weight=allocation.bits_per_weight,
            expected_damage=allocation.expected_damage,
            measured_kld=kld,
        )
        for allocation, kld in zip(found, measured, strict=True)
    )


def probe_tokens(opened: Opened, seed: int) -> Tensor:
    """A short random input, int64 `(1, tokens)`: the same for every run of a seed."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(opened.skeleton.config.get_text_config().vocab_size)
    length = min(PROBE_TOKENS, opened.context_tokens or PROBE_TOKENS)
    return torch.randint(vocabulary, (1, length), generator=generator)


def request_of(opened: Opened, recipe: Recipe, batches: Batches, model_digest: str, budget: Budget) -> dict[str, str]:
    """What a run was asked, as digests: a resumed run must agree on every one."""
    return {
        "model": model_digest,
        "recipe": recipe.digest(),
        "calibration tokens": batches.digest,
        "budget": budget.text,
        "algorithm": "1",
    }


def score_file(source: Source, recipe: Recipe, device: str) -> ScoreFile:
    """Open a model and score it: the whole of `llmcompress score`. Raises InputError."""
    opened = open_model(source, recipe, device)
    scorer = find(SCORERS, recipe.scorer)
    batches = calibration(opened, recipe) if scorer.NEEDS_DATA else NO_DATA
    found = score(opened, recipe, batches, opened.digest())
    specs = {name: options[0] for name, options in opened.candidates.items()}
    bits = sum(specs[x.name].storage_bits(x.rows, x.columns) for x in opened.trace.linears if x.name in specs)
    return ScoreFile(
        trace=opened.trace,
        scores=found,
        group_size=recipe.plan.group_size,
        other_bytes=opened.shards.file_bytes(specs) - bits // 8,
    )
