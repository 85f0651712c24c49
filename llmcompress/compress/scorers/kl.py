"""Measured KL divergence of the whole model with one unit quantized and everything else at full precision.

Every fused unit at every width it could get, with the quantizer that will be used, on held-out sequences. The
figure to believe where errors are small enough to add up; costs one partial forward per unit and width.
"""

from llmcompress.compress.scoring import Measured, ScoreJob
from llmcompress.compress.swap_scores import (
    changes_of,
    layers_from_units,
    mean_and_error,
    measure_job,
    memory_bytes,
    swap_text,
    swaps_of,
)
from llmcompress.compress.swaps import measure_swaps
from llmcompress.types import Unit

UNIT: Unit = "nats/token"
NEEDS_DATA = True


def score(job: ScoreJob) -> Measured:
    """Score every unit and width in nats per token, with standard errors over sequences."""
    swaps = swaps_of(job)
    klds = measure_swaps(
        measure_job(job), {}, changes_of(job, swaps), text=swap_text(job), memory_bytes=memory_bytes(job)
    )
    table = {(s.unit, s.bits): mean_and_error(row) for s, row in zip(swaps, klds[1:], strict=True)}
    return Measured(layers_from_units(job, table))
