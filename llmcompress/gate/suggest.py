"""Limits a model as good as this one would keep, as a file to start from."""

import math

from llmcompress.errors import InputError
from llmcompress.eval.report import EvalReport
from llmcompress.gate.judge import judge
from llmcompress.gate.limits import LEAST_ALPHA, Limits
from llmcompress.gate.rules import NORMAL, POWER
from llmcompress.gate.verdict import Criterion

SMALLEST = 1e-4  # no limit is closer to zero
FIELDS = {"KL divergence": "max_kld", "perplexity": "max_ppl_increase", "top-1 disagreement": "max_top1_loss"}
TASKS = "max_drop"
LARGEST_SHARE = 0.99  # of limits that are shares of a whole


def suggest(report: EvalReport, limits: Limits) -> str:
    """YAML for `--config`: limits that a model measured like this one passes with a chance of `POWER`, and its digests.

    A bound at a smaller error rate is as much higher as the chance asks for. Raises InputError where figures are not
    finite or there are too few of them.
    """
    level = NORMAL.cdf(-NORMAL.inv_cdf(1 - limits.alpha / limits.looks) - NORMAL.inv_cdf(POWER))
    wide = Limits(max_kld=1.0, max_ppl_increase=0.5, max_top1_loss=0.5, max_drop=0.5, alpha=max(level, LEAST_ALPHA))
    found = judge(report, wide)
    worst: dict[str, float] = {}
    for criterion in found.criteria:
        field = FIELDS.get(criterion.name, TASKS)
        worst[field] = max(worst.get(field, 0.0), _bound(criterion))
    if not worst:
        raise InputError("the report has figures that are not finite", "there is nothing to suggest for a broken model")
    lines = ["# limits that a model measured like this one keeps; smaller is stricter"]
    lines += [f"{field}: {_rounded_up(value, field)}" for field, value in worst.items()]
    lines += [f"alpha: {_plain(limits.alpha)}", f"looks: {limits.looks}"]
    lines += ["expect:  # the same text and the same original, or the gate fails"]
    digests = (report.ref.model_digest, report.data.tokens_digest, report.data.tokenizer_digest)
    lines += [
        f"  {name}: {_quoted(digest)}" for name, digest in zip(("ref", "tokens", "tokenizer"), digests, strict=True)
    ]
    return "\n".join(lines) + "\n"


def _bound(criterion: Criterion) -> float:
    if criterion.high is None:
        what = f"{criterion.count} {criterion.counted} are too few, or too far apart, to suggest a limit"
        raise InputError(f"{criterion.name}: {what}", "evaluate more of them")
    return criterion.high


def _rounded_up(value: float, field: str) -> str:
    """Two significant digits, written without an exponent."""
    least = max(value, SMALLEST)
    step = 10.0 ** (math.floor(math.log10(least)) - 1)
    rounded = math.ceil(least / step) * step
    if field in ("max_drop", "max_top1_loss"):
        rounded = min(rounded, LARGEST_SHARE)
    return _plain(rounded)


def _plain(value: float) -> str:
    """Without an exponent, which YAML would take for a word."""
    return f"{value:.12f}".rstrip("0").rstrip(".")


def _quoted(digest: str) -> str:
    """A YAML string in double quotes; what is not a plain letter or digit is escaped."""
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in digest) + '"'
