"""Traces and scores of models that do not exist, shared by tests of planning and of pictures."""

import math
import random

from llmcompress.types import (
    BlockTrace,
    Candidate,
    LayerScore,
    LinearInfo,
    LinearSpec,
    ModelTrace,
    ScoreFile,
    Scores,
    Series,
    Unit,
)

PARTS = (
    ("self_attn.q_proj", 4, 4, 0),
    ("self_attn.k_proj", 1, 4, 0),
    ("self_attn.v_proj", 1, 4, 0),
    ("self_attn.o_proj", 4, 4, 1),
    ("mlp.gate_proj", 11, 4, 2),
    ("mlp.up_proj", 11, 4, 2),
    ("mlp.down_proj", 4, 11, 3),
)
WIDTHS = (2, 3, 4, 5, 6, 8)


def linear(block: str, name: str, *, rows: int, columns: int, group: int) -> LinearInfo:
    full = f"{block}.{name}"
    return LinearInfo(
        name=full, tensor=f"{full}.weight", rows=rows, columns=columns, unit=f"{block}#{group}", shared_input=group
    )


def make_trace(blocks: int, *, head: bool = False, prefix: str = "model.layers", hidden: int = 1024) -> ModelTrace:
    """Seven linears a block, in the four fused units of a Llama."""
    step, found = hidden // 4, []
    for index in range(blocks):
        name = f"{prefix}.{index}"
        linears = tuple(linear(name, n, rows=r * step, columns=c * step, group=g) for n, r, c, g in PARTS)
        found.append(BlockTrace(index=index, name=name, linears=linears, norms=()))
    weights = sum(x.weights for block in found for x in block.linears)
    outer = linear("lm_head", "weight", rows=32_000, columns=hidden, group=0).model_copy(update={"name": "lm_head"})
    return ModelTrace(
        model_type="llama",
        blocks=tuple(found),
        head=outer if head else None,
        parameters=weights + 64_000 * hidden,
        other_bytes=128_000 * hidden,
        untraced_share=0.0,
    )


def make_scores(
    trace: ModelTrace, *, scorer: str = "fisher", unit: Unit = "nats/token", series: tuple[Series, ...] = ()
) -> Scores:
    """Damage that falls about fourfold with each bit, a good decade apart between linears."""
    source, layers = random.Random(scorer), []
    for info in trace.linears:
        weight = 10 ** source.gauss(-2.5, 0.5)
        damages = [weight * 4.0 ** (2 - bits) * source.uniform(0.8, 1.25) for bits in WIDTHS]
        candidates = tuple(
            Candidate(spec=LinearSpec(bits=bits, group_size=128), damage=damage)
            for bits, damage in zip(WIDTHS, damages, strict=True)
        )
        layers.append(LayerScore(linear=info.name, candidates=candidates))
    return Scores(
        scorer=scorer,
        unit=unit,
        model_digest="m" * 64,
        calibration_digest="c" * 64,
        settings_digest="s" * 64,
        seed=0,
        layers=tuple(layers),
        series=series,
    )


def path_series(blocks: int, turns: tuple[int, ...]) -> tuple[Series, ...]:
    """A wandering path of `blocks + 1` points with breakpoints at `turns`."""
    source, x, y, angle = random.Random(blocks), [0.0], [0.0], 0.3
    for _ in range(blocks):
        angle += source.gauss(0, 0.4)
        length = 0.3 + abs(source.gauss(0, 0.4))
        x.append(x[-1] + length * math.cos(angle))
        y.append(y[-1] + length * math.sin(angle))
    bends = tuple(1.0 + k / 10 if k in turns else 0.1 for k in range(blocks + 1))
    chosen = tuple(float(k in turns) for k in range(blocks + 1))
    return (
        Series(name="trajectory x", values=tuple(x)),
        Series(name="trajectory y", values=tuple(y)),
        Series(name="breakpoint score", values=bends),
        Series(name="velocity", values=tuple(map(float, range(blocks)))),
        Series(name="selected", values=chosen),
        Series(name="selected raw", values=chosen),
    )


def usage_series(blocks: int) -> tuple[Series, ...]:
    """Usage of two phases; block 1 is a void in both."""
    source = random.Random(7)
    return tuple(
        Series(name=f"usage {phase}", values=tuple(0.07 if b == 1 else source.uniform(0.6, 1.0) for b in range(blocks)))
        for phase in ("prompt", "generation")
    )


def make_file(blocks: int, *, head: bool = False) -> ScoreFile:
    """Four scorers, the third in nats per token."""
    trace = make_trace(blocks, head=head)
    return ScoreFile(
        model=f"synthetic-{blocks}",
        trace=trace,
        scores=(
            make_scores(trace, scorer="rdp", unit="unitless", series=path_series(blocks, (2, blocks - 1))),
            make_scores(trace, scorer="voids", unit="unitless", series=usage_series(blocks)),
            make_scores(trace),
            make_scores(trace, scorer="hessian", unit="proxy loss"),
        ),
        group_size=128,
        other_bytes=trace.other_bytes,
    )
