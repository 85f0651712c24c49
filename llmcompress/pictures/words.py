"""Text of unknown origin, made fit to be shown: names of models and tensors come from other people's files."""

import re

# C0 and C1 controls, line and direction marks that reorder a line, lone surrogates, and code points XML forbids.
UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufffe\uffff]")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}


def shorten(words: str, most: int) -> str:
    """At most `most` characters, without control characters; the middle goes first, for names differ at their ends."""
    fit = UNFIT.sub("?", words[: 4 * most] + words[-most:] if len(words) > 5 * most else words)
    if len(fit) <= most:
        return fit
    tail = most // 2
    return fit[: most - 1 - tail] + "…" + fit[-tail:]


def escape(words: str, most: int = 200) -> str:
    """`shorten`, and nothing left that means anything to XML or HTML, in text or in a quoted attribute."""
    return "".join(ENTITIES.get(letter, letter) for letter in shorten(words, most))


def number(value: float) -> str:
    """Three significant digits, the way tables print a damage."""
    return f"{value:.3g}"


def listed(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"
