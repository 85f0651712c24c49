"""Pictures together with the figures in them, made from the nouns of a run."""

import re
from collections.abc import Mapping, Sequence

from llmcompress.pictures.heatmap import bits_heat_map
from llmcompress.pictures.losses import block_losses
from llmcompress.pictures.page import Figure
from llmcompress.pictures.sensitivity import damage_by_kind, sensitivity_curves
from llmcompress.pictures.trajectory import path_of, trajectory
from llmcompress.pictures.voidmap import usage_of, void_map
from llmcompress.pictures.words import number
from llmcompress.types import BitAllocation, BlockOutcome, ModelTrace, ScoreFile, Scores, Series


def file_word(words: str) -> str:
    """A name from a file of unknown origin as part of a file name: lower-case letters, digits and `_` only."""
    return re.sub(r"[^a-z0-9_]+", "_", words.lower())[:40] or "_"


def bits_figure(trace: ModelTrace, allocation: BitAllocation, *, name: str) -> Figure:
    """The width of every linear; shapes only where the trace knows them."""
    specs = {a.linear: str(a.spec.bits) for a in allocation.assigned}
    sized = any(x.rows for x in trace.every)
    rows = [[x.name, specs.get(x.name, "kept"), *([str(x.rows), str(x.columns)] if sized else [])] for x in trace.every]
    columns = ["linear", "bits", *(["rows", "columns"] if sized else [])]
    return Figure("bits", bits_heat_map(trace, allocation, name=name), columns, rows)


def score_figures(file: ScoreFile) -> list[Figure]:
    """Pictures of a score file: sensitivity curves for each scorer, a trajectory or void map where it has one."""
    figures = []
    for place, scores in enumerate(file.scores):
        same = [other.scorer for other in file.scores[:place]].count(scores.scorer)
        word = file_word(scores.scorer) + (f"-{same + 1}" if same else "")
        figures.append(sensitivity_figure(f"sensitivity-{word}", file.trace, scores, name=file.model))
        figures += trajectory_figures(f"trajectory-{word}", scores.series, file.model)
        figures += void_figures(f"voids-{word}", scores.series, file.model)
    return figures


def trajectory_figures(word: str, series: Sequence[Series], model: str) -> list[Figure]:
    """The way of the hidden states with its breakpoints, where series hold one."""
    path = path_of(series)
    if path is None:
        return []
    return [Figure(word, trajectory(series, name=model), ["point", *path], _series_rows(path))]


def void_figures(word: str, series: Sequence[Series], model: str) -> list[Figure]:
    """The void map, where series hold the usage of blocks."""
    usage = usage_of(series)
    return [Figure(word, void_map(series, name=model), ["block", *usage], _series_rows(usage))] if usage else []


def _series_rows(series: Mapping[str, Sequence[float]]) -> list[list[str]]:
    lines = zip(*series.values(), strict=True)
    return [[str(place), *(f"{value:.4g}" for value in line)] for place, line in enumerate(lines)]


def sensitivity_figure(
    word: str, trace: ModelTrace, scores: Scores, *, name: str, allocation: BitAllocation | None = None
) -> Figure:
    """Damage against bits by kind of linear, with the widths of an allocation marked where there is one."""
    rows = [
        [kind, str(bits), number(s.low), number(s.middle), number(s.high), str(s.linears)]
        for kind, curve in damage_by_kind(trace, scores).items()
        for bits, s in curve.items()
    ]
    svg = sensitivity_curves(trace, scores, allocation=allocation, name=name)
    return Figure(word, svg, ["kind of linear", "bits", "least", "median", "greatest", "linears"], rows)


def loss_figure(blocks: Sequence[BlockOutcome], *, name: str) -> Figure:
    """What storing each linear cost, relative to its output."""
    rows = [
        [x.linear, str(block.block), str(x.bits), number(x.relative_loss), number(x.proxy_loss)]
        for block in blocks
        for x in block.linears
    ]
    columns = ["linear", "block", "bits", "relative error", "proxy loss"]
    return Figure("losses", block_losses(blocks, name=name), columns, rows)
