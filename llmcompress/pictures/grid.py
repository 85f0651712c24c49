"""A table of coloured cells with a word in each: the shape of the heat map and of the void map."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.pictures.colours import letters_on
from llmcompress.pictures.svg import LETTER, cell_text, rectangle, text
from llmcompress.pictures.words import shorten

ROW = 19.0
GAP = 9.0
LONGEST_HEADER = 18


@dataclass(frozen=True)
class Cell:
    """What one cell says, its colour, and what a pointer on it is told."""

    words: str
    colour: str
    tip: str


@dataclass(frozen=True)
class Grid:
    """Rows of cells under column headers; `None` is an empty place. `groups` are runs of columns set together."""

    rows: Sequence[str]
    columns: Sequence[str]
    groups: Sequence[int]
    cells: Sequence[Sequence[Cell | None]]

    @property
    def widths(self) -> list[float]:
        """Of the columns, in pixels."""
        return [max(38.0, len(shorten(name, LONGEST_HEADER)) * LETTER + 10) for name in self.columns]

    @property
    def edges(self) -> list[float]:
        """Left edges of the columns, counted from the first, with a gap between groups."""
        edges, at, ends = [], 0.0, {sum(self.groups[: place + 1]) for place in range(len(self.groups))}
        for place, width in enumerate(self.widths):
            edges.append(at)
            at += width + (GAP if place + 1 in ends else 1.0)
        return edges

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of headers and cells, in pixels."""
        return (self.edges[-1] + self.widths[-1] if self.columns else 0.0), ROW * (len(self.rows) + 1)

    def draw(self, left: float, top: float) -> list[str]:
        """The parts of the picture: headers in the first row, then a row of cells each, row names on their left."""
        places = list(zip(self.edges, self.widths, strict=True))
        parts = [
            text(left + edge + width / 2, top + 13, name, anchor="middle", most=LONGEST_HEADER)
            for (edge, width), name in zip(places, self.columns, strict=True)
        ]
        for place, (name, row) in enumerate(zip(self.rows, self.cells, strict=True)):
            y = top + ROW * (place + 1)
            parts.append(text(left - 8, y + 13.5, name, kind="soft", anchor="end"))
            for (edge, width), cell in zip(places, row, strict=True):
                if cell is not None:
                    look = (cell.colour, cell.tip)
                    parts.append(rectangle(left + edge, y, width, ROW - 1, kind="cell", look=look))
                    ink = letters_on(cell.colour)
                    parts.append(cell_text(left + edge + width / 2, y + 13.5, cell.words, fill=ink))
        return parts


def legend(entries: Sequence[tuple[str, str]], left: float, top: float) -> tuple[list[str], float]:
    """Colour swatches with words, `(colour, words)`, in one line. Returns the parts and the width."""
    parts, x = [], left
    for colour, words in entries:
        parts.append(rectangle(x, top, 16, 12, kind="cell", look=(colour, "")))
        parts.append(text(x + 21, top + 10.5, words, kind="soft"))
        x += 21 + len(words) * LETTER + 14
    return parts, x - left
