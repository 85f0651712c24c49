"""What it costs a product that inputs are rounded to 16-bit integers, as `kernels/nvrtc/twoterm.cu` does.

    python bench/two_terms.py

Relative errors of 8 tokens times a Gaussian weight of 2048 x 4096, all in float64 but for the rounding: Gaussian inputs
in bfloat16, and the same with 16 columns 60 to 1200 times as large. Beside them that of rounding results to bfloat16.
"""

import torch
from torch import Tensor

SIZES = (32, 64, 128)  # inputs that share a scale
LARGEST = 256 * 127 + 127
ROWS, COLUMNS, TOKENS, OUTLIERS = 2048, 4096, 8, 16


def rounded(x: Tensor, size: int) -> Tensor:
    """Inputs float64 `(tokens, columns)` as integers and one scale to `size` columns hold them."""
    parts = x.unflatten(1, (-1, size))
    step = parts.abs().amax(-1, keepdim=True) / LARGEST
    return ((parts / step).round() * step).flatten(1)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative distance in the Euclidean norm."""
    return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    """A line for each kind of inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((ROWS, COLUMNS), generator=generator).double()
    plain = torch.randn((TOKENS, COLUMNS), generator=generator)
    large = plain.clone()
    columns = torch.randperm(COLUMNS, generator=generator)[:OUTLIERS]
    large[:, columns] *= 60 + 1140 * torch.rand(OUTLIERS, generator=generator)
    for name, inputs in (("Gaussian", plain), ("with outliers", large)):
        x = inputs.bfloat16().double()
        wanted = x @ weight.T
        errors = ", ".join(f"{error(rounded(x, size) @ weight.T, wanted):.1e} ({size})" for size in SIZES)
        print(f"{name}: {errors}; results in bfloat16 {error(wanted.bfloat16().double(), wanted):.1e}")


if __name__ == "__main__":
    main()
