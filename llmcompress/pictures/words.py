"""Text of unknown origin, made fit to be shown: names of models and tensors come from other people's files."""

import re

# C0 and C1 controls, soft hyphens, marks without width or that reorder a line, tags, lone surrogates, what XML forbids.
UNFIT = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)
MARKS = {"\n": "↵", "\t": "⇥"}
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"}


def visible(words: str) -> str:
    """Text with every character that would not be seen, or would change how others are seen, written out."""
    return UNFIT.sub(lambda found: MARKS.get(found[0], f"[U+{ord(found[0]):04X}]"), words)


def shorten(words: str, most: int) -> str:
    """At most `most` characters, all of them visible; the middle goes first, for names differ at their ends."""
    fit = visible(words[: 4 * most] + words[-most:] if len(words) > 5 * most else words)
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


def megabytes(size: float) -> str:
    """A size for people: kB, MB or GB, decimal."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= limit:
            return f"{size / limit:.2f} {unit}"
    return f"{size:.0f} B"
