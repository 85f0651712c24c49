"""The formats that benchmarks of GPU kernels know by name."""

from llmcompress.spec import LinearSpec

FORMATS = {
    **{f"int{bits}": LinearSpec(bits=bits, group_size=128) for bits in (2, 3, 4, 8)},
    **{f"int{bits}z": LinearSpec(bits=bits, group_size=128, kind="asymmetric") for bits in (2, 3, 4, 8)},
    "nf4": LinearSpec(bits=4, group_size=64, kind="nf4"),
}
