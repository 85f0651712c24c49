"""Orthogonal matrices: Hadamard matrices of many sizes, random ones, and steps along the Stiefel manifold."""

import torch
from torch import Tensor


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _residue_matrix(prime: int) -> Tensor:
    """Jacobsthal matrix `Q[i, j] = chi(i - j)`, with chi +1 on non-zero squares modulo the prime and -1 on the rest."""
    squares = {value * value % prime for value in range(1, prime)}
    chi = torch.tensor([0 if v == 0 else 1 if v in squares else -1 for v in range(prime)], dtype=torch.float64)
    place = torch.arange(prime)
    return chi[(place[:, None] - place[None, :]) % prime]


def _paley(size: int) -> Tensor | None:
    """A Hadamard matrix of `size` by one of Paley's two constructions over a prime field, or None."""
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        border = torch.ones(size, size, dtype=torch.float64)
        border[1:, 1:] = _residue_matrix(size - 1)
        border[1:, 0] = -1
        border[0, 0] = 0
        return border + torch.eye(size, dtype=torch.float64)
    prime = size // 2 - 1
    if size % 2 == 0 and _is_prime(prime) and prime % 4 == 1:
        conference = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
        conference[1:, 1:] = _residue_matrix(prime)
        conference[0, 0] = 0
        ones, signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
        identity = torch.eye(prime + 1, dtype=torch.float64)
        return torch.kron(conference, ones.double()) + torch.kron(identity, signs.double())
    return None


def hadamard(size: int) -> Tensor | None:
    """A Hadamard matrix of `size`, entries +-1, as a Kronecker product of a base of Paley's and one of Sylvester's.

    None where no base of these is known, e.g. for odd sizes above 1 or for 92.
    """
    double = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    outer = torch.ones(1, 1, dtype=torch.float64)
    base = size
    while base > 2:
        found = _paley(base) if base % 4 == 0 else None
        if found is not None:
            return torch.kron(outer, found)
        if base % 2:
            return None
        base //= 2
        outer = torch.kron(outer, double)
    return torch.kron(outer, double) if base == 2 else outer


def identity(size: int, _: torch.Generator) -> Tensor:
    """No rotation, float64."""
    return torch.eye(size, dtype=torch.float64)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A uniformly drawn orthogonal matrix, float64."""
    factor, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    found: Tensor = factor * upper.diagonal().sign()
    return found.contiguous()


def random_hadamard(size: int, generator: torch.Generator) -> Tensor:
    """`diag(+-1) H / sqrt(size)`, float64; where no Hadamard matrix of the size is known, a part is drawn.

    Then it is the Kronecker product of a random orthogonal matrix and a Hadamard matrix of the power-of-two part.
    """
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    known = hadamard(size)
    if known is not None:
        return _signed(signs, known / size**0.5)
    power = size & -size
    other = hadamard(power)
    mixing = random_orthogonal(size // power, generator)
    return _signed(signs, mixing if other is None else torch.kron(mixing, other / power**0.5))


def _signed(signs: Tensor, rotation: Tensor) -> Tensor:
    return signs * rotation


def cayley_step(point: Tensor, gradient: Tensor, length: float) -> Tensor:
    """Move an orthogonal matrix down a gradient, along the Stiefel manifold.

    point, gradient  (size, size)
    length           largest step: the step is this much of the unit skew direction

    `Y = G R^T - R G^T` is skew, so `(I + a/2 Y)^-1 (I - a/2 Y) R` is orthogonal; at first order the loss falls.
    """
    skew = gradient @ point.T
    skew = skew - skew.T
    skew = skew * (length / skew.norm().clamp_min(1e-30) / 2)
    identity = torch.eye(len(point), dtype=point.dtype, device=point.device)
    found: Tensor = torch.linalg.solve(identity + skew, (identity - skew) @ point)
    return found
