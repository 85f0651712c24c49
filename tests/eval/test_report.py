"""report.json: strict, versioned, and readable without torch."""

import json
import math
import subprocess
import sys

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.eval.fidelity import SequenceFidelity, compare
from llmcompress.eval.report import (
    DataFacts,
    EvalReport,
    Footprint,
    ModelFacts,
    PerSequence,
    json_schema,
    per_sequence,
    perplexity,
    summarize,
)
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
    assert json_schema()["properties"]["schema_version"]["default"] == "2"


def test_files_of_version_one_open_and_hold_nothing_newer() -> None:
    document = report([sequence(0.1), sequence(0.2)]).model_dump(mode="json")
    newer = ("tokens", "trajectory", "costs", "sampling", "speed", "reference_tasks", "harness")
    old = {key: value for key, value in document.items() if key not in newer} | {"schema_version": "1"}
    for key in ("resident_bytes", "reference_resident_bytes"):
        del old["footprint"][key]
    assert EvalReport.parse(json.dumps(old), "report.json").tokens is None
    error = [{"block": 0, "relative_error": 0.1, "cosine": 0.9}]
    assert EvalReport.parse(json.dumps(document | {"trajectory": error}), "report.json").trajectory[0].cosine == 0.9
    with pytest.raises(InputError, match="figures of version 2"):
        EvalReport.parse(json.dumps(old | {"trajectory": error}), "report.json")


def test_summary_is_the_arithmetic_of_the_arrays() -> None:
    found = summarize([sequence(0.1, 0.02), sequence(0.2, 0.01), sequence(0.15, 0.03)])
    assert found.kld.mean == pytest.approx(0.15)
    assert found.dnll.mean == pytest.approx(0.02)
    assert found.perplexity_reference == pytest.approx(math.exp(2.0))
    assert found.perplexity_candidate == pytest.approx(math.exp(2.02))
    assert found.perplexity_ratio.mean == pytest.approx(math.exp(0.02))
    assert found.kld_largest_position == pytest.approx(0.8)
    assert found.kld_quantiles[0].value == pytest.approx(0.15)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_becomes_null_and_is_said(bad: float) -> None:
    found = report([sequence(0.1), sequence(bad), sequence(0.2)])
    assert found.finite is False
    assert found.summary.kld.mean is None
    assert found.summary.design_effect is None
    assert found.per_sequence.kld[1] is None
    assert "NaN" not in to_json(found.model_dump(mode="json"))
    assert EvalReport.parse(to_json(found.model_dump(mode="json")), "report.json") == found


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_largest_position_is_null_wherever_the_bad_sequence_stands(place: int) -> None:
    values = [0.1, 0.3, 0.2]
    values[place] = math.nan
    assert summarize([sequence(v) for v in values]).kld_largest_position is None


def test_perplexity_is_that_of_all_predicted_tokens_together() -> None:
    source = torch.Generator().manual_seed(0)
    sequences, losses = [], torch.zeros(2, dtype=torch.float64)
    for length in (5, 9):  # unequal, so that weighing sequences alike would be seen
        pair = torch.randn(2, 1, length, 11, generator=source)
        tokens = torch.randint(11, (1, length), generator=source)
        sequences += compare(pair[0], pair[1], tokens)
        for side in (0, 1):
            losses[side] += torch.nn.functional.cross_entropy(
                pair[side, 0, :-1].double(), tokens[0, 1:], reduction="sum"
            )
    assert perplexity(sequences) == pytest.approx((losses / 12).exp().tolist())


def test_a_model_against_itself_has_ratio_one() -> None:
    same = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(1))
    found = summarize(compare(same, same.clone(), torch.zeros(3, 6, dtype=torch.int64)))
    for estimate, value in ((found.kld, 0.0), (found.top1, 1.0), (found.perplexity_ratio, 1.0)):
        assert (estimate.mean, estimate.low, estimate.high) == (value, value, value)


def test_a_figure_too_large_to_say_is_null_and_an_interval_is_whole_or_absent() -> None:
    ratio = summarize([sequence(0.1, 900.0), sequence(0.2, 901.0)]).perplexity_ratio
    assert (ratio.mean, ratio.low, ratio.high) == (None, None, None)
    ratio = summarize([sequence(0.1, 1.0), sequence(0.2, 300.0)]).perplexity_ratio
    assert ratio.mean == pytest.approx(math.exp(150.5))
    assert (ratio.low, ratio.high) == (None, None)


def test_one_sequence_has_no_interval_and_none_is_refused() -> None:
    one = summarize([sequence(0.1)])
    assert (one.kld.mean, one.kld.low, one.kld.high, one.design_effect) == (0.1, None, None, None)
    with pytest.raises(InputError, match="no sequences"):
        summarize([])


def test_a_report_that_contradicts_itself_is_refused() -> None:
    document = report([sequence(0.1), sequence(math.nan)]).model_dump(mode="json")
    with pytest.raises(InputError, match="finite is true"):
        EvalReport.parse(to_json(document | {"finite": True}), "report.json")
    arrays = document["per_sequence"]
    with pytest.raises(InputError, match=r"per_sequence.*different lengths"):
        EvalReport.parse(to_json(document | {"per_sequence": arrays | {"top1": [0.9]}}), "report.json")
    with pytest.raises(ValueError, match="different lengths"):
        PerSequence(seq_ids=(0, 1), kld=(0.1,), dnll=(0.1,), nll_reference=(0.1,), top1=(0.1,))


def test_tasks_take_the_rows_lm_eval_writes() -> None:
    row = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "sample_len": 10}
    document = report([sequence(0.1), sequence(0.2)]).model_dump(mode="json") | {"tasks": {"arc": row}}
    assert EvalReport.parse(to_json(document), "report.json").tasks == {"arc": row}


def test_reading_a_report_needs_no_torch() -> None:
    code = (
        "import sys, llmcompress.eval.report; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
