"""Healing: what is trained, that it goes on to the bit, and that what comes out is never worse than what went in."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from conftest import llama_config, program, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.heal.lora import LoraOptions
from llmcompress.compress.heal.places import Places, active, select
from llmcompress.compress.heal.request import HealRequest
from llmcompress.compress.heal.run import Healed, Started, heal, load_whole
from llmcompress.compress.heal.state import Measured, Position, Saves
from llmcompress.compress.heal.training import Original, Schedule
from llmcompress.compress.heal.tuning import NormTuning, has_scales
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.compress.scorers.rdp import breakpoint_scores, breakpoints
from llmcompress.compress.verify import require, verify
from llmcompress.errors import InputError
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.model.hub import resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import TextRequest
from llmcompress.recipes import load_recipe
from llmcompress.runtime.adapter import reader_of
from llmcompress.runtime.packed import PackedReader

Run = Callable[..., subprocess.CompletedProcess[str]]
SCHEDULE = Schedule(steps=12, batch_size=4, rate=5e-3, every=4, period=3)


def noisy(source: Path, folder: Path) -> Path:
    """A copy of a model with noise on its matrices: something that can be healed."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.3)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


@pytest.fixture(scope="module")
def damaged(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noisy(llama, tmp_path_factory.mktemp("damaged") / "damaged")


def quantized(source: Path, folder: Path, budget: str, *changes: str) -> Path:
    small = ("calibration.samples=4", "calibration.sequence_length=16", "calibration.score_samples=4")
    recipe = load_recipe("balanced", (*small, "plan.group_size=32", "plan.trials=false", *changes))
    for _ in quantize(QuantizeRequest(resolve(str(source)), folder, recipe, parse_budget(budget), "cpu", "quantize")):
        pass
    return folder


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in 3 bits and a few more."""
    return quantized(llama, tmp_path_factory.mktemp("packed") / "q", "3.6bits", "quantizer=rtn", "scorer=zd")


@pytest.fixture
def request_(llama: Path, damaged: Path, text_file: Path, tmp_path: Path) -> HealRequest:
    text = TextRequest(str(text_file), 48, 16, 0, "calibration")
    return HealRequest(
        source=resolve(str(damaged)), against=resolve(str(llama)), output=tmp_path / "out", text=text, device="cpu",
        command="heal", places=Places("all"), lora=LoraOptions(8, 16.0), schedule=SCHEDULE, held_out=8,
    )  # fmt: skip


def finished(request: HealRequest) -> Healed:
    last = list(heal(request))[-1]
    assert isinstance(last, Healed)
    return last


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def logits_of(folder: Path, tokens: Tensor) -> Tensor:
    """As `eval` and `verify` read it."""
    return next(iter(BlockStream(Skeleton.open(folder, decode=reader_of(folder))).logits([tokens])))


@torch.no_grad()
def kld(p_model: Any, q_model: Any, tokens: Tensor) -> float:
    p, q = (torch.log_softmax(model(tokens).logits.double(), -1) for model in (p_model, q_model))
    return float((p.exp() * (p - q)).sum(-1).mean())


TOKENS = torch.randint(3, 40, (6, 16), generator=torch.Generator().manual_seed(3))


def test_a_plain_checkpoint_is_healed_and_opens_in_transformers(request_: HealRequest, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    record = finished(request_).record
    out = request_.output
    assert record.helped
    assert record.kld.mean < 0.8 * record.kld_before.mean
    assert record.change.high < 0
    models = []
    for folder in (llama, request_.source.path, out):
        model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        models.append(model.eval())
    assert kld(models[0], models[2], TOKENS) < kld(models[0], models[1], TOKENS)
    assert torch.allclose(models[2](TOKENS).logits, logits_of(out, TOKENS), atol=1e-4)
    require(verify(out))
    assert not (out / "adapter").exists()
    document = json.loads((out / "llmcompress.json").read_text())["healing"][0]
    assert document["healed_digest"] != document["against_digest"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["out"]
    text = TextRequest(request_.text.spec, 4, 16, 0, "evaluation")
    with pytest.raises(InputError, match="calibrated on"):
        run_eval(EvalRequest(resolve(str(out)), request_.against, text, 4, "cpu", ""))


def test_what_was_quantized_keeps_its_codes_and_gets_other_scales_and_norms(
    request_: HealRequest, packed: Path, llama: Path
) -> None:
    from transformers import AutoModelForCausalLM

    request = replace(request_, source=resolve(str(packed)))
    record = finished(request).record
    assert record.method == "norms"
    assert record.helped
    assert record.kld.mean < record.kld_before.mean
    before, after = (Skeleton.open(x, decode=PackedReader).files.tensors for x in (packed, request.output))
    from llmcompress.model.checkpoint import read_raw

    changed = {name for name in before if read_raw(before[name]) != read_raw(after[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"weight_scale", "weight"}
    assert all("norm" in name for name in changed if name.endswith(".weight"))
    assert sum(len(read_raw(entry)) for entry in before.values()) == sum(len(read_raw(e)) for e in after.values())
    require(verify(request.output))
    plain = AutoModelForCausalLM.from_pretrained(request.output, dtype=torch.float32).eval()
    assert torch.allclose(plain(TOKENS).logits, logits_of(request.output, TOKENS), atol=1e-3)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_beside_codes_open_with_peft_and_count_in_eval(
    request_: HealRequest, packed: Path, tmp_path: Path
) -> None:
    import peft

    import llmcompress

    request = replace(request_, source=resolve(str(packed)), method="lora", places=Places("0,2"))
    record = finished(request).record
    out = request.output
    assert record.helped
    assert record.adapter_bytes == (out / "adapter" / "adapter_model.safetensors").stat().st_size
    kept = contents(packed)
    for name, data in contents(out).items():
        if name.startswith("model-") or name == "config.json":
            assert data == kept[name]
    base = llmcompress.load(out, dense=True, dtype=torch.float32)
    alone = base(TOKENS).logits.detach()
    opened = peft.PeftModel.from_pretrained(base, out / "adapter").eval()
    together = opened(TOKENS).logits
    assert torch.allclose(together, logits_of(out, TOKENS), atol=1e-3)
    assert not torch.allclose(together, alone, atol=1e-2)
    require(verify(out))
    with pytest.raises(InputError, match="adapter already"):
        list(heal(replace(request, source=resolve(str(out)), output=tmp_path / "again")))


@pytest.mark.parametrize("method", ["lora", "norms"])
def test_what_does_not_help_leaves_every_weight_as_it_was(request_: HealRequest, method: str) -> None:
    """Against itself nothing can be gained, and at an absurd rate something is lost."""
    schedule = replace(SCHEDULE, steps=4, every=2, rate=0.5)
    record = finished(replace(request_, against=request_.source, method=method, schedule=schedule)).record
    assert not record.helped
    assert record.kld == record.kld_before
    before, after = contents(request_.source.path), contents(request_.output)
    assert all(after[name] == data for name, data in before.items() if not name.endswith((".md", ".jinja")))
    assert "nothing helped" in (request_.output / "README.md").read_text()


@pytest.mark.parametrize(("method", "lisa"), [("lora", None), ("lora", 1), ("norms", 2)])
def test_stopped_at_any_save_and_gone_on_with_is_the_same_to_the_bit(
    request_: HealRequest, method: str, lisa: int | None
) -> None:
    request = replace(request_, method=method, schedule=replace(SCHEDULE, lisa=lisa))
    whole = replace(request, output=request.output.with_name("whole"))
    finished(whole)
    resumed = []
    for _ in range(10):
        run, looks, last = heal(request), 0, None
        for last in run:
            resumed += [last.resumed_at] if isinstance(last, Started) else []
            looks += isinstance(last, Position)
            if looks == 2:  # one that is loaded or made, and one more
                break
        run.close()
        if isinstance(last, Healed):
            break
        with pytest.raises(InputError, match="started differently: settings"):
            list(heal(replace(request, held_out=9)))
    assert resumed == [None, 4, 8, 12]
    assert contents(request.output) == contents(whole.output)


def test_killed_and_run_again_is_the_same_to_the_bit(
    request_: HealRequest, llama: Path, damaged: Path, run: Run, tmp_path: Path
) -> None:
    words = ("heal", damaged, "--against", llama, "--calibration", request_.text.spec, "--samples", "48",
             "--sequence-length", "16", "--held-out", "8", "--batch-size", "4", "--at", "all", "--rank", "8",
             "--lr", "0.005", "--every", "4", "-o", "out")  # fmt: skip
    state = tmp_path / ".out.llmcompress"
    victim = subprocess.Popen(program(*words, "--steps", "60"), cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (state / "heal-00003.json").exists():
        assert victim.poll() is None
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "out").exists()
    # what the killed run would have come to, from the library
    text = replace(request_.text, seed=0)
    schedule = Schedule(steps=60, batch_size=4, rate=5e-3, every=4)
    request = replace(request_, output=tmp_path / "whole", text=text, schedule=schedule)
    expected = finished(request).record
    done = run(*words, "--steps", "60", "--json")
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    found = json.loads(done.stdout)
    assert (found["steps"], found["best_step"], found["kld"]["mean"]) == (
        expected.steps, expected.best_step, expected.kld.mean,
    )  # fmt: skip
    ours, theirs = contents(tmp_path / "out"), contents(tmp_path / "whole")
    same = [name for name in ours if name.endswith(".safetensors")]
    assert same
    assert all(ours[name] == theirs[name] for name in same)


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


def test_what_cannot_be_healed(request_: HealRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = save_model(tmp_path / "other", llama_config(vocab_size=64))
    asked: list[tuple[dict[str, Any], str]] = [
        ({"places": Places("rpd")}, "rdp, all, random"),
        ({"places": Places("0,3")}, "numbered 0 to 2"),
        ({"places": Places("all", 2)}, "leave --blocks out"),
        ({"places": Places("random", 4)}, "1 to 3"),
        ({"held_out": 23}, "at least 50"),
        ({"schedule": replace(SCHEDULE, lisa=4)}, "3 blocks"),
        ({"against": resolve(str(other))}, "different tokenizers"),
        ({"output": request_.against.path, "force": True}, "equals the input"),
    ]
    for changes, words in asked:
        with pytest.raises(InputError) as refusal:
            list(heal(replace(request_, **changes)))
        assert words in refusal.value.what + " " + refusal.value.hint
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError) as refusal:
        list(heal(request_))
    assert "llmcompress[heal]" in refusal.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
