"""A picture with its data as a table, and several of them on one page."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape

from llmcompress.pictures.html import Html, el, folded, svg, table, whole_page


@dataclass(frozen=True)
class Figure:
    """One picture: the name of its file, the SVG, and the figures in it as a table."""

    name: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def data_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """The data of a picture as a folded table."""
    return folded(f"Data, {len(rows)} row{'s' * (len(rows) != 1)}", table(columns, rows))


def shown(figure: Figure) -> Html:
    """A picture in a box that scrolls by itself on a narrow screen, its data folded below it."""
    title = unescape(figure.svg.partition("<title>")[2].partition("</title>")[0])
    box = el("div", svg(figure.svg), class_="wide", tabindex="0", role="region", aria_label=title)
    return el("figure", box, data_table(figure.columns, figure.rows))


def page(title: str, figures: Sequence[Figure]) -> str:
    """One self-contained HTML page with the pictures in order, each followed by its data."""
    return whole_page(title, el("main", el("h1", title), *(shown(figure) for figure in figures)))
