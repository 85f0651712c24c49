"""Healing: what is trained, that it goes on to the bit, and that what comes out is never worse than what went in."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, program, save_model
from heal_help import SCHEDULE, TOKENS, contents, logits_of, noisy, quantized
from torch import Tensor

from llmcompress.compress.heal.lora import LoraOptions
from llmcompress.compress.heal.places import Places
from llmcompress.compress.heal.request import HealRequest
from llmcompress.compress.heal.run import Healed, Started, heal
from llmcompress.compress.heal.state import Position
from llmcompress.compress.heal.training import Schedule
from llmcompress.compress.prune.run import Pruned, PruneRequest, prune
from llmcompress.compress.verify import require, verify
from llmcompress.errors import InputError
from llmcompress.eval.loading import opened as opened_whole
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.hub.source import resolve
from llmcompress.model.checkpoint import read_raw
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import TextRequest
from llmcompress.recipes import load_recipe
from llmcompress.runtime.packed import PackedReader

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def damaged(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noisy(llama, tmp_path_factory.mktemp("damaged") / "damaged")


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


@torch.no_grad()
def kld(p_model: Any, q_model: Any, tokens: Tensor) -> float:
    p, q = (torch.log_softmax(model(tokens).logits.double(), -1) for model in (p_model, q_model))
    return float((p.exp() * (p - q)).sum(-1).mean())


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
    text = TextRequest("builtin", 4, 16, 0, "evaluation")
    sources = resolve(str(packed)), resolve(str(out))
    apart = [run_eval(EvalRequest(source, request.against, text, 4, "cpu", "")) for source in sources]
    assert apart[1].summary.kld.mean != apart[0].summary.kld.mean
    assert apart[1].footprint.shard_bytes == apart[0].footprint.shard_bytes + record.adapter_bytes
    with pytest.raises(InputError, match="has an adapter, which"):
        opened_whole(out, "cpu")
    with pytest.raises(InputError, match="adapter already"):
        list(heal(replace(request, source=resolve(str(out)), output=tmp_path / "again")))


def test_linears_kept_the_other_way_round_are_healed_too(request_: HealRequest, tmp_path: Path) -> None:
    """GPT-2's `Conv1D`, plain with merged adapters, packed with adapters beside it, and with other scales.

    No group size divides 100: one linear of each block stays plain among packed ones.
    """
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=96, n_embd=64, n_inner=100, n_layer=2, n_head=4, n_positions=64)
    source = resolve(str(save_model(tmp_path / "gpt2", config)))
    small = quantized(source.path, tmp_path / "q", "3.6bits", "quantizer=rtn", "scorer=zd")
    other = noisy(source.path, tmp_path / "noisy", within="h.")
    for place, method in ((other, "lora"), (small, "lora"), (small, "norms")):
        output = tmp_path / f"{place.name}-{method}"
        request = replace(request_, source=resolve(str(place)), against=source, output=output, method=method)
        record = finished(request).record
        assert record.helped
        assert record.kld.mean < record.kld_before.mean
        assert ((output / "adapter").is_dir()) == (place == small and method == "lora")


@pytest.mark.parametrize("method", ["lora", "norms"])
def test_skipped_halves_stay_zeros(request_: HealRequest, damaged: Path, tmp_path: Path, method: str) -> None:
    half = shutil.copytree(damaged, tmp_path / "half")
    document = json.loads((half / "config.json").read_text())
    skip = {"halves": ["1.mlp"], "zero": {"model.layers.1.mlp": 0}, "idle": ["model.layers.1.post_attention_layernorm"]}
    (half / "config.json").write_text(json.dumps(document | {"llmcompress_skip": skip}))
    inside = ("model.layers.1.mlp.", "model.layers.1.post_attention_layernorm.")
    record = finished(replace(request_, source=resolve(str(half)), method=method)).record
    assert record.helped
    before, after = (Skeleton.open(folder).files.tensors for folder in (half, request_.output))
    changed = {name for name in before if read_raw(before[name]) != read_raw(after[name])}
    assert changed
    assert not [name for name in changed if name.startswith(inside)]


def test_a_limit_of_time_stops_after_the_look_that_passes_it(request_: HealRequest) -> None:
    record = finished(replace(request_, schedule=replace(SCHEDULE, minutes=1e-9))).record
    assert record.steps == SCHEDULE.every
    assert "minutes" not in record.settings


@pytest.mark.parametrize(("method", "rate"), [("lora", 0.5), ("norms", 0.5), ("lora", 1e20)])
def test_what_does_not_help_leaves_every_weight_as_it_was(request_: HealRequest, method: str, rate: float) -> None:
    """Against itself nothing can be gained, and at an absurd rate something is lost, or no number is left."""
    schedule = replace(SCHEDULE, steps=4, every=2, rate=rate)
    record = finished(replace(request_, against=request_.source, method=method, schedule=schedule)).record
    assert not record.helped
    assert record.steps == (2 if rate > 1 else 4)
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


def test_by_default_the_blocks_beside_removed_ones_are_trained(
    request_: HealRequest, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    small = ("calibration.samples=4", "calibration.score_samples=2", "calibration.sequence_length=16")
    recipe = load_recipe("balanced", (f"calibration.source={text_file}", *small))
    asked = PruneRequest(resolve(str(llama)), tmp_path / "two", recipe, "cpu", "", by="kl", count=1, exclude=(0,))
    ((gone,),) = [event.record.removed for event in prune(asked) if isinstance(event, Pruned)]
    beside = {gone - 1, gone} - {2}
    for places, blocks in ((Places(), beside), (Places(count=1), set())):
        events = heal(replace(request_, source=resolve(str(tmp_path / "two")), places=places))
        found = next(event for event in events if isinstance(event, Started)).blocks
        events.close()  # type: ignore[attr-defined]
        assert blocks <= {*found}
        assert blocks or len(found) == 1
        shutil.rmtree(tmp_path / ".out.llmcompress")
