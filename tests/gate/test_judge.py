"""Verdicts: proven, refuted or undecided; and what is no matter of statistics."""

from typing import Any

import pytest
from gate_reports import document, documents, normal, report

from llmcompress.errors import InputError
from llmcompress.eval.report import EvalReport
from llmcompress.files import to_json
from llmcompress.gate.judge import FEWEST, judge
from llmcompress.gate.limits import Limits, read_limits
from llmcompress.gate.looks import look_until_decided, sizes
from llmcompress.gate.suggest import suggest
from llmcompress.gate.verdict import Criterion, Verdict

STANDARD = read_limits(None, {})[0]


def named(verdict: Verdict, name: str) -> Criterion:
    return next(c for c in verdict.criteria if c.name == name)


@pytest.mark.parametrize(
    ("kld", "count", "word"),
    [(0.02, 32, "pass"), (0.2, 32, "fail"), (0.05, 32, "undecided"), (0.045, 9, "undecided"), (0.045, 64, "pass")],
)
def test_three_verdicts(kld: float, count: int, word: str) -> None:
    verdict = judge(report(kld, count=count), STANDARD)
    assert verdict.verdict == word
    assert verdict.exit_code == {"pass": 0, "fail": 1, "undecided": 4}[word]
    found = named(verdict, "KL divergence")
    assert found.low is not None
    assert found.high is not None
    assert found.low <= kld <= found.high
    assert found.verdict == ("pass" if found.high <= 0.05 else "fail" if found.low > 0.05 else "undecided")


def test_what_is_needed_decides() -> None:
    few = judge(report(0.045, count=9), STANDARD)
    needed = named(few, "KL divergence").needed
    assert needed is not None
    assert needed > 9
    assert few.needed("sequences") == needed
    assert judge(report(0.045, count=needed), STANDARD).verdict == "pass"


@pytest.mark.parametrize("kld", [1e-6, 1.0])
def test_few_sequences_never_decide(kld: float) -> None:
    verdict = judge(report(kld, count=FEWEST - 1), Limits(max_kld=0.05))
    found = named(verdict, "KL divergence")
    assert (found.verdict, found.needed, found.count) == ("undecided", FEWEST, FEWEST - 1)
    assert verdict.verdict == "undecided"


def test_arrays_decide_and_not_the_summary() -> None:
    made = document(0.5)
    made["summary"]["kld"] = {"mean": 0.001, "low": 0.001, "high": 0.001}
    assert judge(EvalReport.parse(to_json(made), "report.json"), STANDARD).verdict == "fail"


def test_top1_is_judged_where_asked() -> None:
    found = judge(report(0.1), Limits(max_top1_loss=0.05, max_kld=0.3))
    assert named(found, "top-1 disagreement").verdict == "fail"
    assert named(found, "KL divergence").verdict == "pass"
    assert found.verdict == "fail"


def test_tasks_are_judged_one_by_one() -> None:
    tasks = {
        "easy": documents(1000, 5, 5, 700),
        "hard": documents(1000, 10, 150, 500),
        "short": documents(50, 1, 1, 30),
    }
    verdict = judge(report(0.01, documents=tasks), STANDARD)
    words = {c.name: c.verdict for c in verdict.criteria}
    assert words["task easy"] == "pass"
    assert words["task hard"] == "fail"
    assert words["task short"] == "undecided"
    assert verdict.verdict == "fail"
    assert named(verdict, "task hard").estimate == pytest.approx(0.14)
    assert (verdict.needed("documents") or 0) > 50


def test_scores_that_are_no_answers_use_students_t() -> None:
    scores = {"metric": "f1", "doc_ids": list(range(40)), "reference": normal(40, 0.5, 0.1, 3)}
    same = scores | {"candidate": scores["reference"]}
    worse = scores | {"candidate": [value - 0.1 - noise for value, noise in
                                    zip(scores["reference"], normal(40, 0, 0.01, 4), strict=True)]}  # fmt: skip
    verdict = judge(report(0.01, documents={"same": same, "worse": worse}), STANDARD)
    assert named(verdict, "task same").verdict == "pass"
    assert named(verdict, "task worse").verdict == "fail"
    assert named(verdict, "task worse").estimate == pytest.approx(0.1)


def test_scores_that_are_no_shares_are_left_out_and_that_is_said() -> None:
    likelihoods = {"metric": "ll", "doc_ids": list(range(9)), "reference": [-3.0] * 9, "candidate": [-9.0] * 9}
    verdict = judge(report(0.01, documents={"wiki": likelihoods}), STANDARD)
    assert verdict.verdict == "pass"
    assert [c.name for c in verdict.criteria] == ["KL divergence", "perplexity"]
    assert "not judged" in next(c.found for c in verdict.conditions if c.name == "task wiki")


