"""report.json: strict, versioned, and readable without torch."""

import json
import math
import subprocess
import sys

import pytest

from llmcompress.errors import InputError
from llmcompress.eval.fidelity import SequenceFidelity
from llmcompress.eval.report import DataFacts, EvalReport, Footprint, ModelFacts, json_schema, per_sequence, summarize
from llmcompress.files import to_json


def sequence(kld: float, difference: float = 0.01) -> SequenceFidelity:
    return SequenceFidelity(
        positions=10, kld=kld, kld_spread=0.1, kld_largest=kld * 4, nll_reference=2.0, nll_candidate=2.0 + difference,
        top1=0.9, finite=math.isfinite(kld),
    )  # fmt: skip


def report(sequences: list[SequenceFidelity]) -> EvalReport:
    model = ModelFacts(name="m", model_digest="d")
    return EvalReport(
        model=model,
        ref=model,
        data=DataFacts(
            source="builtin", text_digest="t", tokens_digest="k", tokenizer_digest="z", sequences=3,
            sequence_length=10, seed=0,
        ),
        finite=all(s.finite for s in sequences),
        summary=summarize(sequences),
        per_sequence=per_sequence(sequences),
        footprint=Footprint(
            shard_bytes=1, directory_bytes=2, reference_shard_bytes=3, parameters=4, quantized_weights=5,
            bits_per_weight=3.5, file_bits_per_weight=6.0,
        ),
        environment={},
        command="c",
        date="2026-01-01",
    )  # fmt: skip


def test_round_trip_and_no_unknown_keys() -> None:
    found = report([sequence(0.1), sequence(0.2), sequence(0.15)])
    document = found.model_dump(mode="json")
    assert EvalReport.parse(to_json(document), "report.json") == found
    with pytest.raises(InputError, match="surprise"):
        EvalReport.parse(json.dumps(document | {"surprise": 1}), "report.json")
    assert json_schema()["properties"]["schema_version"]["const"] == "1"


def test_summary_is_the_arithmetic_of_the_arrays() -> None:
    found = summarize([sequence(0.1, 0.02), sequence(0.2, 0.01), sequence(0.15, 0.03)])
    assert found.kld.mean == pytest.approx(0.15)
    assert found.dnll.mean == pytest.approx(0.02)
    assert found.perplexity_reference == pytest.approx(math.exp(2.0))
    assert found.perplexity_candidate == pytest.approx(math.exp(2.02))
    assert found.perplexity_ratio.mean == pytest.approx(math.exp(0.02))
    assert found.kld_largest_position == pytest.approx(0.8)
    assert found.kld_quantiles[0].value == pytest.approx(0.15)


def test_what_is_not_finite_becomes_null_and_is_said() -> None:
    found = report([sequence(0.1), sequence(math.nan), sequence(0.2)])
    assert found.finite is False
    assert found.summary.kld.mean is None
    assert found.per_sequence.kld[1] is None
    assert "NaN" not in to_json(found.model_dump(mode="json"))


def test_reading_a_report_needs_no_torch() -> None:
    code = (
        "import sys, llmcompress.eval.report; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
