"""Reports, records and scores of models that do not exist, shared by tests of pages."""

import json
import random
from pathlib import Path
from typing import Any

import numpy
from synthetic_scores import make_file, path_series, usage_series

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.decide import decide, desk_of, pick
from llmcompress.eval.facts import (
    BlockCost,
    BlockError,
    Choice,
    Continuation,
    Flips,
    Histogram,
    PositionBin,
    Quantile,
    Sampling,
    Speed,
    Tempered,
    TokenFacts,
    TopTokens,
    WorstToken,
)
from llmcompress.eval.fidelity import SequenceFidelity
from llmcompress.eval.report import (
    DataFacts,
    Estimate,
    EvalReport,
    Footprint,
    ModelFacts,
    TaskDocuments,
    per_sequence,
    summarize,
)
from llmcompress.files import to_json
from llmcompress.options import QuantizerOptions
from llmcompress.types import BlockOutcome, LinearOutcome, Plan, ScoreFile, Trial

SEQUENCES = 32


def make_sequences(mean: float, *, seed: int = 0, count: int = SEQUENCES) -> list[SequenceFidelity]:
    """Sequences whose KL is about `mean`."""
    source = random.Random(seed)
    found = []
    for _ in range(count):
        kld = mean * source.uniform(0.6, 1.4)
        rise = kld * source.uniform(-0.5, 1.5)
        found.append(SequenceFidelity(512, kld, kld * kld, kld * 20, 2.1, 2.1 + rise, 1 - kld, finite=True))
    return found


def _tokens(words: str, worst: int = 10) -> TokenFacts:
    edges = tuple(float(x) for x in numpy.geomspace(1e-8, 100.0, 41))
    counts = tuple(0 if k < 4 or k > 34 else int(4000 * 0.8 ** abs(k - 26)) for k in range(40))
    choices = tuple(Choice(token_id=k, text=words + "abc"[k], probability=0.6 / (k + 1)) for k in range(3))
    return TokenFacts(
        kld_quantiles=tuple(
            Quantile(share=s, value=v) for s, v in ((0.5, 0.02), (0.9, 0.1), (0.95, 0.15), (0.99, 0.3), (0.999, 0.5))
        ),
        kld_by_position=tuple(PositionBin(first=16 * k, last=16 * k + 15, tokens=99, kld=0.04) for k in range(32)),
        kld_histogram=Histogram(edges=edges, counts=counts, below=3, above=0, not_finite=0),
        worst=tuple(
            WorstToken(sequence=k, position=9, before=f"def {words}\n\tx", following=words if k else None,
                       kld=3.0 / (k + 1), reference=choices, candidate=choices)
            for k in range(worst)
        ),
        flips=Flips(tokens=16352, changed=0.1, right_to_wrong=0.03, wrong_to_right=0.02, wrong_to_wrong=0.05,
                    accuracy_reference=0.55, accuracy_candidate=0.54),
        top=(TopTokens(k=10, overlap=0.9, kld=Estimate(mean=0.03, low=0.02, high=0.04)),),
    )  # fmt: skip


def _sampling() -> Sampling:
    one = Estimate(mean=17.0, low=12.0, high=22.0)
    return Sampling(
        temperatures=tuple(
            Tempered(temperature=t, kld=Estimate(mean=0.05 / t, low=0.04 / t, high=0.06 / t)) for t in (0.5, 1.0, 1.5)
        ),
        continuations=(
            Continuation(new_tokens=64, prompts=16, prompt_tokens=64, first_divergence=one, identical=0.1,
                         repetition_reference=one, repetition_candidate=one),
        ),
    )  # fmt: skip


def _speed(side: str) -> Speed:
    return Speed(side=side, batch=1, prompt_tokens=64, new_tokens=64, prefill_tokens_per_second=900.0,
                 decode_tokens_per_second=62.5, resident_bytes=10**9, peak_bytes=2 * 10**9, dtype="bfloat16",
                 device="cpu")  # type: ignore[arg-type]  # fmt: skip


