"""What `eval` prints of a report."""

from llmcompress.cli.figures import lines_of, with_interval
from llmcompress.eval.facts import Estimate
from llmcompress.eval.report import DataFacts, EvalReport, Footprint, ModelFacts, PerSequence, Summary


def report(**more: object) -> EvalReport:
    one = Estimate(mean=0.5)
    return EvalReport(
        model=ModelFacts(name="m", model_digest="d"), ref=ModelFacts(name="r", model_digest="e"),
        data=DataFacts(
            source="builtin", text_digest="t", tokens_digest="k", tokenizer_digest="z", sequences=2, sequence_length=10,
            seed=0,
        ),
        finite=True,
        summary=Summary(
            level=0.95, kld=Estimate(mean=2e-5, low=0.0, high=0.1), kld_quantiles=(), kld_largest_position=0.1,
            dnll=one, perplexity_reference=None, perplexity_candidate=2.0, perplexity_ratio=one, top1=one,
            design_effect=None,
        ),
        per_sequence=PerSequence(seq_ids=(), kld=(), dnll=(), nll_reference=(), top1=()),
        footprint=Footprint(
            shard_bytes=1000, directory_bytes=2000, reference_shard_bytes=3000, parameters=4, quantized_weights=0,
            bits_per_weight=None, file_bits_per_weight=6.0,
        ),
        environment={}, command="c", date="2026-01-01", **more,
    )  # fmt: skip


def test_small_figures_keep_their_digits_and_intervals_are_whole() -> None:
    assert with_interval(Estimate(mean=None)) == "not finite"
    assert with_interval(Estimate(mean=0.25)) == "0.25000"
    assert with_interval(Estimate(mean=2e-5, low=0.0, high=0.1)) == "2.00e-05  [0.00000, 0.10000]"


def test_an_old_report_has_the_lines_it_has_figures_for() -> None:
    lines = lines_of(report(schema_version="1"))
    assert [line.split()[0] for line in lines] == ["text", "KL", "perplexity", "top-1", "bits", "size"]
    assert "not finite -> 2.0000" in lines[2]


def test_tasks_of_a_group_are_one_line_with_both_models() -> None:
    row = {"alias": "x", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 20.0}
    scores = {"blimp": row, "blimp_a": row, "blimp_b": row}
    lines = lines_of(
        report(tasks=scores, reference_tasks=scores, harness={"group_subtasks": {"blimp": ["blimp_a", "blimp_b"]}})
    )
    assert [line for line in lines if line.startswith("blimp")] == ["blimp       acc 0.5 -> 0.5 ± 0.1"]
