"""Every format, odd shapes, few and many tokens: how far the Triton kernels are from float64 of the stored codes.

    TRITON_INTERPRET=1 python tests/kernels/triton_cases.py

prints the errors as JSON; with a GPU, `errors("cuda", ...)` gives the same from the compiled kernels. Scratch and
outputs are filled with poison before a kernel sees them.
"""

import importlib.util
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmcompress.compress import descent, feedback
from llmcompress.kernels import fourbit, stored
from llmcompress.kernels import triton as backend
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.triton import layout
from llmcompress.kernels.triton.tuning import Config
from llmcompress.spec import LinearSpec

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from llmcompress.kernels.triton import int8, large, small, ways

Case = dict[str, Any]
ROWS = 37
TOKENS = (1, 3, 16, 64)
GENERATOR = torch.Generator().manual_seed(0)
allocate = torch.empty


def poisoned(*sizes: Any, **options: Any) -> Tensor:
    """`torch.empty`, the contents of which would spoil every result."""
    found = allocate(*sizes, **options)
    return found.fill_(float("nan") if found.is_floating_point() else 77)


def random_codes(spec: LinearSpec, rows: int, columns: int) -> Codes:
    """A linear with random codes, scales of either sign, and zero-points between codes and beyond them."""
    codes = torch.randint(1 << spec.bits, (rows, columns), generator=GENERATOR, dtype=torch.uint8)
    if spec.kind in ("nf4", "fp4"):
        codes, absmax = fourbit.quantize_blocks(torch.randn(rows, columns, generator=GENERATOR), spec.kind, 64)
        double = fourbit.double_quantize(absmax) if spec.double else None
        return Codes(codes, absmax if double is None else double.decode(), spec, double=double)
    if spec.kind == "codebook":
        tables = torch.randn(rows, 1 << spec.bits, generator=GENERATOR).half()
        return Codes(codes, torch.zeros(rows, 0), spec, codebook=tables)
    scale = torch.randn(rows, columns // spec.group_size, generator=GENERATOR).to(torch.bfloat16)
    zero = torch.randint(256, scale.shape, generator=GENERATOR, dtype=torch.uint8)
    return Codes(codes, scale, spec, zero=zero if spec.kind == "asymmetric" else None)


def formats() -> Iterator[tuple[LinearSpec, int]]:
    """Every format with a number of columns that, where it can, leaves the last block of codes unfinished."""
    for bits in (2, 3, 4, 8):
        for kind in ("int", "asymmetric"):
            for group, columns in ((32, 224), (64, 192), (128, 384), (100, 100)):
                yield LinearSpec.model_validate({"bits": bits, "group_size": group, "kind": kind}), columns
    for bits, group, columns in ((5, 32, 224), (6, 128, 384), (5, 48, 240), (7, 90, 180), (4, 48, 240)):
        kind = "asymmetric" if bits == 6 else "int"
        yield LinearSpec.model_validate({"bits": bits, "group_size": group, "kind": kind}), columns
    for kind, double in (("nf4", False), ("nf4", True), ("fp4", False)):
        yield LinearSpec.model_validate({"bits": 4, "group_size": 64, "kind": kind, "double": double}), 320
    for bits in (2, 3, 4, 5):
        yield LinearSpec(bits=bits, group_size=0, kind="codebook"), 150


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative distance in the Euclidean norm; not a number where `found` has one that is none."""
    return float((found.cpu().double() - wanted).norm() / wanted.norm())


def products(device: str, dtypes: tuple[torch.dtype, ...], share: tuple[int, int]) -> Iterator[Case]:
    """The backend's own choice, for all formats, or the n-th of m shares of them."""
    for number, (spec, columns) in [*enumerate(formats())][share[0] :: share[1]]:
        codes = random_codes(spec, ROWS, columns)
        weight = codes.dequantize().double()
        tensors = {name: tensor.to(device) for name, tensor in stored.tensors_of("", codes).items()}
        prepared = backend.prepare(tensors, spec)
        for turn, dtype in enumerate(dtypes):
            x = torch.randn(TOKENS[(number + turn) % 4], columns, generator=GENERATOR).to(dtype)
            found = backend.linear(x.to(device), prepared, spec, ROWS, columns)
            name = f"{spec.label} group {spec.group_size} of {columns}, {len(x)} tokens, {dtype}"
            yield {"name": name, "dtype": str(dtype), "error": error(found, x.double() @ weight.T),
                   "counters": int(prepared["counters"].abs().max())}  # fmt: skip
        x = torch.randn(ways.LARGE + 1, columns, generator=GENERATOR).to(dtypes[number % len(dtypes)])
        found = backend.linear(x.to(device), prepared, spec, ROWS, columns)
        yield {"name": f"{spec.label} group {spec.group_size} of {columns}, many tokens", "dtype": str(x.dtype),
               "error": error(found, x.double() @ weight.T)}  # fmt: skip


def shared_tiles(device: str) -> Iterator[Case]:
    """Programs that share a tile, even and uneven parts, and strips that do not divide the rows."""
    spec, columns, rows = LinearSpec(bits=4, group_size=64, kind="asymmetric"), 1600, 70
    codes = random_codes(spec, rows, columns)
    prepared = backend.prepare({n: t.to(device) for n, t in stored.tensors_of("", codes).items()}, spec)
    packing = layout.packing_of(spec, columns)
    x = torch.randn(5, columns, generator=GENERATOR)
    wanted = x.double() @ codes.dequantize().double().T
    for split in (1, 2, 3, 7):
        config = Config(32, 16, split, 4, 2)
        found, again = (small.multiply(x.to(device), prepared, packing, rows, config) for _ in range(2))
        yield {"name": f"{split} programs to a tile", "dtype": "torch.float32", "error": error(found, wanted),
               "same": torch.equal(found, again), "counters": int(prepared["counters"].abs().max())}  # fmt: skip
    found = large.multiply(x.to(device), prepared, packing, rows, strip=32)
    yield {"name": "strips of 32 rows", "dtype": "torch.float32", "error": error(found, wanted)}
    x = torch.randn(ways.LARGE + 1, columns, generator=GENERATOR)
    found = backend.linear(x.to(device), prepared, spec, rows, columns)
    wanted = x.double() @ codes.dequantize().double().T
    none = backend.linear(x[:0].to(device), prepared, spec, rows, columns)
    yield {"name": "no tokens", "dtype": "torch.float32", "error": 0.0, "same": none.shape == (0, rows)}
    slanted = torch.nn.Parameter(x[:3].T.contiguous().T.to(device))
    few = backend.linear(slanted, prepared, spec, rows, columns)
    yield {"name": "columns first, with gradients", "dtype": "torch.float32", "error": error(few, wanted[:3])}
    yield {"name": "many tokens", "dtype": "torch.float32", "error": error(found, wanted)}


def integer_products(device: str) -> Iterator[Case]:
    """8-bit weights and inputs: static and per-token scales, zero-points, an empty token, few and many tokens."""
    for tokens, rows, columns in ((1, 67, 100), (5, 72, 1050), (16, 64, 300), (33, 72, 512), (33, 71, 100)):
        codes = torch.randint(-128, 128, (rows, columns), generator=GENERATOR, dtype=torch.int8)
        scales = torch.rand(rows, 1, generator=GENERATOR).to(torch.bfloat16)
        weight = int8.weight_of(codes.to(device), scales.to(device))
        x = torch.randn(tokens, columns, generator=GENERATOR)
        x[1:2] = 0
        given = torch.tensor([0.02], dtype=torch.bfloat16)
        for scale, zero in ((None, None), (given, None), (given, torch.tensor([-37], dtype=torch.int8))):
            step = (x.abs().amax(-1, keepdim=True) / 127.5) if scale is None else scale.float()
            step, middle = step.where(step > 0, torch.ones(())), torch.zeros(1) if zero is None else zero.float()
            rounded = (torch.round(x / step + middle).clamp(-128, 127) - middle).double() * step.double()
            on = [None if tensor is None else tensor.to(device) for tensor in (scale, zero)]
            found = int8.linear(x.to(device), weight, *on)
            yield {"name": f"int8 {rows}x{columns}, {tokens} tokens, {len([t for t in on if t is not None])} given",
                   "dtype": "torch.float32", "counters": int(weight.counters.abs().max()),
                   "error": error(found, rounded @ (codes.double() * scales.double()).T)}  # fmt: skip


def columns_in_turn(device: str) -> Iterator[Case]:
    """Rounding with feedback and descent, of whole numbers: sums are exact in any order, so codes are torch's."""
    for rows, columns, size, bits in ((5, 96, 32, 2), (37, 288, 288, 4), (16, 200, 200, 8), (40, 144, 144, 3)):
        signs = torch.randint(2, (columns, columns), generator=GENERATOR) * 2.0 - 1
        sparse = torch.triu(signs * (torch.rand(columns, columns, generator=GENERATOR) < 3 / columns), 1)
        sizes = 2.0 ** torch.randint(-1, 2, (columns,), generator=GENERATOR)
        upper, metric = (sparse + torch.diag(sizes)).to(device), (sparse + sparse.T + torch.diag(8 * sizes)).to(device)
        weight = torch.randint(-60, 61, (rows, columns), generator=GENERATOR).float().to(device)
        scale = (2.0 ** torch.randint(0, 3, (rows, columns // size), generator=GENERATOR)).to(device)
        spec = LinearSpec(bits=bits, group_size=size)
        steps, half = scale.repeat_interleave(size, 1), torch.full((rows,), 2.0 ** (bits - 1), device=device)
        found: list[list[Tensor]] = []
        for fused in (True, False):
            feedback.rounds_columns = descent.rounds_columns = lambda _, fused=fused: fused
            grid = feedback.Integers(half, lambda start, stop, _, steps=steps: steps[:, start:stop])
            loop = feedback.Loop(grid.nearest, grid.enter, block=size, grid=grid)
            codes = feedback.round_columns(weight, upper, loop)
            settled = descent.descend_plainly(weight, Codes(codes.contiguous(), scale, spec), metric, 1)
            found.append([codes, settled.codes, settled.scale] if columns == size else [codes])
        feedback.rounds_columns = descent.rounds_columns = backend.rounds_columns
        differ = max(float((one != other).float().mean()) for one, other in zip(*found, strict=True))
        yield {"name": f"columns {rows}x{columns}, {bits} bits", "dtype": "torch.float32", "error": differ}


def errors(device: str, dtypes: tuple[torch.dtype, ...], share: tuple[int, int] = (0, 1)) -> list[Case]:
    """Every case, or one of several shares of the formats, with poison where memory is fresh."""
    torch.empty = poisoned
    others = (shared_tiles(device), integer_products(device), columns_in_turn(device)) if share[0] == 0 else ()
    try:
        return [*products(device, dtypes, share), *(case for cases in others for case in cases)]
    finally:
        torch.empty = allocate


if __name__ == "__main__":
    json.dump(errors("cpu", (torch.float32, torch.float16)), sys.stdout)
