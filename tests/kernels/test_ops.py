"""The operator as torch sees it: schema, fake kernels, gradients, compilation."""

import pytest
import torch

from llmcompress.kernels import backends, ops
from tests.kernels.formats import FORMATS, arguments, linear_of


@pytest.mark.parametrize("name", FORMATS)
def test_one_schema_holds_every_format(name: str) -> None:
    words = arguments(name, 8, 768)
    x = torch.randn(2, 3, 768)
    for grad in (False, True):
        torch.library.opcheck(torch.ops.llmcompress.linear.default, (x.clone().requires_grad_(grad), *words))


def test_the_backward_is_an_operator_too() -> None:
    torch.library.opcheck(torch.ops.llmcompress.linear_back.default, (torch.randn(2, 8), *arguments("nf4-g64", 8, 192)))


@pytest.mark.parametrize("name", ["int3-g64", "asymmetric4-g32", "nf4-g64-double", "codebook3", "int2+2-g64"])
def test_gradients_are_those_of_the_dense_linear(name: str) -> None:
    codes, _ = linear_of(name, 8, 192)
    x = torch.randn(2, 3, 192, requires_grad=True)
    upstream = torch.randn(2, 3, 8)
    (torch.ops.llmcompress.linear(x, *arguments(name, 8, 192)) * upstream).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, upstream @ codes.dequantize(), atol=1e-4, rtol=1e-4)


def test_any_leading_shape() -> None:
    words = arguments("int4-g64", 8, 192) if "int4-g64" in FORMATS else arguments("int3-g64", 8, 192)
    whole = torch.randn(6, 192)
    flat = ops.run(whole, *words)
    assert torch.equal(ops.run(whole.view(2, 3, 192), *words), flat.view(2, 3, 8))
    assert ops.run(whole[:0], *words).shape == (0, 8)
    strided = torch.randn(192, 6).T
    assert torch.equal(ops.run(strided, *words), ops.run(strided.contiguous(), *words))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_call_that_is_bound_is_the_call_before(dtype: torch.dtype) -> None:
    """Torch's own kernel, with the weight described once: any shape, strides, no tokens, and more than it takes."""
    with backends.use("torch_cpu"):
        words = arguments("int3-g64", 16, 192)
        x = torch.randn(2, 40, 192).to(dtype)
        for some in (x[:1, :3], x[:, :7], x[:1, :1], x.transpose(0, 1)[:2], x[:0], x):
            fresh = [tensor.clone() for tensor in words[0]]  # nothing is known of these
            assert torch.equal(ops.run(some, *words), ops.run(some, fresh, *words[1:]))


def test_a_compiled_graph_is_whole_and_takes_other_sizes() -> None:
    words = arguments("int3-g64", 8, 192)

    def twice(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.llmcompress.linear(x * 2, *words).relu()

    compiled = torch.compile(twice, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (1, 7):
        x = torch.randn(tokens, 192)
        torch.testing.assert_close(compiled(x), twice(x))
