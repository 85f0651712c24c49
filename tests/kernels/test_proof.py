"""Kernels in CUDA C++ prove themselves on the GPU at hand before they are used, with stand-ins for the kernels here."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton_cases
from torch import Tensor

from llmcompress.errors import MachineError
from llmcompress.kernels.nvrtc import many, small
from llmcompress.kernels.triton import layout, proof, trial, tuning
from llmcompress.kernels.triton.tuning import Config, Fused, Lean, Strips
from llmcompress.spec import LinearSpec

SPECS = [LinearSpec(bits=4, group_size=64), LinearSpec(bits=3, group_size=256, kind="asymmetric"),
         LinearSpec(bits=4, group_size=64, kind="nf4")]  # fmt: skip
COLUMNS = 256
Kernel = Callable[..., Tensor]


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that proofs make up, as they make them; nothing is known of any kernel yet."""
    made: list[Tensor] = []

    def spied(case: trial.Case, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], Tensor]:
        weight, found = trial.random_linear(case, generator)
        made.append(found)
        return weight, found

    monkeypatch.setattr(proof, "random_linear", spied)
    monkeypatch.setattr(proof, "_found", {})
    return made


def prepared_of(spec: LinearSpec, rows: int = 48) -> tuple[dict[str, Tensor], layout.Packing]:
    case = trial.Case(spec, rows, COLUMNS, 1, torch.bfloat16, torch.device("cpu"), torch.float16)
    return trial.random_weight(case), case.packing


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.label)
@pytest.mark.parametrize("config", [Lean(4), Lean(4, terms=2), Fused(128, 128, 6)])
def test_a_right_kernel_is_used_and_asked_once(
    spec: LinearSpec, config: Lean | Fused, dense: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dtypes of the call; whoever draws random numbers draws what they would have drawn."""
    asked: list[tuple[int, ...]] = []

    def right(x: Tensor, weight: dict[str, Tensor], packing: layout.Packing, rows: int, _: object) -> Tensor:
        assert weight["scale"].dtype == torch.float16
        assert packing == layout.packing_of(spec, COLUMNS)
        asked.append((len(x), rows))
        return (x.float() @ dense[-1].T).to(x.dtype)

    monkeypatch.setattr(many if isinstance(config, Fused) else small, "multiply", right)
    prepared, packing = prepared_of(spec)
    tokens = 133 if isinstance(config, Fused) else {1: 8, 2: 3}[config.terms]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert proof.multiplies(torch.zeros(3, COLUMNS, dtype=torch.bfloat16), prepared, packing, 48, config)
        assert asked == [(tokens, 384 if isinstance(config, Fused) else 48)] * 2
        assert proof.multiplies(torch.zeros(3, COLUMNS, dtype=torch.bfloat16), prepared, packing, 47, config)
        assert asked[2:] == [(tokens, 379 if isinstance(config, Fused) else 43)] * 2
    assert torch.equal(torch.get_rng_state(), state)


def one_row_off(found: Tensor) -> Tensor:
    found[:, 2] *= 1.1
    return found


def not_compiled(_: Tensor) -> Tensor:
    raise MachineError("a kernel does not compile: ptxas is old", "")


@pytest.mark.parametrize("spoil", [one_row_off, not_compiled])
def test_a_wrong_kernel_is_left_alone(
    spoil: Callable[[Tensor], Tensor], dense: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one warning that says why and how to do without."""
    monkeypatch.setattr(small, "multiply", lambda x, *_: spoil((x.float() @ dense[-1].T).to(x.dtype)))
    prepared, packing = prepared_of(SPECS[0])
    x = torch.zeros(1, COLUMNS, dtype=torch.bfloat16)
    with pytest.warns(RuntimeWarning, match=r"not used on cpu: .*(PyTorch's|ptxas is old) \(LLMCOMPRESS_NVRTC=0"):
        assert not proof.multiplies(x, prepared, packing, 48, Lean(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not proof.multiplies(x, prepared, packing, 48, Lean(4))


def test_rows_are_unpacked_by_a_kernel_that_is_right(dense: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, packing = prepared_of(SPECS[1])
    monkeypatch.setattr(small, "dequantize", lambda *given: dense[-1].to(given[-1]))
    assert proof.unpacks(prepared, packing, torch.float16)
    monkeypatch.setattr(small, "dequantize", lambda *given: one_row_off(dense[-1].T.clone()).T.to(given[-1]))
    with pytest.warns(RuntimeWarning):
        assert not proof.unpacks(prepared, packing, torch.bfloat16)
    assert proof.unpacks(prepared, packing, torch.float16)


def test_nothing_is_proved_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was proved before is used there, what was not is not, and can be proved later."""
    capturing = True
    monkeypatch.setattr(proof, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    device = torch.device("cuda")
    assert not proof._holds("kernel", device, lambda: True)
    capturing = False
    assert proof._holds("kernel", device, lambda: True)
    capturing = True
    assert proof._holds("kernel", device, lambda: False)


def test_a_fault_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault() -> bool:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(proof, "_found", {})
    with pytest.raises(MachineError) as caught:
        proof._holds("kernel", torch.device("cpu"), fault)
    assert "illegal memory access" in str(caught.value)
    assert "LLMCOMPRESS_NVRTC=0" in str(caught.value.hint)


@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton is not installed")
def test_products_go_where_a_table_says_and_proofs_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the kernel it names, where that finds room and is right; otherwise to Triton's, and many tokens in strips."""
    from llmcompress.kernels.triton import ways

    packing = layout.packing_of(SPECS[0], 4096)
    tile, fused = Config(64, 16, 1, 4, 3), Fused(128, 256, 5)
    monkeypatch.setattr(ways, "choose", lambda *given: Lean(4) if given[-1] is True else tile)
    monkeypatch.setattr(ways.nvrtc, "fits", lambda *_: True)
    monkeypatch.setattr(ways.many, "fits", lambda *_: True)

    def way(tokens: int, right: bool = True, named: Any = fused, dtype: torch.dtype = torch.bfloat16) -> tuning.Choice:
        monkeypatch.setattr(ways, "choose_many", lambda *_: named)
        monkeypatch.setattr(ways, "multiplies", lambda *_: right)
        return ways.chosen(torch.zeros((tokens, 4096), dtype=dtype), {}, packing, 64)

    assert way(3) == Lean(4)
    assert way(3, right=False) == tile
    assert way(300) == fused
    assert way(300, right=False) == Strips()
    assert way(300, named=Fused(128, 256, 8)) == Strips()  # no room for so many stages
    assert way(300, dtype=torch.float32) == Strips()
    assert way(300, named=tile) == tile
    assert (
        ways.chosen(torch.zeros((3, 4096)), {}, layout.packing_of(LinearSpec(bits=5, group_size=64), 4096), 64)
        == Strips()
    )

    ran: list[tuple[str, Any]] = []
    for module, name in ((ways, "multiply_tile"), (small, "multiply"), (many, "multiply"), (ways, "multiply_strips")):
        label = name if module is ways else module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, name, lambda *given, label=label: ran.append((label, given[-1])))
    for config in (tile, Lean(4), fused):
        ways.product(torch.zeros(1), {}, packing, 64, config)
    ways.product(torch.zeros(1), {}, packing, 64, Strips())
    assert ran == [("multiply_tile", tile), ("small", Lean(4)), ("many", fused), ("multiply_strips", 64)]
