"""CalibTIP's loss increase (arXiv 2006.10518, section 3): one unit at its width, all others at a base width.

Everything is quantized by AdaQuant. `dL = KL(unit at b, rest at base) - KL(all at base)`, measured on the whole
model; for narrower widths cut off below at 1e-6, as the integer program of the paper takes it. The base is the
largest candidate, as in the paper; `score.swaps.base_bits` moves it, and wider widths may then gain.
"""

from llmcompress.compress.measuring import nearest_width, units_of, widths_of
from llmcompress.compress.quantizers import adaquant
from llmcompress.compress.scoring import Measured, ScoreJob
from llmcompress.compress.swap_scores import (
    changes_of,
    layers_from_units,
    mean_and_error,
    measure_job,
    memory_bytes,
    swap_text,
    swaps_of,
    uniform_base,
)
from llmcompress.compress.swaps import measure_swaps
from llmcompress.types import Unit

UNIT: Unit = "nats/token"
NEEDS_DATA = True
LEAST = 1e-6


def score(job: ScoreJob) -> Measured:
    """Score every unit and width in nats per token above the base, with standard errors over sequences."""
    widths = {spec.bits for specs in job.candidates.values() for spec in specs}
    bits = nearest_width(sorted(widths), job.options.swaps.base_bits or max(widths))
    swaps = swaps_of(job)
    klds = measure_swaps(
        measure_job(job, adaquant),
        uniform_base(job, bits),
        changes_of(job, swaps),
        text=swap_text(job),
        memory_bytes=memory_bytes(job),
    )
    table = {}
    for swap, row in zip(swaps, klds[1:], strict=True):
        mean, error = mean_and_error(row - klds[0])
        table[swap.unit, swap.bits] = (mean if swap.bits > bits else max(mean, LEAST), error)
    for unit, members in units_of(job.trace, job.candidates).items():
        table[unit, nearest_width(widths_of(members, job.candidates), bits)] = (LEAST, 0.0)
    return Measured(layers_from_units(job, table))
