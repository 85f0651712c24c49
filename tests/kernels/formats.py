"""Every format a linear can have in memory, with codes and no quantizer behind them."""

from functools import cache

from torch import Tensor

from llmcompress.kernels import ops, stored
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.samples import random_codes
from llmcompress.spec import LinearSpec

FORMATS = {
    spec.label + (f"-g{spec.group_size}" if spec.group_size else "") + ("-double" if spec.double else ""): spec
    for spec in (
        *(LinearSpec(bits=bits, group_size=64) for bits in (2, 3, 4, 5, 6, 8)),
        *(LinearSpec(bits=bits, group_size=size) for bits in (3, 4) for size in (8, 32, 128, 256)),
        *(LinearSpec(bits=bits, group_size=96) for bits in (2, 8)),
        *(LinearSpec(bits=bits, group_size=size, kind="asymmetric") for bits in (2, 3, 4, 8) for size in (32, 128)),
        *(LinearSpec(bits=bits, group_size=0, kind="codebook") for bits in (2, 3, 4, 8)),
        *(LinearSpec(bits=4, group_size=64, kind=kind) for kind in ("nf4", "fp4")),
        LinearSpec(bits=4, group_size=64, kind="nf4", double=True),
        *(LinearSpec(bits=bits, group_size=64, high_share=0.125) for bits in (2, 3, 4)),
    )
}


@cache
def linear_of(name: str, rows: int, columns: int) -> tuple[Codes, dict[str, Tensor]]:
    """Codes of a format, and the tensors of its file by the ends of their names."""
    codes = random_codes(FORMATS[name], rows, columns)
    return codes, stored.tensors_of("", codes)


def arguments(name: str, rows: int, columns: int) -> tuple[list[Tensor], str, str, tuple[int, int]]:
    """What the operator is called with, after the input."""
    codes, tensors = linear_of(name, rows, columns)
    names = ops.names_of(ops.FILE, tuple(tensors))
    return list(tensors.values()), names, codes.spec.model_dump_json(), (rows, columns)


def columns_of(spec: LinearSpec, blocks: int) -> int:
    """A number of columns that is no multiple of 128 where the format allows one."""
    size = spec.group_size or 8
    return size * 3 * blocks if size > 64 else 64 * (2 * blocks + 1)
