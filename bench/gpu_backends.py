"""Products with packed weights, one maker for each way to do it; every maker rounds the same weight its own way."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.kernels import fourbit
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.nvrtc import many
from llmcompress.kernels.triton import int8, interpreted, linear
from llmcompress.kernels.triton.layout import COUNTERS, packing_of, planar_words
from llmcompress.kernels.triton.tuning import Fused
from llmcompress.spec import LinearSpec

GROUP = 128
WIDE, NARROW, PROCESSORS = Fused(128, 256, 5), Fused(128, 128, 6), 132
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Made:
    """A weight in memory, how to multiply with it, and the float32 weight it stands for."""

    tensors: Tensors
    call: Callable[[Tensor], Tensor]
    weight: Tensor
    dtype: torch.dtype = torch.bfloat16

    @property
    def size(self) -> int:
        """Bytes that a product must read."""
        return sum(t.numel() * t.element_size() for name, t in self.tensors.items() if name != "counters")


def cublas(weight: Tensor, dtype: torch.dtype) -> Made:
    """The library's product in 16 bits."""
    stored = weight.to(dtype)
    return Made({"w": stored}, lambda x: torch.nn.functional.linear(x, stored), stored.float(), dtype)


def rounded(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 and bfloat16 scales of symmetric groups, by rounding."""
    rows, columns = weight.shape
    half = 1 << (bits - 1)
    groups = weight.view(rows, columns // GROUP, GROUP)
    scale = (groups.abs().amax(2) / (half - 0.5)).to(torch.bfloat16)
    codes = torch.round(groups / scale.float()[:, :, None] + half).clamp(0, 2 * half - 1)
    return codes.to(torch.uint8).view(rows, columns), scale


def packed(weight: Tensor, kind: str, bits: int) -> tuple[Tensors, LinearSpec, Tensor]:
    """What `layout.prepare` makes of a file, made on the GPU, its format, and the weight it stands for."""
    rows, columns = weight.shape
    spec = LinearSpec.model_validate({"bits": bits, "group_size": 64 if kind == "nf4" else GROUP, "kind": kind})
    order = packing_of(spec, columns).planar
    if order is None:
        raise SystemExit(f"{spec.label}: no planar order")
    tensors = {"counters": torch.zeros(COUNTERS, dtype=torch.int32, device=weight.device)}
    if kind == "nf4":
        codes, scale = fourbit.quantize_blocks(weight, "nf4", 64)
        tensors["table"] = fourbit.table_of("nf4").to(weight.device)[None, :]
    else:
        codes, scale = rounded(weight, bits)
    tensors["words"] = planar_words(codes, order)
    tensors["scale"] = scale.view(rows, -1).T.contiguous()
    return tensors, spec, Codes(codes, scale, spec).dequantize()


def ours(weight: Tensor, kind: str, bits: int) -> Made:
    """The kernels of this package, as the tables choose them."""
    tensors, spec, dense = packed(weight, kind, bits)
    rows, columns = weight.shape
    return Made(tensors, lambda x: linear(x, tensors, spec, rows, columns), dense)


def ours_fused(weight: Tensor, kind: str, bits: int) -> Made:
    """The kernel for many tokens, whatever the tables say: tiles of 256 tokens where there are enough of them."""
    tensors, spec, dense = packed(weight, kind, bits)
    rows, columns = weight.shape
    packing = packing_of(spec, columns)

    def call(x: Tensor) -> Tensor:
        enough = len(x) // WIDE.tokens * rows // WIDE.rows >= PROCESSORS
        return many.multiply(x, tensors, packing, rows, WIDE if enough else NARROW)

    return Made(tensors, call, dense)


def ours_int8(weight: Tensor) -> Made:
    """8-bit weights, inputs rounded for each token; what it stands for leaves the rounding of inputs out."""
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)
    made = int8.weight_of(codes, scale)
    return Made({"codes": codes, "scale": scale}, lambda x: int8.linear(x, made), codes.float() * scale[:, None])


def tinygemm(weight: Tensor) -> Made:
    """torch's own 4-bit kernel: bfloat16 scale and zero for each group."""
    codes, scale = rounded(weight, 4)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)
    pairs = torch.stack([scale, torch.zeros_like(scale)], 2).transpose(0, 1).contiguous()
    return Made(
        {"w": packed, "s": pairs},
        lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, pairs),
        Codes(codes, scale, LinearSpec(bits=4, group_size=GROUP)).dequantize(),
    )


def bnb(weight: Tensor) -> Made:
    """bitsandbytes' nf4 in blocks of 64."""
    import bitsandbytes
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.to(torch.bfloat16), blocksize=64, quant_type="nf4")
    size = {"w": packed, "absmax": state.absmax}
    dense = dequantize_4bit(packed, state).float()
    return Made(size, lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state), dense)


def gemlite(weight: Tensor) -> Made:
    """gemlite's 4-bit kernels."""
    from gemlite import DType, GemLiteLinearTriton

    rows, columns = weight.shape
    codes, scale = rounded(weight, 4)
    layer = GemLiteLinearTriton(
        W_nbits=4, group_size=GROUP, in_features=columns, out_features=rows,
        input_dtype=DType.BF16, output_dtype=DType.BF16,
    )  # fmt: skip
    layer.pack(codes, scale.view(-1, 1), torch.full_like(scale, 8).view(-1, 1), None)
    size = {"w": layer.W_q, "s": layer.scales}
    return Made(size, layer, Codes(codes, scale, LinearSpec(bits=4, group_size=GROUP)).dequantize())


def makers() -> dict[str, Callable[[Tensor], Made]]:
    """Every way there is on this machine, peers where they can be imported."""
    found: dict[str, Callable[[Tensor], Made]] = {
        "cuBLAS bf16": lambda w: cublas(w, torch.bfloat16),
        "cuBLAS fp16": lambda w: cublas(w, torch.float16),
        "tinygemm int4": tinygemm,
    }
    if importlib.util.find_spec("bitsandbytes"):
        found["bitsandbytes nf4"] = bnb
    if importlib.util.find_spec("gemlite"):
        found["gemlite int4"] = gemlite
    for bits in (2, 3, 4, 8):
        found[f"ours int{bits}"] = lambda w, bits=bits: ours(w, "int", bits)
    found["ours nf4"] = lambda w: ours(w, "nf4", 4)
    found["ours int8 x int8"] = ours_int8
    if not interpreted() and torch.cuda.is_available() and torch.cuda.get_device_capability() == many.CAPABILITY:
        for bits in (2, 3, 4, 8):
            found[f"ours int{bits} fused"] = lambda w, bits=bits: ours_fused(w, "int", bits)
        found["ours nf4 fused"] = lambda w: ours_fused(w, "nf4", 4)
    return found
