"""`--pictures`: which pictures the data at hand allow, and the folder they are written to."""

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


def plan_figures(desk: Any, allocation: Any, points: Sequence[Any]) -> list[Any]:
    """Pictures of a decision: bits heat map, sensitivity with the widths chosen, and the frontier where asked for."""
    from llmcompress.pictures.figures import bits_figure, sensitivity_figure

    figures = [
        bits_figure(desk.trace, allocation, name=desk.model),
        sensitivity_figure("sensitivity", desk.trace, desk.scores, name=desk.model, allocation=allocation),
    ]
    return [*figures, frontier_figure(desk, allocation, points)] if points else figures


def frontier_figure(desk: Any, allocation: Any, points: Sequence[Any]) -> Any:
    """Bits against damage: the frontier, uniform widths, and the allocation chosen."""
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
