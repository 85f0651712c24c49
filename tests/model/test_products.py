"""Products of float32 matrices: the same as torch's own to rounding, on any number of threads."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from llmcompress.model import products
from llmcompress.model.products import Quick, cached_batch, causal_attention, inner, linear, turned
from llmcompress.model.shelf import TRAY_BYTES, Tray

SHAPES = [(1, 8, 4), (33, 64, 96), (200, 100, 7), (1024, 256, 256)]


@pytest.fixture(params=["quick", "usual"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With oneDNN's products, where this processor has them, and without."""
    if request.param == "usual":
        monkeypatch.setattr(products, "_kernel", lambda: None)
    elif products._kernel() is None:
        pytest.skip("no AVX-512")
    return str(request.param)


def _close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_float64(way: str, shape: tuple[int, int, int]) -> None:
    tokens, columns, rows = shape
    x, weight, bias, other = (
        torch.randn(*size) for size in ((tokens, columns), (rows, columns), (rows,), (tokens, rows))
    )
    _close(linear(x, weight), x.double() @ weight.double().T)
    _close(linear(x[None], weight, bias)[0], x.double() @ weight.double().T + bias.double())
    _close(linear(x, weight.T.contiguous().T), x.double() @ weight.double().T)
    _close(inner(turned(x), turned(other)), x.double().T @ other.double())
    half = columns // 2
    _close(inner(turned(x)[half:], turned(x)[:half]), x.double().T[half:] @ x.double()[:, :half])


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_float64(way: str, shape: tuple[int, int, int]) -> None:
    tokens, columns, rows = shape
    given = torch.randn(1, tokens, columns), torch.randn(rows, columns), torch.randn(rows)
    above = torch.randn(1, tokens, rows)
    exact = [x.double().requires_grad_(True) for x in given]
    wanted = torch.autograd.grad(functional.linear(*exact), exact, above.double())
    for learned in ((0,), (1,), (0, 1, 2)):
        leaves = [x.clone().requires_grad_(place in learned) for place, x in enumerate(given)]
        found = torch.autograd.grad(linear(*leaves), [leaves[place] for place in learned], above)
        for place, gradient in zip(learned, found, strict=True):
            _close(gradient, wanted[place])


def test_products_are_the_same_for_any_number_of_threads(way: str) -> None:
    x, weight, query = torch.randn(1024, 256), torch.randn(128, 256), torch.randn(2, 3, 150, 32)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append((linear(x, weight), inner(turned(x), turned(x)), causal_attention(query, query, query)))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tokens", [65, 128, 200, 512])
def test_causal_attention_in_parts_is_that_of_the_whole(tokens: int) -> None:
    query, key, value = (torch.randn(2, heads, tokens, 16) for heads in (4, 2, 2))
    whole = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3, enable_gqa=True)
    _close(causal_attention(query, key, value, scale=0.3, enable_gqa=True), whole)


def test_a_model_inside_computes_what_it_does_outside() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.up(x).view(2, -1, 3, 16).transpose(1, 2)
            return self.down(
                functional.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
            )

    model, x = Small(), torch.randn(2, 100, 32)
    with torch.no_grad():
        outside = model(x)
        with Quick():
            _close(model(x), outside)
            exact = model.double()(x.double())
    assert exact.dtype == torch.float64
    model.float()
    with Quick():
        model(x).sum().backward()  # gradients go the usual way
    assert model.up.weight.grad is not None
    assert bool(model.up.weight.grad.any())


def test_hidden_states_of_a_batch_fit_in_a_cache() -> None:
    cpu = torch.device("cpu")
    assert cached_batch(8, 512, 256, cpu) == 2
    assert cached_batch(8, 256, 128, cpu) == 8  # no more than asked for
    assert cached_batch(8, 2048, 4096, cpu) == 1
    assert cached_batch(8, 2048, 4096, torch.device("cuda")) == 8


def test_a_tray_keeps_values_side_by_side_and_lets_them_go_together() -> None:
    tray = Tray(lambda x: x)
    given = [torch.randn(1 << 10, 256) for _ in range(10)]
    kept = [tray(x) for x in given]
    assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in zip(given, kept, strict=True))
    assert len({x.untyped_storage().data_ptr() for x in kept}) == 2
    assert kept[0].untyped_storage().nbytes() == TRAY_BYTES
    large = torch.empty(1 << 20)
    assert tray(large) is large
    assert tray(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    moved = torch.zeros(4)
    assert Tray(lambda _: moved)(torch.ones(4)) is moved
