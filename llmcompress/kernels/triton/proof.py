"""Kernels in CUDA C++ are compiled for whatever GPU is at hand: there each proves itself once, on a few rows.

One that does not compile, or whose result is not PyTorch's, is left alone from then on, with a warning. While a graph
is captured nothing can be proved, and what was not before is not used.
"""

import warnings
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from llmcompress.errors import MachineError
from llmcompress.kernels.nvrtc import many
from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton.layout import Packing
from llmcompress.kernels.triton.trial import Case, is_right, random_inputs, random_linear
from llmcompress.kernels.triton.tuning import Fused, Lean
from llmcompress.spec import LinearSpec

TILES, UNEVEN = 3, 5  # rows of a proof in tiles, and those of a last one that is not whole
WITHOUT = f"{nvrtc.VARIABLE}=0 does without it"
_found: dict[Hashable, bool] = {}


def multiplies(x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, config: Lean | Fused) -> bool:
    """Whether the kernel that such a product would take is right: this format, dtype, width and configuration."""
    scale, whole = prepared["scale"].dtype, nvrtc.is_whole(prepared, rows)
    tile = config.rows if isinstance(config, Fused) else nvrtc.ROWS
    if isinstance(config, Fused):
        tokens = config.tokens + UNEVEN
    else:  # as many as the kernel holds; those that it keeps in shared memory are as many as it is asked for
        tokens = -(-len(x) // nvrtc.TILE) * nvrtc.TILE if config.terms == 1 else len(x)
    height = TILES * tile - (0 if whole else UNEVEN)

    def right() -> bool:
        weight, dense, inputs = _known(
            Case(_spec_of(packing), height, packing.columns, tokens, x.dtype, x.device, scale)
        )

        def work(_: int) -> Tensor:
            if isinstance(config, Fused):
                return many.multiply(inputs, weight, packing, height, config)
            return nvrtc.multiply(inputs, weight, packing, height, config)

        return is_right(work, inputs.float() @ dense.T)

    return _holds((packing, whole, scale, tokens, x.dtype, config), x.device, right)


def unpacks(prepared: Mapping[str, Tensor], packing: Packing, dtype: torch.dtype) -> bool:
    """Whether the kernel that unpacks rows of such a weight is right."""
    scale, device = prepared["scale"].dtype, prepared["words"].device

    def right() -> bool:
        height = TILES * nvrtc.ROWS - UNEVEN
        weight, dense, _ = _known(Case(_spec_of(packing), height, packing.columns, 0, dtype, device, scale))
        return is_right(lambda _: nvrtc.dequantize(weight, packing, (0, height), dtype), dense)

    return _holds((packing, scale, dtype), device, right)


def _spec_of(packing: Packing) -> LinearSpec:
    kind = packing.kind or ("asymmetric" if packing.zero else "int")
    return LinearSpec.model_validate(
        {"bits": packing.bits, "group_size": packing.group or packing.columns, "kind": kind}
    )


def _known(case: Case) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    generator = torch.Generator(case.device).manual_seed(0)  # the user's own draws stay as they are
    return *random_linear(case, generator), random_inputs(case, generator)


def _holds(key: Hashable, device: torch.device, right: Callable[[], bool]) -> bool:
    """What is known of a kernel on a device, or found out now."""
    known = _found.get((key, device))
    if known is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    why = "its result is not PyTorch's"
    try:
        found = right()
    except MachineError as error:
        found, why = False, str(error)
    except torch.AcceleratorError as error:
        raise MachineError(f"a kernel in CUDA C++ ended this process's use of {device}: {error}", WITHOUT) from error
    _found[(key, device)] = found
    if not found:
        warnings.warn(f"a kernel in CUDA C++ is not used on {device}: {why} ({WITHOUT})", RuntimeWarning, stacklevel=2)
    return found
