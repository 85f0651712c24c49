"""Products of float32 matrices on a CPU, by the library that makes them fastest, exact to float32's rounding.

torch hands them to MKL, which keeps to AVX2 on processors that are not Intel's: half the speed of the oneDNN that
torch also brings along where there is AVX-512. Results are the same for any number of threads. Calls that this module
knows nothing about, and inputs elsewhere or in another dtype, go the usual way.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEWEST_ROWS = 32  # below, there is more to set up than to multiply
CACHE_BYTES = 1 << 20  # of a core's own, which hidden states of a batch should fit in: elementwise work waits for them
QUERIES = 64  # that attend to what precedes the last of them at a time
MOST_TOKENS = 1024  # of a sequence; torch's own kernel skips what is masked in longer ones


@cache
def _kernel() -> Callable[..., Tensor] | None:
    """oneDNN's linear, where it is worth calling."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not there or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return None
    found: Callable[..., Tensor] | None = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return found


def _plain(*tensors: Tensor) -> bool:
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.dtype == torch.float32 for x in tensors) and all(
        x.device.type == "cpu" and x.numel() for x in tensors
    )


def cached_batch(most: int, tokens: int, width: int, device: torch.device) -> int:
    """How many sequences of `tokens` to run through blocks of a `width` at a time, on a CPU fewer than `most`."""
    return most if device.type != "cpu" else max(1, min(most, CACHE_BYTES // (tokens * width * 4)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x `(..., columns)`, weight `(rows, columns)`, bias `(rows,)`; returns `(..., rows)`."""
    kernel = _kernel()
    if kernel is None or weight.dim() != 2 or not _plain(x, weight) or x.numel() < FEWEST_ROWS * x.shape[-1]:
        return functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in (x, weight, bias)):
        found: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return found
    return kernel(x, weight.contiguous(), bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """`linear` with gradients, which are products of the same kind; they have none of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Called without gradients."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of inputs, weight and bias, as far as they are needed."""
        (x, weight), flat = ctx.saved_tensors, gradient.flatten(0, -2)
        return (
            None if weight is None else linear(gradient, weight.T),
            None if x is None else inner(turned(flat), turned(x.flatten(0, -2))),
            flat.sum(0) if ctx.needs_input_grad[2] else None,
        )


def turned(x: Tensor) -> Tensor:
    """`x^T`, laid out as `inner` is quickest with."""
    return x.T if _kernel() is None or not _plain(x) else x.T.contiguous()


def inner(left: Tensor, right: Tensor) -> Tensor:
    """`A B^T` of `(a, tokens)` and `(b, tokens)`, both from `turned`; `(a, b)`."""
    return linear(left, right) if left.is_contiguous() and right.is_contiguous() else left @ right.T


def causal_attention(query: Tensor, key: Tensor, value: Tensor, **more: Any) -> Tensor:
    """Attention of every token to itself and those before it, `(batch, heads, tokens, width)`.

    Some queries at a time, each time only as many keys as the last of them may see: torch's own kernel multiplies
    all keys up to 512 and masks half of the products. `more` are its remaining arguments.
    """
    tokens = query.shape[-2]
    reach = torch.zeros(QUERIES, tokens + QUERIES)
    reach[:, tokens:] = torch.full((QUERIES, QUERIES), -torch.inf).triu(1)
    out = query.new_empty(*query.shape[:-3], tokens, query.shape[-3], value.shape[-1]).transpose(-2, -3)
    for start in range(0, tokens, QUERIES):
        stop = min(start + QUERIES, tokens)
        mask = reach[: stop - start, tokens - start : tokens - start + stop]
        out[..., start:stop, :] = functional.scaled_dot_product_attention(
            query[..., start:stop, :], key[..., :stop, :], value[..., :stop, :], attn_mask=mask, **more
        )
    return out


def _attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **more: Any) -> Tensor:
    """`scaled_dot_product_attention`, causal ones in parts."""
    causal = not rest and more.get("is_causal") and more.get("attn_mask") is None and not more.get("dropout_p")
    grown = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    square = query.dim() == 4 and QUERIES < query.shape[-2] == key.shape[-2] <= MOST_TOKENS
    if not causal or grown or not square or not _plain(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, *rest, **more)
    kept = {name: more[name] for name in ("scale", "enable_gqa") if name in more}
    return causal_attention(query, key, value, **kept)


class Quick(TorchFunctionMode):
    """Inside, a model's linears and causal attention are computed by this module, whatever family it is of."""

    def __torch_function__(
        self, function: Any, _: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch for each of its functions."""
        if function is functional.linear:
            function = linear
        elif function is functional.scaled_dot_product_attention:
            function = _attention
        return function(*args, **(kwargs or {}))
