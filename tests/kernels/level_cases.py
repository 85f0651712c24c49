"""Packed linears at every level of instructions: how far results may be off, and memory that ends where tensors do."""

import ctypes
import mmap
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmcompress.kernels import compiled, stored
from llmcompress.kernels.backends import native_cpu
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.samples import random_codes
from llmcompress.spec import FOUR_BIT, LinearSpec

BLOCK, INPUT_MOST, TABLE_MOST = 128, 32639, 8191
EPSILON = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
LEAST = {torch.float32: 1e-37, torch.bfloat16: 1e-37, torch.float16: 2.0**-25}  # what underflow alone may cost
GROUPS = (8, 16, 32, 64, 128, 256, 384)


def levels() -> list[int]:
    """Those that this processor has."""
    library, why = compiled.library()
    assert library is not None, why
    return [level for level in native_cpu.LEVELS.values() if 0 <= level <= library.llmcompress_level()]


def specs() -> Iterator[LinearSpec]:
    """Every format that has a kernel in blocks, and a few that have none."""
    for kind in ("int", "asymmetric"):
        for bits in (2, 3, 4, 8):
            for size in GROUPS:
                yield LinearSpec(bits=bits, group_size=size, kind=kind)
    for bits in (2, 3, 4, 8):
        yield LinearSpec(bits=bits, group_size=0, kind="codebook")
    for kind in FOUR_BIT:
        for double in (False, True):
            for size in (32, 64, 128, 256):
                yield LinearSpec(bits=4, group_size=size, kind=kind, double=double)
    yield LinearSpec(bits=5, group_size=64)
    yield LinearSpec(bits=2, group_size=64, high_share=0.125)
    yield LinearSpec(bits=3, group_size=32, high_share=0.3)
    yield LinearSpec(bits=6, group_size=64, high_share=0.125)


def linear_at(level: int, x: Tensor, codes: Codes, tensors: Mapping[str, Tensor]) -> Tensor:
    """`x` times the weight, with the instructions of a level."""
    rows, columns = codes.codes.shape
    prepared = native_cpu.prepare(tensors, codes.spec)
    return native_cpu.linear(x, prepared, codes.spec, rows, columns, level=level)


def allowance(x: Tensor, codes: Codes) -> Tensor:
    """How far each output may be from exact arithmetic on the stored codes, (tokens, rows) in float64.

    Its own rounding; that of float32 sums, of what codes stand for before a zero-point is taken off; of inputs of 16
    bits to half a 32639th of the largest of each 128, of the smallest numbers to 2**-128; of tables to half an 8191st
    of their largest value.
    """
    weight, size = codes.dequantize().double(), x.double().abs()
    spec, most = codes.spec, weight.abs()
    if codes.codebook is not None:
        most = codes.codebook.double().abs().amax(1, keepdim=True).expand_as(weight)
    elif spec.kind in FOUR_BIT:
        most = codes.scale.double().abs().view(len(weight), -1).repeat_interleave(spec.group_size, dim=1)
    elif not spec.high_share:
        reach = 1 << (spec.bits + (spec.kind == "asymmetric"))
        most = reach * codes.scale.double().abs().repeat_interleave(spec.group_size, dim=1)
    found = EPSILON[x.dtype] * (x.double() @ weight.T).abs() + 3e-7 * size @ most.T + LEAST[x.dtype]
    if x.dtype != torch.float32:
        blocks = torch.nn.functional.pad(size, (0, -size.shape[1] % BLOCK)).view(len(x), -1, BLOCK)
        step = (blocks.amax(2) * 0.501 / INPUT_MOST).clamp(min=2.0**-128)
        apart = step.repeat_interleave(BLOCK, dim=1)[:, : size.shape[1]]
        found += apart @ weight.abs().T
        if codes.codebook is not None or spec.kind in FOUR_BIT:
            found += (size + apart) @ most.T * 0.501 / TABLE_MOST
    return found


def guarded(tensor: Tensor) -> Tensor:
    """A copy that ends where a page begins which nobody may read."""
    size = tensor.numel() * tensor.element_size()
    whole = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + whole), mmap.PAGESIZE, 0) == 0
    place = torch.frombuffer(memory, dtype=tensor.dtype, offset=whole - size, count=tensor.numel())
    return place.copy_(tensor.flatten()).view(tensor.shape)


def past_the_end() -> None:
    """Calls the kernels of every format and level, with nothing behind the last byte of weights and inputs."""
    torch.set_num_threads(1)
    for spec in specs():
        for columns in (spec.group_size or 8, 3 * (spec.group_size or 40)):
            codes = random_codes(spec, 3, columns)
            tensors = {name: guarded(tensor) for name, tensor in stored.tensors_of("", codes).items()}
            for dtype in native_cpu.INPUTS:
                x = guarded(torch.randn(5, columns).to(dtype))
                for tokens in (1, 5):
                    for level in levels():
                        linear_at(level, x[5 - tokens :], codes, tensors)


def level_of_the_user() -> None:
    """One small product, by whatever the environment says."""
    codes = random_codes(LinearSpec(bits=4, group_size=32), 3, 64)
    linear_at(native_cpu.BEST, torch.ones(1, 64), codes, stored.tensors_of("", codes))
