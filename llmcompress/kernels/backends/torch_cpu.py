"""What torch itself can do on CPU, where there is no C compiler.

Integers of at most four bits and bfloat16 inputs go to torch's own 4-bit kernel, which keeps four bits for every code
and rounds weights to bfloat16 (error 3e-3); everything else is dequantized a few rows at a time and multiplied.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from llmcompress.kernels import stored
from llmcompress.kernels.codes import Codes
from llmcompress.spec import FOUR_BIT, PER_ROW, LinearSpec

INT4, SCALES = ".int4", ".scales"
GROUPS = (32, 64, 128, 256)
MANY = 32  # tokens from which dequantizing once costs less than looking codes up again and again
CHUNK_WEIGHTS = 1 << 20
MIDDLE = 8  # of the codes that torch's kernel knows


def why_not(spec: LinearSpec, rows: int, columns: int, *, tokens: int, dtype: torch.dtype, device: str) -> str | None:
    """Why it cannot do a case, or None."""
    if str(device).partition(":")[0] != "cpu":
        return f"it is for CPU, not {device}"
    return None if dtype.is_floating_point else f"inputs are {dtype}"


def _has_kernel(spec: LinearSpec, rows: int, columns: int) -> bool:
    plain = spec.kind == "int" and spec.bits <= 4 and not spec.high_columns(columns)
    return plain and spec.group_size in GROUPS and rows % 16 == 0 and columns % 2 == 0


def prepare(tensors: Mapping[str, Tensor], spec: LinearSpec) -> dict[str, Tensor]:
    """The tensors of the file, and where torch's kernel can take them, codes and scales in its layout besides."""
    found = dict(tensors)
    if spec.kind in (*FOUR_BIT, *PER_ROW, "codebook"):
        return found
    rows, columns = stored.size_of("", spec.kind, lambda name: tensors[name])
    if _has_kernel(spec, rows, columns):
        codes = stored.codes_of("", spec, lambda name: tensors[name])
        centred = codes.codes.to(torch.int32) + (MIDDLE - (1 << (spec.bits - 1)))
        found[INT4] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(centred, 2)
        scale = codes.scale.T.to(torch.bfloat16)
        found[SCALES] = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()
    return found


def linear(x: Tensor, prepared: Mapping[str, Tensor], spec: LinearSpec, rows: int, columns: int) -> Tensor:
    """Inputs `(tokens, columns)` times the weight, `(tokens, rows)`."""
    if (found := bind(prepared, spec, rows, columns)(x)) is not None:
        return found
    codes = stored.codes_of("", spec, lambda name: prepared[name])
    out = torch.empty((x.shape[0], rows), dtype=x.dtype)
    wide = x.to(torch.float32)
    step = rows if spec.kind in FOUR_BIT else max(CHUNK_WEIGHTS // columns, 1)
    for start in range(0, rows, step):
        out[:, start : start + step] = wide @ _rows(codes, slice(start, start + step)).dequantize().T
    return out


def bind(
    prepared: Mapping[str, Tensor], spec: LinearSpec, rows: int, columns: int
) -> Callable[[Tensor], Tensor | None]:
    """Torch's own kernel for one weight; None of what it does not take."""
    words, scales, kernel = prepared.get(INT4), prepared.get(SCALES), torch.ops.aten._weight_int4pack_mm_for_cpu.default

    def call(x: Tensor) -> Tensor | None:
        if words is None or x.dtype != torch.bfloat16 or not x.is_cpu or x.numel() >= MANY * columns:
            return None
        flat = x.detach().reshape(-1, columns).contiguous()
        out: Tensor = kernel(flat, words, spec.group_size, scales)
        return out.view(*x.shape[:-1], rows)

    return call


def _rows(codes: Codes, rows: slice) -> Codes:
    """Some rows of a linear; all of them where scales run over the ends of rows."""
    if codes.spec.kind in FOUR_BIT:
        return codes
    zero = None if codes.zero is None else codes.zero[rows]
    book = None if codes.codebook is None else codes.codebook[rows]
    return Codes(codes.codes[rows], codes.scale[rows], codes.spec, zero=zero, codebook=book, high=codes.high)
