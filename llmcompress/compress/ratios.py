"""The share of a linear's columns that gets two bits more, chosen unit by unit under the budget (after 2511.17801)."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy
from numpy.typing import NDArray

from llmcompress.compress.allocate.integer import Solution
from llmcompress.compress.allocate.ratio import RATIOS, choose_ratios
from llmcompress.compress.allocate.spend import Program, SpendUnit
from llmcompress.compress.measuring import Changes, units_of
from llmcompress.compress.programs import interactions
from llmcompress.errors import InputError
from llmcompress.spec import HIGH_BITS
from llmcompress.types import LinearSpec, ModelTrace, Scores

SCORERS = ("fisher", "hessian")  # whose damages are by format, not by width

Matrix = NDArray[numpy.float64]
Specs = Mapping[str, tuple[LinearSpec, ...]]


def with_ratios(trace: ModelTrace, candidates: Specs) -> dict[str, tuple[LinearSpec, ...]]:
    """Every two-tier format at each of RATIOS: from none of the columns with more bits to all, true counts alone.

    Raises InputError where there is no such format, or where a linear has several widths to begin from.
    """
    columns = {linear.name: linear.columns for linear in trace.every}
    if not any(spec.high_share for specs in candidates.values() for spec in specs):
        what = "the ratio program chooses how many columns get more bits, and this quantizer gives none more"
        raise InputError(what, "set quantizer=twotier")
    found = {}
    for name, specs in candidates.items():
        if len(specs) > 1:
            widths = ", ".join(str(spec.bits) for spec in specs)
            raise InputError(f"the ratio program begins from one width, and {name} has {widths}", "set plan.bits=[2]")
        found[name] = _at_ratios(specs[0], columns[name]) if specs[0].high_share else specs
    return found


def _at_ratios(spec: LinearSpec, columns: int) -> tuple[LinearSpec, ...]:
    counts: dict[int, LinearSpec] = {}
    for ratio in RATIOS:
        if ratio == 1:
            every = spec.model_copy(update={"bits": spec.bits + HIGH_BITS, "high_share": 0.0})
            counts.setdefault(columns, every)
        else:
            some = spec.model_copy(update={"high_share": ratio})
            counts.setdefault(some.high_columns(columns), some)
    return tuple(counts.values())


def check_scorer(scorer: str) -> None:
    """Raises InputError for a scorer that cannot tell ratios apart."""
    if scorer not in SCORERS:
        raise InputError(f"{scorer} does not score ratios, only widths", f"set scorer to one of: {', '.join(SCORERS)}")


def ratio_program(
    trace: ModelTrace, candidates: Specs, measure: Callable[[Sequence[Changes], Sequence[str]], Matrix]
) -> Program:
    """Damages of every ratio and, between units, the correlation of their errors in the narrow format.

    measure  the Gram matrix of the errors of variants, each of a unit, see `compress.gram`
    """
    units = units_of(trace, candidates)
    narrow = [{x.name: candidates[x.name][0] for x in members} for members in units.values()]
    places = {unit: place for place, unit in enumerate(units)}
    correlations = interactions(measure(narrow, list(units)), [1.0] * len(units))
    numpy.fill_diagonal(correlations, 0.0)

    def program(units: Sequence[SpendUnit], budget: int, minimum: int) -> Solution:
        rows = [places[unit.linears[0].unit] for unit in units]
        coupling = correlations[numpy.ix_(rows, rows)]
        found = choose_ratios([unit.choices for unit in units], coupling, budget, minimum=minimum)
        return Solution(found.chosen, found.cost, found.objective, found.bound, found.gap <= 1e-9)

    return program


def fixed_ratios(scores: Scores) -> list[tuple[str, Scores]]:
    """The same scores with one ratio for all that have a choice, largest first; all columns or none are no ratio."""
    found = []
    for ratio in reversed(RATIOS[1:-1]):
        layers = []
        for layer in scores.layers:
            fixed = tuple(c for c in layer.candidates if c.spec.high_share == ratio)
            layers.append(layer.model_copy(update={"candidates": fixed or layer.candidates}))
        found.append((f"uniform share {ratio:g}", scores.model_copy(update={"layers": tuple(layers)})))
    return found


def shares_in_words(specs: Sequence[LinearSpec], narrow: int) -> str:
    """How many linears got which share of columns with more bits, for a report."""
    shares = [Fraction(1) if spec.bits > narrow else Fraction(spec.high_share) for spec in specs]
    counts = sorted(Counter(shares).items())
    words = {Fraction(0): "no columns", Fraction(1): "all columns"}
    return ", ".join(f"{words.get(share, f'{share} of columns')} in {count}" for share, count in counts)
