"""Measured change of KL when one unit leaves a uniformly quantized model for another width, in both directions.

The base is the uniform width nearest to the budget (`score.swaps.base_bits` overrides it), quantized block
after block as a real run would. Differences are paired over the same sequences; one within two standard
errors of zero counts as zero. Measures what single swaps of the full-precision model cannot see: how errors
interact where the model will really be (ExLlamaV3's measured mode; CLADO's cross terms, averaged).
"""

from llmcompress.compress.measuring import nearest_width, units_of, widths_of
from llmcompress.compress.scoring import Measured, ScoreJob
from llmcompress.compress.swap_scores import (
    Damage,
    base_bits,
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
SURE = 2.0  # standard errors a difference must reach to count


def settled(damage: Damage) -> Damage:
    """A difference no larger than its noise is no difference."""
    mean, error = damage
    return (mean if abs(mean) >= SURE * error else 0.0), error


def score(job: ScoreJob) -> Measured:
    """Score every unit and width in nats per token, relative to the largest width of the unit."""
    bits = base_bits(job)
    base = uniform_base(job, bits)
    swaps = swaps_of(job)
    klds = measure_swaps(
        measure_job(job), base, changes_of(job, swaps), text=swap_text(job), memory_bytes=memory_bytes(job)
    )
    table = {(s.unit, s.bits): settled(mean_and_error(row - klds[0])) for s, row in zip(swaps, klds[1:], strict=True)}
    for unit, members in units_of(job.trace, job.candidates).items():
        widths = widths_of(members, job.candidates)
        table[unit, nearest_width(widths, bits)] = (0.0, 0.0)
    return Measured(layers_from_units(job, table))