def make_report(
    name: str = "small", *, mean: float = 0.05, words: str = "", seed: int = 0, **changes: Any
) -> EvalReport:
    """A report with every section filled; `words` of unknown origin wherever there can be any."""
    sequences = make_sequences(mean, seed=seed)
    size = Footprint(
        shard_bytes=3 * 10**9, directory_bytes=3 * 10**9 + 10**6, reference_shard_bytes=14 * 10**9,
        parameters=7 * 10**9, quantized_weights=6 * 10**9, bits_per_weight=3.48, file_bits_per_weight=3.43,
    )  # fmt: skip
    facts: dict[str, Any] = {
        "model": ModelFacts(name=name + words, model_digest="m" + name),
        "ref": ModelFacts(name="original" + words, model_digest="reference", revision=words or None),
        "data": DataFacts(
            source="builtin" + words, text_digest="t" * 64, tokens_digest="k" * 64, tokenizer_digest="z" * 64,
            sequences=SEQUENCES, sequence_length=512, seed=0,
        ),
        "finite": True,
        "summary": summarize(sequences),
        "per_sequence": per_sequence(sequences),
        "footprint": size,
        "tokens": _tokens(words),
        "costs": tuple(
            BlockCost(block=k, reference_seconds=0.5, candidate_seconds=0.4 + 0.01 * k, resident_bytes=10**9 + k)
            for k in range(8)
        ),
        "trajectory": tuple(BlockError(block=k, relative_error=0.02 * (k + 1), cosine=0.999) for k in range(-1, 8)),
        "sampling": _sampling(),
        "speed": (_speed("reference"), _speed("candidate")),
        "tasks": {"arc" + words: {"alias": "arc" + words, "acc,none": 0.51, "acc_stderr,none": 0.01}},
        "reference_tasks": {"arc" + words: {"alias": "arc", "acc,none": 0.53, "acc_stderr,none": 0.01}},
        "documents": {
            "arc": TaskDocuments(
                metric="acc", doc_ids=tuple(range(200)), reference=(1.0,) * 200, candidate=(1.0,) * 200
            ),
        },
        "environment": {"python": "3.11" + words},
        "command": "llmcompress eval out --ref original" + words,
        "date": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return EvalReport(**(facts | changes))


def make_plan(file: ScoreFile, words: str = "") -> Plan:
    """A plan for a score file, with trials."""
    allocation = decide(desk_of(file, pick(file)), parse_budget("3.5bits"))
    trials = tuple(
        Trial(label=f"uniform {k}{words}", widths=(k,), bits_per_weight=3.4, expected_damage=0.1, measured_kld=0.2 / k,
              standard_error=0.002)
        for k in (2, 3, 4)
    )  # fmt: skip
    return Plan(
        model=file.model + words, model_digest="m" * 64, calibration="builtin" + words, calibration_digest="c" * 64,
        scorer="fisher", quantizer="gptq", options=QuantizerOptions(), allocation=allocation, trials=trials, seed=0,
        batch_size=8,
    )  # fmt: skip


def make_blocks(file: ScoreFile) -> tuple[BlockOutcome, ...]:
    """Outcomes with a loss for every linear."""
    source = random.Random(1)
    return tuple(
        BlockOutcome(
            block=block.index, shard="s", fallbacks=(), seconds=0.0,
            linears=tuple(
                LinearOutcome(linear=x.name, bits=3, proxy_loss=1.0, relative_loss=10 ** source.gauss(-2, 0.4))
                for x in block.linears
            ),
        )
        for block in file.trace.blocks
    )  # fmt: skip


def scored(blocks: int) -> ScoreFile:
    """Scores with a trajectory and a void map among them."""
    file = make_file(blocks)
    series = (*path_series(blocks, (2, blocks - 1)), *usage_series(blocks))
    return file.model_copy(update={"scores": (file.scores[2].model_copy(update={"series": series}),)})


def make_run(folder: Path, *, blocks: int = 8, words: str = "", **changes: Any) -> Path:
    """A folder with report.json, llmcompress.json and scores.json that belong together."""
    folder.mkdir(parents=True, exist_ok=True)
    file = scored(blocks)
    plan = make_plan(file, words).model_dump(mode="json")
    found = [block.model_dump(mode="json") for block in make_blocks(file)]
    record = {
        "version": 1, "llmcompress": "0.1.0" + words, "plan": plan, "blocks": found,
        "recipe": {"a": {"b" + words: words}},
        "request": {"model": words}, "environment": {"torch": words},
        "files": [{"name": "model.safetensors" + words, "size_bytes": 9, "sha256": "0" * 64}],
    }  # fmt: skip
    report = make_report(folder.name, words=words, plan=plan, **changes)
    weights = sum(x.weights for x in file.trace.every)
    bits = plan["allocation"]["storage_bits"] / weights
    size = report.footprint.model_copy(update={"quantized_weights": weights, "bits_per_weight": bits})
    report = report.model_copy(update={"footprint": size})
    (folder / "report.json").write_text(to_json(report.model_dump(mode="json")))
    (folder / "llmcompress.json").write_text(json.dumps(record))
    (folder / "scores.json").write_text(file.model_dump_json())
    return folder
