"""The parts of healing: places, the order of text, saves, the original's answers, scales of every format."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from conftest import llama_config, save_model
from heal_help import TOKENS, logits_of, quantized
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.compress.heal.places import Places, active, seams_of, select
from llmcompress.compress.heal.run import load_whole
from llmcompress.compress.heal.state import Measured, Position, Saves
from llmcompress.compress.heal.training import Original, Schedule
from llmcompress.compress.heal.tuning import NormTuning, has_scales
from llmcompress.compress.scorers.rdp import breakpoint_scores, breakpoints
from llmcompress.model.skeleton import Skeleton
from llmcompress.runtime.packed import PackedReader


def test_a_damaged_save_is_passed_over(tmp_path: Path) -> None:
    saves, history = Saves(tmp_path), ()
    assert saves.latest() is None
    for step in range(4):
        history = (*history, Measured(step=step, kld=1.0 / (step + 1)))
        saves.save(Position(step=step, history=history, seconds=0.0), {"now.x": torch.full((3,), float(step))})
    assert len(list(tmp_path.iterdir())) == 4  # two saves
    newest = tmp_path / "heal-00004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\x01")
    found = saves.latest()
    assert found is not None
    assert found[0].step == 2
    assert found[1]["now.x"].tolist() == [2.0] * 3
    (tmp_path / "heal-00003.json").write_text("{")
    assert saves.latest() is None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 999))
def test_every_sequence_is_read_once_before_any_is_read_again(batch: int, available: int, seed: int) -> None:
    schedule = Schedule(batch_size=batch, seed=seed)
    read = [row for step in range(-(-3 * available // batch)) for row in schedule.rows(step, available)]
    for epoch in range(3):
        assert sorted(read[epoch * available : (epoch + 1) * available]) == list(range(available))


def test_lisa_trains_so_many_blocks_each_as_often() -> None:
    drawn = [active((1, 3, 4, 6), period, 2, 0) for period in range(2000)]
    assert all(len(some) == 2 and some <= {1, 3, 4, 6} for some in drawn)
    shares = [count / 2000 for count in Counter(block for some in drawn for block in some).values()]
    assert shares == pytest.approx([0.5] * 4, abs=0.04)
    assert drawn[:5] == [active((1, 3, 4, 6), period, 2, 0) for period in range(5)]
    assert active((1, 3), 7, None, 0) == active((1, 3), 7, 5, 0) == {1, 3}


def test_rates_rise_and_fall() -> None:
    schedule = Schedule(steps=100, rate=1.0)
    rates = [schedule.rate_at(step) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(late < early for early, late in pairwise(rates[5:]))
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_rdp_takes_the_blocks_after_which_the_path_bends(tmp_path: Path) -> None:
    source = save_model(tmp_path / "deep", llama_config(num_hidden_layers=6))
    skeleton = Skeleton.open(source)
    load_whole(skeleton)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = TOKENS[:1]
    seen = [model.model.embed_tokens(tokens)]
    hooks = [block.register_forward_hook(lambda *given: seen.append(given[2])) for block in model.model.layers]
    model(tokens)
    assert len(hooks) == 6
    path = numpy.stack([s[0, 1:].mean(0).detach().double().numpy() for s in seen])
    path /= numpy.linalg.norm(path, axis=1, keepdims=True)
    best = breakpoints(breakpoint_scores(path), 1)  # one path: the corner that one breakpoint keeps gets every vote
    found = select(Places("rdp", 1), skeleton, [tokens], 0)
    assert len(found) == 1
    assert set(found) <= {point - 1 for point in breakpoints(breakpoint_scores(path), 6)}
    assert best[0] - 1 in select(Places("rdp", 3), skeleton, [tokens], 0)
    alone = select(Places("rdp"), skeleton, [tokens], 0)
    assert select(Places("rdp"), skeleton, [tokens], 0, seams=(0, 5)) == tuple(sorted({0, 5, *alone}))
    assert select(Places("rdp", 1), skeleton, [tokens], 0, seams=(0, 5)) == found
    assert select(Places("all"), skeleton, [], 0) == (0, 1, 2, 3, 4, 5)
    assert select(Places("4,1,4"), skeleton, [], 0) == (1, 4)
    some = {select(Places("random"), skeleton, [], seed) for seed in range(20)}
    assert len(some) > 5
    assert all(len(set(each)) == 2 for each in some)


def test_the_original_answers_as_transformers_does(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    original = Original(llama, TOKENS, batch_size=4, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = torch.log_softmax(model(TOKENS[[4, 1]]).logits, -1)
    assert torch.allclose(original.answers([4, 1]), expected, atol=1e-5)


@pytest.mark.parametrize(("budget", "changes"), [
    ("4.6bits", ("quantizer=gptq",)), ("6.1bits", ("quantizer=nf4",)), ("8.6bits", ("quantizer=fp8",)),
    ("4.6bits", ("quantizer=twotier",)), ("4.6bits", ("quantizer=hqq",)), ("4.6bits", ("quantizer=codebook",)),
    ("8.6bits", ("quantize.inputs=int8",)),
])  # fmt: skip
def test_scales_of_every_format_begin_at_what_the_file_says(
    budget: str, changes: tuple[str, ...], llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """Tuned and not trained yet, the model is the reopened one, as it stands and as stored."""
    folder = quantized(llama, tmp_path / "q", budget, f"calibration.source={text_file}", *changes)
    expected = logits_of(folder, TOKENS)
    skeleton = Skeleton.open(folder, decode=PackedReader)
    reader = skeleton.reader
    assert isinstance(reader, PackedReader)
    scaled = sum(has_scales(reader.linear(stem)) for stem in reader.stems())
    load_whole(skeleton)
    tuning = NormTuning(skeleton, range(3))
    assert sum(name.endswith(".scale") for group in tuning.trained.values() for name in group) == scaled
    found = skeleton.model(TOKENS).logits
    assert torch.allclose(found, expected, atol=2e-3)
    with torch.no_grad(), tuning.as_stored():
        assert torch.equal(skeleton.model(TOKENS).logits, found)
    tensors = skeleton.files.tensors
    assert all(tuple(t.shape) == tensors[n].shape for n, t in tuning.tensors().items())


@pytest.mark.parametrize(
    ("removed", "seams"), [((), ()), ((4, 6), (3, 4, 5)), ((2, 3), (1, 2)), ((0,), (0,)), ((7,), (6,))]
)
def test_seams_are_beside_removed_blocks(removed: tuple[int, ...], seams: tuple[int, ...]) -> None:
    assert seams_of(removed, 8) == seams
