"""Linears of one input multiplied as one, with a backend of plain torch that can join weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from llmcompress.kernels import backends
from llmcompress.kernels.backends import reference
from llmcompress.kernels.samples import random_codes
from llmcompress.kernels.stored import tensors_of
from llmcompress.runtime.modules import PackedLinear
from llmcompress.runtime.siblings import introduce
from llmcompress.spec import LinearSpec

ROWS = {"q_proj": 48, "k_proj": 16, "v_proj": 16, "o_proj": 32}
CALLS: list[int] = []


class Attention(nn.Module):
    """Only its linears."""

    def __init__(self, specs: Mapping[str, LinearSpec]) -> None:
        super().__init__()
        for name, spec in specs.items():
            codes = random_codes(spec, ROWS[name], 64)
            if spec.rank:
                codes = replace(codes, up=torch.randn(ROWS[name], spec.rank), down=torch.randn(spec.rank, 64))
            bias = nn.Parameter(torch.randn(ROWS[name])) if name == "k_proj" else None
            setattr(self, name, PackedLinear(spec, tensors_of("", codes), (ROWS[name], 64), bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name)(x) for name in ("q_proj", "k_proj", "v_proj"))


@pytest.fixture(autouse=True)
def joining(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The reference backend, able to join."""

    def join(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        found = {name: torch.cat([w[name] for w in weights]) for name in weights[0] if not name.endswith("shape")}
        sizes = torch.stack([w[".weight_shape"] for w in weights])
        return found | {".weight_shape": torch.stack([sizes[:, 0].sum(), sizes[0, 1]])}

    def part(joined: Mapping[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
        found = {name: tensor[first:last] for name, tensor in joined.items() if not name.endswith("shape")}
        return found | {".weight_shape": torch.tensor([last - first, joined[".weight_shape"][1]])}

    whole = reference.linear

    def counted(x: Tensor, prepared: Mapping[str, Tensor], spec: LinearSpec, rows: int, columns: int) -> Tensor:
        CALLS.append(rows)
        return whole(x, prepared, spec, rows, columns)

    monkeypatch.setattr(reference, "join", join, raising=False)
    monkeypatch.setattr(reference, "part", part, raising=False)
    monkeypatch.setattr(reference, "linear", counted)
    with backends.use("reference"):
        yield
    CALLS.clear()


def attention(rank: int = 0, **other: LinearSpec) -> Attention:
    """Four linears of 4 bits, some of them in another format."""
    return Attention(dict.fromkeys(ROWS, LinearSpec(bits=4, group_size=32, rank=rank)) | other).requires_grad_(False)


@pytest.mark.parametrize("rank", [0, 3])
def test_one_product_gives_what_three_gave(rank: int) -> None:
    model, x = attention(rank), torch.randn(2, 3, 64)
    wanted = model(x)
    CALLS.clear()
    introduce(model)
    assert model.q_proj.siblings.settle(x)
    found = model(x)
    assert CALLS == [80]
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
    assert model.o_proj.siblings is None


def test_other_inputs_and_other_orders_are_never_mixed_up() -> None:
    model, x, y = attention(), torch.randn(3, 64), torch.randn(3, 64)
    wanted = {(name, place): getattr(model, name)(z) for name in ROWS for place, z in enumerate((x, y))}
    introduce(model)
    model.q_proj.siblings.settle(x)
    for name, place in (("k_proj", 0), ("k_proj", 0), ("q_proj", 1), ("v_proj", 0), ("v_proj", 1), ("q_proj", 0)):
        assert torch.equal(getattr(model, name)((x, y)[place]), wanted[name, place])
    twin = x.clone()
    assert torch.equal(model.v_proj(twin), wanted["v_proj", 0])


def test_weights_files_and_gradients_stay_those_of_each() -> None:
    model, x = attention(), torch.randn(2, 64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: getattr(model, name).dequantize() for name in ROWS}
    introduce(model)
    model.v_proj.siblings.settle(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(getattr(model, name).dequantize(), weight) for name, weight in weights.items())
    leaf = x.clone().requires_grad_(True)
    model.v_proj(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, weights["v_proj"].sum(0).expand(2, -1))
    model.to(torch.float32)
    assert not model.q_proj.siblings.settled
    assert torch.equal(model.q_proj(x), x @ weights["q_proj"].T)


def test_formats_that_differ_stay_apart() -> None:
    model = attention(v_proj=LinearSpec(bits=3, group_size=32))
    introduce(model)
    assert model.q_proj.siblings is None


def test_they_compile_whole() -> None:
    model, x = attention(), torch.randn(2, 64)
    introduce(model)
    model.q_proj.siblings.settle(x)
    wanted = model(x)
    found = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert all(torch.equal(left, right) for left, right in zip(found, wanted, strict=True))
    assert model.q_proj.siblings._last is None
