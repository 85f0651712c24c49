"""Growing samples, judged until one decides."""

from collections.abc import Callable, Iterator

from llmcompress.eval.report import EvalReport
from llmcompress.gate.judge import judge
from llmcompress.gate.limits import Limits
from llmcompress.gate.verdict import Verdict


def sizes(samples: int, looks: int, most: int | None = None) -> tuple[int, ...]:
    """How many sequences each look has: twice those of the one before, none more than `most`."""
    doubled = (samples << look for look in range(looks))
    return tuple(dict.fromkeys(min(count, most) if most is not None else count for count in doubled))


def look_until_decided(
    evaluate: Callable[[int], EvalReport], limits: Limits, counts: tuple[int, ...], baseline: EvalReport | None = None
) -> Iterator[tuple[EvalReport, Verdict]]:
    """Evaluate `counts` sequences in turn, stopping after the first that passes or fails.

    Each look is judged at `alpha / looks`, so that a wrong answer at any of them has a chance of `alpha` at most.
    """
    for count in counts:
        report = evaluate(count)
        verdict = judge(report, limits, baseline)
        yield report, verdict
        if verdict.verdict != "undecided":
            return
