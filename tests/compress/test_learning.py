"""Learning the rounding of a block: never worse than where it began, and what each method may move."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.compress import head
from llmcompress.compress.grid import find_scale, round_weight
from llmcompress.compress.group import Method
from llmcompress.compress.head import logits_reader
from llmcompress.compress.learning import Lesson, learn_block
from llmcompress.compress.measuring import sequence_kld
from llmcompress.compress.observe import install_weight, weight_of
from llmcompress.compress.quantizers import adaround, signround
from llmcompress.compress.rounds import BlockRounds, Streams
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.trace import trace
from llmcompress.types import LinearSpec, QuantizerOptions

LEARNERS: dict[str, Any] = {"signround": signround, "adaround": adaround}
SPEC = LinearSpec(bits=2, group_size=32)


def lesson_of(model: Path, batches: int = 40) -> tuple[Lesson, Streams]:
    """Block 0 of a model and random text entering it."""
    skeleton = Skeleton.open(model)
    info = trace(skeleton).blocks[0]
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(96, (2, 24), generator=generator) for _ in range(batches)]
    stream = BlockStream(skeleton)
    hidden, calls = stream.start(tokens)
    block, here = skeleton.load_block(0), [call[0] for call in calls]
    with torch.no_grad():
        outputs = [stream.run_block(0, state, call) for state, call in zip(hidden, here, strict=True)]
    return Lesson(block, info, hidden, outputs, here), Streams(hidden, list(hidden), here)


def nearest(lesson: Lesson) -> dict[str, Any]:
    found = {}
    for linear in lesson.info.linears:
        weight = weight_of(lesson.block, lesson.info, linear).contiguous()
        found[linear.name] = (linear, weight, round_weight(weight, find_scale(weight, SPEC, torch.bfloat16), SPEC))
    return found


@pytest.mark.parametrize("name", LEARNERS)
def test_learning_lowers_the_error_of_the_block_on_text_it_did_not_see(name: str, llama: Path) -> None:
    lesson, _ = lesson_of(llama)
    options = QuantizerOptions(iterations=100)
    learned = {n: (x, LEARNERS[name].learn(w, c, options)) for n, (x, w, c) in nearest(lesson).items()}
    best, lessons = learn_block(lesson, learned, options=options, dtype=torch.bfloat16)
    assert lessons.after < 0.9 * lessons.before
    for linear, codes in best.items():
        assert int(codes.codes.max()) < 4
        assert codes.scale.dtype == torch.bfloat16
        assert codes.spec == nearest(lesson)[linear][2].spec


@pytest.mark.parametrize("name", LEARNERS)
def test_what_does_not_help_is_not_kept(name: str, llama: Path) -> None:
    """A rate so large that every step does harm: the codes begun from come back."""
    lesson, _ = lesson_of(llama)
    options = QuantizerOptions(iterations=10, rate=50.0)
    start = nearest(lesson)
    learned = {n: (x, LEARNERS[name].learn(w, c, options)) for n, (x, w, c) in start.items()}
    best, lessons = learn_block(lesson, learned, options=options, dtype=torch.bfloat16)
    assert lessons.after == lessons.before
    for linear, codes in best.items():
        assert torch.equal(codes.codes, start[linear][2].codes)
        assert torch.equal(codes.scale, start[linear][2].scale)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_learning_begins_at_the_codes_given(name: str, bits: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(12, 64, generator=generator)
    spec = LinearSpec(bits=bits, group_size=32)
    codes = round_weight(weight, find_scale(weight, spec, torch.float32), spec)
    moved = codes.codes.int() + torch.randint(-1, 2, codes.codes.shape, generator=generator)
    codes = type(codes)(moved.clamp(0, 2**bits - 1).to(torch.uint8), codes.scale, spec)
    learned = LEARNERS[name].learn(weight, codes, QuantizerOptions())
    found = learned.codes(torch.float32)
    assert torch.equal(found.codes, codes.codes)
    assert torch.equal(found.scale, codes.scale)


def test_signround_travels_at_most_half_a_step_at_its_own_rate() -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    codes = round_weight(weight, find_scale(weight, SPEC, torch.float32), SPEC)
    options = QuantizerOptions(iterations=50)
    learned = signround.learn(weight, codes, options)
    begin = learned.latent.detach().clone()
    for step in range(50):
        learned.latent.grad = torch.ones_like(begin)
        learned.step(step / 50)
    travel = (begin - learned.latent.detach()).abs().max()
    assert 0.4 < float(travel) <= 0.5 + 0.5 / 50 + 1e-6


def slow_step(weight: Tensor, latent: Tensor, scale: Tensor) -> Tensor:
    """Gradient of `sum(Q * weight)` with respect to the latent codes, the rounding taken for the identity."""
    inside = (torch.round(latent) >= -2) & (torch.round(latent) <= 1)
    return weight * scale.repeat_interleave(32, 1) * inside


def test_the_gradient_goes_straight_through_the_rounding() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, probe = torch.randn(4, 64, generator=generator), torch.randn(4, 64, generator=generator)
    codes = round_weight(weight, find_scale(weight, SPEC, torch.float32), SPEC)
    learned = signround.learn(weight, codes, QuantizerOptions())
    (learned.weight() * probe).sum().backward()
    assert learned.latent.grad is not None
    assert torch.allclose(learned.latent.grad, slow_step(probe, learned.latent.detach(), codes.scale))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_block_is_learned_only_when_it_is_to_be(name: str, llama: Path) -> None:
    """On trial a block is rounded as GPTQ rounds it; for good it is learned from there, the same way twice."""
    specs = {linear.name: SPEC for linear in lesson_of(llama)[0].info.linears}
    found: dict[str, list[Tensor]] = {}
    for label, learns in (("trial", False), ("good", True), ("again", True)):
        lesson, streams = lesson_of(llama)
        method = Method(
            LEARNERS[name], QuantizerOptions(iterations=200, target="layer", clip=False), torch.bfloat16, learns
        )
        rounded = list(BlockRounds(method, lesson.block, lesson.info, specs, streams).rounded())
        assert [x.linear.name for x in rounded] == [x.name for x in lesson.info.linears]
        found[label] = [x.result.codes.dequantize() for x in rounded]
        for x in rounded:  # what is installed is what is stored
            assert torch.equal(weight_of(lesson.block, lesson.info, x.linear), x.result.codes.dequantize())
    assert all(torch.equal(a, b) for a, b in zip(found["good"], found["again"], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(found["trial"], found["good"], strict=True))


def test_nothing_is_learned_without_a_batch_to_hold_out(llama: Path) -> None:
    """One batch: the answer is that of rounding, and the report says why."""
    lesson, streams = lesson_of(llama, batches=1)
    specs = {linear.name: SPEC for linear in lesson.info.linears}
    method = Method(signround, QuantizerOptions(iterations=5), torch.bfloat16, learns=True)
    rounded = list(BlockRounds(method, lesson.block, lesson.info, specs, streams).rounded())
    again, streams = lesson_of(llama, batches=1)
    plain = Method(signround, QuantizerOptions(iterations=5), torch.bfloat16, learns=False)
    expected = list(BlockRounds(plain, again.block, again.info, specs, streams).rounded())
    for x, y in zip(rounded, expected, strict=True):
        assert "not learned" in x.result.fallbacks[-1]
        assert torch.equal(x.result.codes.dequantize(), y.result.codes.dequantize())


def test_the_last_block_is_learned_by_the_logits_that_come_of_it(llama: Path) -> None:
    skeleton = Skeleton.open(llama)
    info, stream = trace(skeleton).blocks[-1], BlockStream(skeleton)
    tokens = [torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(16)]
    hidden, calls = stream.start(tokens)
    block, here = skeleton.load_block(info.index), [call[info.index] for call in calls]
    with torch.no_grad():
        outputs = [stream.run_block(info.index, state, call) for state, call in zip(hidden, here, strict=True)]
    lesson = Lesson(block, info, hidden, outputs, here, logits_reader(stream, tokens))
    options = QuantizerOptions(iterations=60)
    learned = {n: (x, signround.learn(w, c, options)) for n, (x, w, c) in nearest(lesson).items()}
    best, lessons = learn_block(lesson, learned, options=options, dtype=torch.bfloat16)
    for x in info.linears:
        install_weight(block, info, x, best[x.name].dequantize())
    divergences = []
    for place in (7, 15):  # every eighth is held out
        left = stream.run_block(info.index, hidden[place], here[place])
        p, q = (torch.log_softmax(stream.leave(tokens[place], x), -1) for x in (outputs[place], left))
        divergences.append(float(sequence_kld(p, q).mean()))
    assert lessons.after < 0.9 * lessons.before
    assert sum(divergences) / 2 == pytest.approx(lessons.after, rel=1e-3)


def test_logits_of_many_words_are_read_at_few_positions(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = Skeleton.open(llama)
    stream, tokens = BlockStream(skeleton), [torch.arange(48).view(2, 24)]
    hidden, _ = stream.start(tokens)
    whole = logits_reader(stream, tokens)(0, hidden[0])
    assert torch.allclose(whole, stream.leave(tokens[0], hidden[0]))
    for room, positions in ((48 * 96, 24), (24 * 96, 12), (17 * 96, 8), (1, 1)):
        monkeypatch.setattr(head, "LOGITS", room)
        some = logits_reader(stream, tokens)(0, hidden[0])
        assert torch.allclose(some, whole[:, 24 // positions - 1 :: 24 // positions], atol=1e-6)
