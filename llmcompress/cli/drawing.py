"""`--pictures`: which pictures the data at hand allow, and the folder they are written to."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcompress.cli.say import Speaker

INDEX = "index.html"


def terminal_bars(speaker: Speaker) -> bool:
    """Whether block characters may stand beside numbers: on a terminal that shows them, unless NO_COLOR forbids."""
    out = speaker.out
    return out.is_terminal and not out.is_dumb_terminal and not out.no_color and out.encoding.startswith("utf")


def say_lines(speaker: Speaker, lines: Sequence[str]) -> None:
    """Lines on stdout, letters the terminal lacks replaced; silent with --json."""
    if not speaker.json:
        coding = speaker.out.encoding
        speaker.result(None, [line.encode(coding, "replace").decode(coding) for line in lines])


def say_table(speaker: Speaker, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table nothing of which is cut, however narrow the terminal; silent with --json."""
    from llmcompress.pictures.terminal import aligned

    say_lines(speaker, [title, *aligned(columns, rows), ""])


def write_pictures(folder: Path, title: str, figures: Sequence[Any], speaker: Speaker) -> None:
    """Every figure as an SVG file of its own, and all of them with their data on one page."""
    from llmcompress.files import commit_bytes
    from llmcompress.pictures.page import page

    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        commit_bytes(folder / f"{figure.name}.svg", figure.svg.encode())
    commit_bytes(folder / INDEX, page(title, figures).encode())
    speaker.talk(f"{len(figures)} picture(s) in {folder}: {', '.join(figure.name for figure in figures)}, {INDEX}")


def file_word(words: str) -> str:
    """A name from a file of unknown origin as part of a file name: lower-case letters, digits and `_` only."""
    return re.sub(r"[^a-z0-9_]+", "_", words.lower())[:40] or "_"


def score_figures(file: Any) -> list[Any]:
    """Pictures of a score file: sensitivity curves for each scorer, a trajectory or void map where it has one."""
    from llmcompress.pictures.page import Figure
    from llmcompress.pictures.trajectory import path_of, trajectory

    figures: list[Any] = []
    for place, scores in enumerate(file.scores):
        same = [other.scorer for other in file.scores[:place]].count(scores.scorer)
        word = file_word(scores.scorer) + (f"-{same + 1}" if same else "")
        figures.append(sensitivity_figure(f"sensitivity-{word}", file.trace, scores, name=file.model))
        if path := path_of(scores.series):
            rows = _series_rows(path)
            figures.append(
                Figure(f"trajectory-{word}", trajectory(scores.series, name=file.model), ["point", *path], rows)
            )
        figures += void_figures(f"voids-{word}", scores.series, file.model)
    return figures


def void_figures(word: str, series: Any, model: str) -> list[Any]:
    """The void map as a picture, where series hold the usage of blocks."""
    from llmcompress.pictures.page import Figure
    from llmcompress.pictures.voidmap import usage_of, void_map

    usage = usage_of(series)
    return [Figure(word, void_map(series, name=model), ["block", *usage], _series_rows(usage))] if usage else []


def _series_rows(series: Any) -> list[list[str]]:
    lines = zip(*series.values(), strict=True)
    return [[str(place), *(f"{value:.4g}" for value in line)] for place, line in enumerate(lines)]


def sensitivity_figure(word: str, trace: Any, scores: Any, *, name: str, allocation: Any = None) -> Any:
    """Damage against bits by kind of linear, with the widths of an allocation marked where there is one."""
    from llmcompress.pictures.page import Figure
    from llmcompress.pictures.sensitivity import damage_by_kind, sensitivity_curves
    from llmcompress.pictures.words import number

    rows = [
        [kind, str(bits), number(s.low), number(s.middle), number(s.high), str(s.linears)]
        for kind, curve in damage_by_kind(trace, scores).items()
        for bits, s in curve.items()
    ]
    svg = sensitivity_curves(trace, scores, allocation=allocation, name=name)
    return Figure(word, svg, ["kind of linear", "bits", "least", "median", "greatest", "linears"], rows)


def plan_figures(desk: Any, allocation: Any, points: Sequence[Any]) -> list[Any]:
    """Pictures of a decision: bits heat map, sensitivity with the widths chosen, and the frontier where asked for."""
    from llmcompress.pictures.heatmap import bits_heat_map
    from llmcompress.pictures.page import Figure

    specs = {a.linear: str(a.spec.bits) for a in allocation.assigned}
    rows = [[x.name, specs.get(x.name, "kept"), str(x.rows), str(x.columns)] for x in desk.trace.every]
    bits = bits_heat_map(desk.trace, allocation, name=desk.model)
    figures = [
        Figure("bits", bits, ["linear", "bits", "rows", "columns"], rows),
        sensitivity_figure("sensitivity", desk.trace, desk.scores, name=desk.model, allocation=allocation),
    ]
    return [*figures, _frontier_figure(desk, allocation, points)] if points else figures


def _frontier_figure(desk: Any, allocation: Any, points: Sequence[Any]) -> Any:
    from llmcompress.compress.decide import uniforms
    from llmcompress.pictures.frontier import Baseline, Point, frontier
    from llmcompress.pictures.page import Figure

    baselines = [
        Baseline(f"uniform {one.bits} bits", Point(one.bits_per_weight, one.expected_damage)) for one in uniforms(desk)
    ]
    svg = frontier(
        [Point(p.bits_per_weight, p.expected_damage, p.measured_kld) for p in points],
        unit=desk.scores.unit,
        baselines=baselines,
        chosen=Point(allocation.bits_per_weight, allocation.expected_damage),
        name=desk.model,
    )
    rows = [["frontier", f"{p.bits_per_weight:.4f}", f"{p.expected_damage:.4g}", measured_word(p)] for p in points]
    rows += [[b.name, f"{b.point.bits_per_weight:.4f}", f"{b.point.expected:.4g}", "-"] for b in baselines]
    columns = ["point", "bits per weight", f"expected damage, {desk.scores.unit}", "measured KL, nats/token"]
    return Figure("frontier", svg, columns, rows)


def measured_word(point: Any) -> str:
    """The measured damage of a point of the frontier, `-` where nothing was measured."""
    return "-" if point.measured_kld is None else f"{point.measured_kld:.4g}"
