"""Random linears in any format, for benchmarks and tests: what matters of them is their size."""

import torch

from llmcompress.kernels import fourbit
from llmcompress.kernels.codes import Codes
from llmcompress.spec import FOUR_BIT, HIGH_BITS, LinearSpec


def random_codes(spec: LinearSpec, rows: int, columns: int, *, seed: int = 0) -> Codes:
    """Codes of a format with no quantizer behind them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1 << spec.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    if spec.kind in FOUR_BIT:
        absmax = torch.rand(-(-rows * columns // spec.group_size), generator=generator) + 0.1
        double = fourbit.double_quantize(absmax) if spec.double else None
        return Codes(codes, absmax if double is None else double.decode(), spec, double=double)
    if spec.kind == "codebook":
        book = torch.randn(rows, 1 << spec.bits, generator=generator).to(torch.float16)
        return Codes(codes, torch.empty(rows, 0), spec, codebook=book)
    scale = torch.randn(rows, columns // spec.group_size, generator=generator).to(torch.bfloat16)
    if spec.kind == "asymmetric":
        zero = torch.randint(256, tuple(scale.shape), generator=generator, dtype=torch.uint8)
        return Codes(codes, scale, spec, zero=zero)
    count = spec.high_columns(columns)
    if not count:
        return Codes(codes, scale, spec)
    high = torch.zeros(columns, dtype=torch.bool)
    high[torch.randperm(columns, generator=generator)[:count]] = True
    fine = torch.randint(1 << (spec.bits + HIGH_BITS), (rows, columns), generator=generator, dtype=torch.uint8)
    return Codes(torch.where(high, fine, codes), scale, spec, high=high)
