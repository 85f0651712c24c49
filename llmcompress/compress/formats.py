"""Which formats a quantizer makes, and which layout on disk holds them.

A quantizer that makes something else than symmetric integers says so with a function `formats(bits, columns, *,
group_size, options) -> LinearSpec | None`: what it makes of a linear with so many inputs at a width, None where
nothing. A layout is a file in `exporters`.
"""

from collections.abc import Callable, Iterable
from types import ModuleType

from llmcompress.compress.exporters import bnb, compressed_tensors, native
from llmcompress.compress.grid import group_size_for
from llmcompress.errors import InputError
from llmcompress.spec import PACKED_KINDS
from llmcompress.types import LinearSpec, ModelTrace, Plan, QuantizerOptions

PREFERRED = (compressed_tensors, bnb)  # what other programs open; `native` holds everything
WIDTHS = range(2, 9)

Maker = Callable[[int, int], LinearSpec | None]  # of a width and a number of columns


def integers(bits: int, columns: int, *, group_size: int, options: QuantizerOptions) -> LinearSpec | None:
    """Symmetric integers in groups of `group_size`, or the next smaller that divides `columns`; None if none does.

    Where inputs are rounded to integers, 8-bit weights have one scale per row: so integer hardware multiplies them.
    """
    inputs = options.input_spec
    if inputs is not None and inputs.kind == "int" and bits == 8:
        return LinearSpec(bits=8, group_size=columns, kind="int8")
    size = group_size_for(columns, group_size)
    return None if size is None else LinearSpec(bits=bits, group_size=size)


def maker(quantizer: ModuleType, options: QuantizerOptions, group_size: int) -> Maker:
    """What a quantizer makes of a linear of the blocks, as a function of the width and of the linear's columns.

    Raises InputError, also when called, for a low-rank correction of what can have none, and for output-side feedback
    where there is no feedback at all.
    """
    formats = getattr(quantizer, "formats", integers)
    if options.output_feedback and not hasattr(quantizer, "TWO_SIDED"):
        raise InputError(
            "quantize.output_feedback: this quantizer does not round by feedback",
            "set quantizer=gptq, signround or adaround, or output_feedback=0",
        )
    if options.correction_rank and hasattr(quantizer, "LEARNERS"):
        raise InputError(
            "quantize.correction_rank: this quantizer learns codes that a correction would undo",
            "set quantizer=gptq, or correction_rank=0",
        )

    def make(bits: int, columns: int) -> LinearSpec | None:
        found: LinearSpec | None = formats(bits, columns, group_size=group_size, options=options)
        if found is None:
            return None
        if options.correction_rank and found.kind not in PACKED_KINDS:
            raise InputError(f"quantize.correction_rank: {found.label} has none", "use gptq or another of integers")
        beside = {"inputs": options.input_spec, "rank": options.correction_rank}
        return found.model_copy(update=beside) if any(beside.values()) else found

    return make


def widths_of_maker(make: Maker, group_size: int) -> tuple[int, ...]:
    """The widths there is a format for at all: those of a linear that every group size divides."""
    return tuple(bits for bits in WIDTHS if make(bits, 64 * group_size) is not None)


def exporter_of(
    specs: Iterable[LinearSpec], options: QuantizerOptions | None = None, *, experts: bool = False
) -> ModuleType:
    """The layout of a checkpoint with linears of these formats: the most widely opened one that holds them all.

    What `options` say of attention has to find its place in it as well: bitsandbytes has none for keys and values, and
    only our own layout has one for attention weights. With `experts` among the linears, bitsandbytes has none either.
    """
    every, options = frozenset(specs), options or QuantizerOptions()
    some = PREFERRED[:1] if options.rounds_attention or experts else PREFERRED
    able = () if options.softmax != "none" else some
    return next((exporter for exporter in able if exporter.holds(every)), native)


def exporter_for(plan: Plan, trace: ModelTrace) -> ModuleType:
    """The layout of the output of a plan."""
    experts = any(linear.expert is not None and linear.name in plan.specs for linear in trace.linears)
    return exporter_of(plan.specs.values(), plan.options, experts=experts)