@pytest.mark.parametrize(("told", "word"), [(None, "pass"), (True, "pass"), (False, "fail")])
def test_the_harness_says_whether_larger_is_better(told: bool | None, word: str) -> None:
    tasks = {"t": documents(1000, 150, 0, 700) | {"metric": "error"}}
    harness = None if told is None else {"higher_is_better": {"t": {"error": told}}}
    made = report(0.01, documents=tasks, harness=harness, schema_version="2")
    assert named(judge(made, STANDARD), "task t").verdict == word


def test_several_criteria_need_more_to_fail_but_not_to_pass() -> None:
    """Beyond the limit at 5 %, but not at 5 % over nine criteria."""
    made = document(0.01)
    made["per_sequence"]["kld"] = normal(32, 0.0545, 0.0125, 1)
    single = EvalReport.parse(to_json(made), "report.json")
    assert judge(single, Limits(max_kld=0.05)).verdict == "fail"
    made["documents"] = {str(i): documents(1000, 5, 5, 700) for i in range(8)}
    several = judge(EvalReport.parse(to_json(made), "report.json"), Limits(max_kld=0.05, max_drop=0.02))
    assert several.verdict == "undecided"
    assert all(c.verdict == "pass" for c in several.criteria if c.name != "KL divergence")


def broken(made: dict[str, Any]) -> None:
    made["finite"] = False
    made["per_sequence"]["kld"][3] = None


FAULTS = {
    "finite": (broken, "1 of 32"),
    "perplexity ratio": (lambda made: made["per_sequence"].update(dnll=[2.4] * 32), "at most 10"),
    "budget": (lambda made: made.update(plan={"allocation": {"budget_bits": 349}}), "at most 3.4900"),
    "ref digest": (lambda made: made["ref"].update(model_digest="other"), "other"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_without_statistics(name: str) -> None:
    damage, words = FAULTS[name]
    made = document(0.001, plan={"allocation": {"budget_bits": 350}})
    lenient = Limits(max_kld=0.05, expect={"ref": "r" * 64})
    assert judge(EvalReport.parse(to_json(made), "r"), lenient).verdict == "pass"
    damage(made)
    verdict = judge(EvalReport.parse(to_json(made), "r"), lenient)
    assert verdict.verdict == "fail"
    assert [c.name for c in verdict.conditions if not c.holds] == [name]
    assert words in next(c.found for c in verdict.conditions if not c.holds)


@pytest.mark.parametrize("plan", [{}, {"allocation": None}, {"allocation": {}}, {"allocation": {"budget_bits": "x"}}])
def test_plans_of_another_shape_say_nothing_of_a_budget(plan: dict[str, Any]) -> None:
    assert "budget" not in [c.name for c in judge(report(0.01, plan=plan), STANDARD).conditions]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made["per_sequence"].update(seq_ids=[0] * 32), "counted twice"),
        (lambda made: made["per_sequence"]["kld"].__setitem__(0, -0.1), "never negative"),
        (lambda made: made.update(documents={"t": documents(9, 1, 1, 5) | {"doc_ids": [1] * 9}}), "counted twice"),
        (lambda made: made.update(documents={"t": documents(9, 1, 1, 5) | {"reference": [1.0]}}), "do not pair"),
        (lambda made: made.update(documents={"t": documents(0, 0, 0, 0)}), "do not pair"),
        (lambda made: made.update(per_sequence={key: [] for key in made["per_sequence"]}), "no sequences"),
    ],
)
def test_reports_whose_units_cannot_be_counted_are_refused(change: Any, words: str) -> None:
    made = document()
    change(made)
    with pytest.raises(InputError, match=words):
        judge(EvalReport.parse(to_json(made), "r"), STANDARD)


def test_nothing_to_judge_is_refused() -> None:
    with pytest.raises(InputError, match="nothing to judge"):
        judge(report(), Limits(max_kld=None))


@pytest.mark.parametrize(("rise", "word"), [(0.9, "pass"), (1.0, "pass"), (1.3, "fail"), (1.1, "undecided")])
def test_regressions_are_paired(rise: float, word: str) -> None:
    """Sequences differ by a quarter, so only pairing can tell 10 % with 16 of them."""
    old, made = report(0.02, count=16), document(0.02, count=16, name="new")
    noise = normal(16, 0.0, 0.0005, 8)
    made["per_sequence"]["kld"] = [k * rise + n for k, n in zip(old.per_sequence.kld, noise, strict=True)]
    verdict = judge(EvalReport.parse(to_json(made), "r"), Limits(max_kld=1.0), old)
    assert named(verdict, "KL divergence against baseline").verdict == word
    assert verdict.baseline == "small"


def test_tasks_are_paired_with_the_baseline() -> None:
    before = documents(1000, 40, 0, 700)
    after = before | {"candidate": [0.0] * 80 + [1.0] * 660 + [0.0] * 260}
    old = report(0.02, documents={"t": before})
    verdict = judge(report(0.02, name="new", documents={"t": after}), Limits(max_kld=1.0, max_drop=0.05), old)
    assert named(verdict, "task t").estimate == pytest.approx(0.04)
    assert named(verdict, "task t against baseline").verdict == "fail"
    assert named(verdict, "task t against baseline").estimate == pytest.approx(0.08)


