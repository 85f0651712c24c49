"""Several pictures on one page that needs nothing else: no script, no outside file, each with its data as a table."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.pictures.words import escape

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root{color-scheme:light dark}
body{font-family:system-ui,sans-serif;margin:1.5rem auto;max-width:60rem;padding:0 1rem;background:#fff;color:#1b1f24}
figure{margin:1.5rem 0;overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .6rem;text-align:right;border-bottom:1px solid #d8dee4}
th:first-child{text-align:left}
@media (prefers-color-scheme:dark){body{background:#15181d;color:#e6e9ee}th,td{border-color:#323a45}}
@media print{details{display:none}}
"""


@dataclass(frozen=True)
class Figure:
    """One picture: the name of its file, the SVG, and the figures in it as a table."""

    name: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def data_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The data of a picture as a folded HTML table, first column as row headers; every word is escaped."""
    head = "".join(f'<th scope="col">{escape(word)}</th>' for word in columns)
    lines = (
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    body = "\n".join(lines)
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f"<details><summary>Data</summary>{table}</details>"


def page(title: str, figures: Sequence[Figure]) -> str:
    """One self-contained HTML page with the pictures in order, each followed by its data."""
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>",
    ]
    for figure in figures:
        parts.append(f"<figure>{figure.svg}</figure>{data_table(figure.columns, figure.rows)}")
    return "\n".join([*parts, "</body></html>\n"])
