"""HTML that cannot be broken out of: text is escaped unless it was made here, and a page needs nothing but itself."""

from collections.abc import Iterable, Sequence

from llmcompress.pictures.theme import STYLE
from llmcompress.pictures.words import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
LONGEST = 4000  # letters of one piece of text


class Html(str):
    """Markup fit for a page. A plain `str`, an f-string of markup included, is text and gets escaped."""

    __slots__ = ()


def join(parts: Iterable[str], between: str = "\n") -> Html:
    """Parts one after the other, text among them escaped."""
    return Html(between.join(part if isinstance(part, Html) else escape(part, LONGEST) for part in parts))


def el(tag: str, *children: str, **attributes: str) -> Html:
    """An element. `_` in the name of an attribute stands for `-`, and one at its end is dropped (`class_`)."""
    words = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value, LONGEST)}"' for name, value in attributes.items()
    )
    return Html(f"<{tag}{words}>{join(children, '')}</{tag}>")


def svg(picture: str) -> Html:
    """A picture of this package, which is markup already."""
    return Html(picture)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "") -> Html:
    """A table, first column as row headers, in a box that scrolls by itself where it is wide."""
    head = el("tr", *(el("th", word, scope="col") for word in columns))
    lines = [el("tr", el("th", row[0], scope="row"), *(el("td", cell) for cell in row[1:])) for row in rows]
    above = (el("caption", caption),) if caption else ()
    whole = el("table", *above, el("thead", head), el("tbody", join(lines)))
    return el("div", whole, class_="wide", tabindex="0", role="region", aria_label=caption or columns[0])


def folded(words: str, *inside: str) -> Html:
    """Something the reader may open."""
    return el("details", el("summary", words), *inside)


def whole_page(title: str, *body: str) -> str:
    """One self-contained HTML page: no script, no outside file, a policy that forbids both, light and dark."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        join(body),
        "</body></html>\n",
    ]
    return "\n".join(parts)