def test_answers_go_to_their_questions_whatever_those_are_called() -> None:
    tasks = {"t against baseline": documents(1000, 0, 200, 700), "t": documents(1000, 5, 5, 700)}
    verdict = judge(report(0.02, name="new", documents=tasks), STANDARD, report(0.02, documents=tasks))
    found = [(c.name, c.verdict) for c in verdict.criteria if c.name.startswith("task")]
    assert found == [
        ("task t against baseline", "fail"),
        ("task t", "pass"),
        ("task t against baseline against baseline", "pass"),
        ("task t against baseline", "pass"),
    ]


def test_the_same_weights_are_no_regression() -> None:
    verdict = judge(report(0.02), STANDARD, report(0.02, count=64))
    assert verdict.verdict == "pass"
    assert [c.name for c in verdict.criteria] == ["KL divergence", "perplexity"]
    assert "bit for bit" in verdict.conditions[-1].found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda old: old["data"].update(tokens_digest="other"), "token ids"),
        (lambda old: old["data"].update(tokenizer_digest="other"), "tokenizers"),
        (lambda old: old["ref"].update(model_digest="other"), "references"),
        (lambda old: old["per_sequence"].update(seq_ids=list(range(1, 33))), "sequences"),
        (broken, "not finite"),
        (lambda old: old["per_sequence"].update(kld=[0.0] * 32), "lost nothing"),
        (lambda old: old.update(documents={"gone": documents(9, 1, 1, 5)}), "task gone"),
        (lambda old: old.update(documents={"t": documents(8, 1, 1, 5)}), "other documents"),
        (lambda old: old.update(documents={"t": documents(9, 1, 1, 5) | {"metric": "f1"}}), "another metric"),
    ],
)
def test_baselines_that_do_not_pair_are_refused_with_the_reason(change: Any, words: str) -> None:
    tasks = {"t": documents(9, 1, 1, 5)}
    old = document(name="old", documents=tasks)
    judge(report(documents=tasks), STANDARD, EvalReport.parse(to_json(old), "r"))
    change(old)
    with pytest.raises(InputError, match=words) as refusal:
        judge(report(documents=tasks), STANDARD, EvalReport.parse(to_json(old), "r"))
    assert refusal.value.hint


def test_looks_double_stop_at_a_decision_and_share_the_error() -> None:
    assert sizes(32, 3) == (32, 64, 128)
    assert sizes(32, 3, 50) == (32, 50)
    assert sizes(32, 1) == (32,)
    asked: list[int] = []

    def evaluate(count: int) -> EvalReport:
        asked.append(count)
        return report(0.046, count=count)

    limits = Limits(max_kld=0.05, looks=3)
    found = [verdict for _, verdict in look_until_decided(evaluate, limits, (16, 32, 64, 128))]
    assert [verdict.verdict for verdict in found] == ["undecided"] * (len(asked) - 1) + ["pass"]
    assert 1 < len(asked) < 4
    assert found[0].level == pytest.approx(1 - 0.05 / 3)
    assert judge(report(0.046, count=asked[-1]), limits) == found[-1]


@pytest.mark.parametrize("kld", [0.0001, 0.02, 0.7])
def test_suggested_limits_are_kept_and_are_not_far(kld: float, tmp_path: Any) -> None:
    tasks = {"a": documents(400, 12, 16, 300), "b": documents(400, 0, 0, 300)}
    made = report(kld, count=32, documents=tasks)
    path = tmp_path / "gate.yaml"
    path.write_text(suggest(made, STANDARD))
    limits, _ = read_limits(path, {})
    assert judge(made, limits).verdict == "pass"
    assert limits.max_kld is not None
    assert kld < limits.max_kld < 1.5 * kld
    assert 0.01 < (limits.max_drop or 0) < 0.06
    assert limits.expect["tokens"] == "k32"
    other = report(kld, count=32, documents=tasks, data=document(count=9)["data"])
    assert judge(other, limits).verdict == "fail"


def test_nothing_is_suggested_for_what_is_broken_or_too_small() -> None:
    made = document()
    broken(made)
    with pytest.raises(InputError, match="not finite"):
        suggest(EvalReport.parse(to_json(made), "r"), STANDARD)
    with pytest.raises(InputError, match="too few"):
        suggest(report(count=5), STANDARD)


def test_a_suggestion_quotes_what_strangers_wrote(tmp_path: Any) -> None:
    made = report(0.02, ref={"name": "x", "model_digest": 'a"\nmax_kld: 99\n\\', "revision": None})
    path = tmp_path / "gate.yaml"
    path.write_text(suggest(made, STANDARD))
    assert read_limits(path, {})[0].expect["ref"] == made.ref.model_digest
