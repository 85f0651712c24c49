"""The parts every picture is made of: a standalone SVG document, its shapes, and the one style sheet.

Colours are of the Okabe-Ito set; nothing is told by colour alone. Every rule begins with `.llmc`, so that several
pictures may stand in one HTML page and neither touch each other nor the page.
"""

from collections.abc import Iterable

from llmcompress.pictures.words import escape

LETTER = 6.8  # average advance of a 12 px sans-serif letter, on the wide side
LINE = 16

STYLE = """
.llmc{font-family:system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-size:12px;max-width:100%;height:auto}
.llmc .head{font-size:15px;font-weight:600}
.llmc .small{font-size:10.5px}
.llmc .paper{fill:#ffffff}
.llmc .ink{fill:#1b1f24}
.llmc .soft{fill:#57606a}
.llmc .rule{fill:none;stroke:#d8dee4;stroke-width:1}
.llmc .axis{fill:none;stroke:#57606a;stroke-width:1}
.llmc .lead{fill:none;stroke:#8b949e;stroke-width:.8}
.llmc .edge{fill:none;stroke:#a40e26;stroke-width:1.5;stroke-dasharray:4 3}
.llmc .line{fill:none;stroke:#0072b2;stroke-width:2;stroke-linejoin:round}
.llmc .line2{fill:none;stroke:#d55e00;stroke-width:2;stroke-dasharray:6 3;stroke-linejoin:round}
.llmc .dot{fill:#0072b2;stroke:#ffffff;stroke-width:1}
.llmc .dot2{fill:#d55e00;stroke:#ffffff;stroke-width:1}
.llmc .mark{fill:#1b1f24;stroke:#ffffff;stroke-width:1}
.llmc .band{fill:#0072b2;fill-opacity:.2}
.llmc .bar{fill:#0072b2;fill-opacity:.5}
.llmc .pale{fill:#afb8c1}
.llmc .cell{stroke:#57606a;stroke-width:.5}
@media (prefers-color-scheme:dark){
.llmc .paper{fill:#15181d}
.llmc .ink{fill:#e6e9ee}
.llmc .soft{fill:#a3adba}
.llmc .rule{stroke:#323a45}
.llmc .axis{stroke:#a3adba}
.llmc .lead{stroke:#77818e}
.llmc .edge{stroke:#ff9a9a}
.llmc .line{stroke:#56b4e9}
.llmc .line2{stroke:#e69f00}
.llmc .dot{fill:#56b4e9;stroke:#15181d}
.llmc .dot2{fill:#e69f00;stroke:#15181d}
.llmc .mark{fill:#e6e9ee;stroke:#15181d}
.llmc .band{fill:#56b4e9;fill-opacity:.25}
.llmc .bar{fill:#56b4e9}
.llmc .pale{fill:#57606a}
.llmc .cell{stroke:#a3adba}
}
"""


def num(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, words: str, *, kind: str = "ink", anchor: str = "start", most: int = 200) -> str:
    """Words at their baseline, shortened to `most` characters; `kind` names classes of the style sheet."""
    place = f'x="{num(x)}" y="{num(y)}" class="{kind}"'
    return f'<text {place} text-anchor="{anchor}">{escape(words, most)}</text>'


def cell_text(x: float, y: float, words: str, *, fill: str) -> str:
    """Centred words of a fixed colour, for the inside of a coloured cell."""
    return f'<text x="{num(x)}" y="{num(y)}" fill="{fill}" text-anchor="middle">{escape(words)}</text>'


def upright(x: float, y: float, words: str) -> str:
    """The name of a vertical axis, read from below, centred on `(x, y)`."""
    place = f'transform="translate({num(x)} {num(y)}) rotate(-90)" class="soft" text-anchor="middle"'
    return f"<text {place}>{escape(words)}</text>"


def rectangle(
    x: float, y: float, width: float, height: float, *, kind: str = "", look: tuple[str, str] = ("", "")
) -> str:
    """A rectangle of a class, or with `look = (fill, tip)`; the tip is what a pointer resting on it is told."""
    fill, tip = look
    paint = (f' class="{kind}"' if kind else "") + (f' fill="{fill}"' if fill else "")
    place = f'x="{num(x)}" y="{num(y)}" width="{num(width)}" height="{num(height)}"'
    return f"<rect {place}{paint}>{told(tip)}</rect>" if tip else f"<rect {place}{paint}/>"


def told(tip: str) -> str:
    """A tooltip."""
    return f"<title>{escape(tip)}</title>" if tip else ""


def stroke(points: Iterable[tuple[float, float]], *, kind: str, closed: bool = False) -> str:
    """A line through points, or an area."""
    steps = " ".join(f"{num(x)},{num(y)}" for x, y in points)
    name = "polygon" if closed else "polyline"
    return f'<{name} points="{steps}" class="{kind}"/>'


def circle(x: float, y: float, radius: float, *, kind: str, tip: str = "") -> str:
    """A round mark."""
    return f'<circle cx="{num(x)}" cy="{num(y)}" r="{num(radius)}" class="{kind}">{told(tip)}</circle>'


def square(x: float, y: float, radius: float, *, kind: str, tip: str = "") -> str:
    """A square mark."""
    low, high, left, right = y - radius, y + radius, x - radius, x + radius
    return polygon([(left, low), (right, low), (right, high), (left, high)], kind=kind, tip=tip)


def diamond(x: float, y: float, radius: float, *, kind: str, tip: str = "") -> str:
    """A square mark that stands on its corner."""
    return polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], kind=kind, tip=tip)


def polygon(corners: Iterable[tuple[float, float]], *, kind: str, tip: str = "") -> str:
    """A mark of any shape."""
    steps = " ".join(f"{num(x)},{num(y)}" for x, y in corners)
    return f'<polygon points="{steps}" class="{kind}">{told(tip)}</polygon>'


def document(width: float, height: float, *, title: str, description: str, parts: Iterable[str]) -> str:
    """A whole SVG file: role and words for those who cannot see it, style, background, then the parts."""
    w, h = num(width), num(height)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="llmc" role="img" viewBox="0 0 {w} {h}" '
        f'width="{w}" height="{h}">'
    )
    words = f"<title>{escape(title)}</title><desc>{escape(description, 1000)}</desc><style>{STYLE}</style>"
    paper = rectangle(0, 0, width, height, kind="paper")
    return "\n".join([head, words, paper, *parts, "</svg>"]) + "\n"


def text_width(words: str) -> float:
    """About how wide 12 px letters are."""
    return LETTER * len(words)
