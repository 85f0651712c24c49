"""Linearity theorem: inject Gaussian noise into one linear, and scale the measured KL to each width's error.

For small changes the divergence grows with the square of the relative change of the weights, `alpha * t^2`.
`alpha` of a linear comes from one measured swap with noise of relative size `score.swaps.noise`; `t^2` of a
candidate is the squared relative error of rounding to nearest, whose errors are as random as the noise (those of
GPTQ are larger, but chosen not to matter). One evaluation per linear, not one per width.
"""

from llmcompress.compress.measuring import Noise
from llmcompress.compress.observe import weight_of
from llmcompress.compress.quantizers import rtn
from llmcompress.compress.rounding import Request
from llmcompress.compress.scoring import Measured, ScoreJob, layer_score
from llmcompress.compress.swap_scores import mean_and_error, measure_job, memory_bytes, swap_text
from llmcompress.compress.swaps import measure_swaps
from llmcompress.types import LinearSpec, Unit

UNIT: Unit = "nats/token"
NEEDS_DATA = True


def relative_errors(job: ScoreJob) -> dict[tuple[str, LinearSpec], float]:
    """`|dW|^2 / |W|^2` of rounding every block linear to each of its candidates."""
    found = {}
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)
        for linear in info.linears:
            weight = weight_of(block, info, linear).contiguous()
            whole = weight.square().sum().clamp_min(1e-30)
            for spec in job.candidates.get(linear.name, ()):
                (result,) = rtn.quantize([Request(weight, spec)], None, options=job.rounding, dtype=job.scale_dtype)
                found[linear.name, spec] = float((result.codes.dequantize() - weight).square().sum() / whole)
        job.skeleton.free(block)
    return found


def score(job: ScoreJob) -> Measured:
    """Score every block linear and width in nats per token, with standard errors over sequences."""
    names = [linear.name for linear in job.trace.linears if linear.name in job.candidates]
    level = job.options.swaps.noise
    variants = [{name: Noise(level, job.seed + place)} for place, name in enumerate(names)]
    klds = measure_swaps(measure_job(job, rtn), {}, variants, text=swap_text(job), memory_bytes=memory_bytes(job))
    errors = relative_errors(job)
    layers = []
    for name, row in zip(names, klds[1:], strict=True):
        mean, spread = mean_and_error(row / level**2)  # alpha
        rows = ((s, max(mean, 0.0) * errors[name, s], spread * errors[name, s]) for s in job.candidates[name])
        layers.append(layer_score(name, rows))
    return Measured(tuple(layers))
