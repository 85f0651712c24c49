"""Figures of a report as words: with their intervals, and `not finite` where there is none."""

from llmcompress.eval.report import Estimate, EvalReport

UNKNOWN = "not finite"


def plain(value: float | None, digits: int = 4) -> str:
    """A value with so many significant digits."""
    return UNKNOWN if value is None else f"{value:#.{digits}g}".rstrip(".")


def percent(share: float | None, digits: int = 1) -> str:
    """A share as per cent."""
    return UNKNOWN if share is None else f"{100 * share:.{digits}f} %"


def fixed(value: float | None, digits: int = 4) -> str:
    """A value with so many decimals."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def between(estimate: Estimate, digits: int = 4) -> str:
    """The 95 % interval in words."""
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"95 %: {estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def with_interval(estimate: Estimate, digits: int = 4) -> str:
    """The mean and its interval in brackets."""
    if estimate.low is None or estimate.high is None:
        return fixed(estimate.mean, digits)
    return f"{fixed(estimate.mean, digits)} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def kl_digits(report: EvalReport) -> int:
    """Decimals that a KL divergence of this size needs for three or four significant digits."""
    mean = report.summary.kld.mean or 1.0
    return 5 if mean < 0.1 else 4
