"""Scales of inputs: from text, clipped or not, or as a rewriting has settled them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.compress.dealing import dealt
from llmcompress.compress.group import Method
from llmcompress.compress.ranges import InputRanges, calibrated
from llmcompress.compress.rewriting.clipping import ActivationQuantizer
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.compress.rounds import BlockRounds, Streams
from llmcompress.errors import InputError
from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.trace import trace
from llmcompress.plugins import find
from llmcompress.spec import INPUTS, LinearSpec
from llmcompress.types import QuantizerOptions

STATIC = [word for word, spec in INPUTS.items() if spec.scale == "tensor"]


def heavy(seed: int) -> list[Tensor]:
    """Batches of inputs with a few values far out, more of them on one side."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4, 64, 48, generator=generator)
    inputs[torch.rand(inputs.shape, generator=generator) < 2e-3] *= 12
    return list(inputs.clamp_min(-4))


def found(word: str, batches: list[Tensor], clip: str, dtype: torch.dtype = torch.bfloat16) -> InputQuantizer:
    options = QuantizerOptions(inputs=word, input_clip=clip)
    return InputRanges(options, dtype).find(INPUTS[word], "q", iter(batches))


@pytest.mark.parametrize("word", STATIC)
def test_without_clipping_nothing_is_cut_off(word: str) -> None:
    batches = heavy(0)
    rounder, inputs = found(word, batches, "none", torch.float32), torch.cat(batches)
    step = float(rounder.scale) if INPUTS[word].kind == "int" else float(inputs.abs().max()) / 8
    assert float((rounder(inputs) - inputs).abs().max()) <= step * 0.51 + 1e-6
    codes, _ = rounder.codes(inputs)
    most = 448 if INPUTS[word].kind == "fp8" else (1 << (INPUTS[word].bits - 1)) - 1
    assert float(codes.max()) >= most - 1  # and no code is wasted at the upper end, where the largest values are


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([word for word in STATIC if INPUTS[word].kind == "int"]), st.integers(0, 50))
def test_clipping_lowers_the_squared_error(word: str, seed: int) -> None:
    batches = heavy(seed)
    inputs = torch.cat(batches)
    plain, clipped = (found(word, batches, clip, torch.float32)(inputs) - inputs for clip in ("none", "grid"))
    assert float(clipped.square().mean()) <= float(plain.square().mean()) * (1 + 1e-6)
    if INPUTS[word].bits == 4:
        assert float(clipped.square().mean()) < 0.7 * float(plain.square().mean())


def test_inputs_that_are_all_zero_have_a_scale() -> None:
    for word in STATIC:
        rounder = found(word, [torch.zeros(8, 4)], "grid")
        assert torch.equal(rounder(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("batches", [[], [torch.tensor([[1.0, float("inf")]])]])
def test_ranges_need_finite_text(batches: list[Tensor]) -> None:
    with pytest.raises(InputError, match="no range of inputs"):
        calibrated(INPUTS["int8"], iter(batches), clip=False, where="q")


def settled(zero: float, bits: int = 8) -> ActivationQuantizer:
    return ActivationQuantizer(torch.tensor(0.0625), torch.tensor(zero), bits)


@pytest.mark.parametrize(
    ("word", "quantizer", "taken"),
    [
        ("int8", settled(90.0), True),
        ("int8", settled(128.0), True),
        ("int8-symmetric", settled(128.0), True),
        ("int8-symmetric", settled(90.0), False),
        ("int8", settled(8.0, 4), False),
        ("int4", settled(3.0, 4), True),
        ("fp8", settled(128.0), False),
    ],
)
def test_what_a_rewriting_settled_is_taken_where_it_can_be(
    word: str, quantizer: ActivationQuantizer, taken: bool
) -> None:
    batches = heavy(1)
    ranges = InputRanges(QuantizerOptions(inputs=word), torch.bfloat16, {"q": quantizer})
    rounder = ranges.find(INPUTS[word], "q", iter(batches))
    assert ranges.find(INPUTS[word], "other", iter(batches)) == found(word, batches, "grid")
    if not taken:
        assert rounder == found(word, batches, "grid")
        return
    inputs = torch.cat(batches)
    codes, scale = rounder.codes(inputs)
    half = 1 << (quantizer.bits - 1)
    assert float(scale) == 0.0625
    assert float((codes + half != quantizer.codes(inputs)).float().mean()) < 1e-4  # but for ties
    assert float((rounder(inputs) - quantizer(inputs)).abs().mean()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("sequential", [True, False])
def test_a_block_is_rounded_on_rounded_inputs(llama: Path, sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = Skeleton.open(llama)
    traced = trace(skeleton)
    stream = BlockStream(skeleton)
    tokens = [torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    hidden, calls = stream.start(tokens)
    info = traced.blocks[0]
    spec = LinearSpec(bits=8, group_size=64, kind="int8", inputs=INPUTS["int8"])
    specs = {x.name: spec.model_copy(update={"group_size": x.columns}) for x in info.linears}
    first = info.linears[0].name
    options = QuantizerOptions(inputs="int8", target="layer", true_sequential=sequential)
    method = Method(
        find("llmcompress.compress.quantizers", "gptq"), options, torch.bfloat16, hints=Hints({first: settled(100)})
    )
    block = skeleton.load_block(0)
    read = [block.input_layernorm(batch).flatten(0, -2) for batch in hidden]
    rounds = BlockRounds(method, block, info, specs, Streams(hidden, None, [call[0] for call in calls]))
    hessians = []  # of each group; they are let go of once its codes are final

    def watched(crew: Any, quantizer: Any, requests: Any, seen: Any, **more: Any) -> Any:
        hessians.append(seen.hessian.clone())
        return dealt(crew, quantizer, requests, seen, **more)

    monkeypatch.setattr("llmcompress.compress.group.dealt", watched)
    rounded = {x.linear.name: x for x in rounds.rounded()}
    assert set(rounded) == set(specs)
    one = rounded[first]
    assert one.result.codes.inputs is not None
    assert one.result.codes.inputs.zero is not None
    assert (float(one.result.codes.inputs.scale), int(one.result.codes.inputs.zero)) == (0.0625, -28)
    x = torch.cat([one.result.codes.inputs(batch) for batch in read])
    assert torch.allclose(hessians[0], x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    before = stream.run_block(0, hidden[0], calls[0][0])
    rounds.close()
    assert float((stream.run_block(0, hidden[0], calls[0][0]) - before).abs().max()) > 1e-4
    assert all(not module._forward_pre_hooks and "forward" not in vars(module) for module in block.modules())
