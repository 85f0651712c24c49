"""Rewrites with the real program: the same function from disk, which everything after them takes for its source."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, llama_config, program, save_model
from torch import Tensor

from llmcompress.compress.pipeline import rewrite_model
from llmcompress.compress.rewrite import RewriteJob, rewrite
from llmcompress.compress.rewriting.clipping import ActivationQuantizer
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.errors import InputError
from llmcompress.hub.source import resolve
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.options import RewriteOptions
from llmcompress.recipes import load_recipe

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXT = ("--set", "calibration.samples=4", "--set", "calibration.sequence_length=32")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    answer: Tensor = model.eval()(torch.arange(40)[None] % 96).logits
    return answer


def gpt2(folder: Path) -> Path:
    from transformers import GPT2Config

    return save_model(folder, GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64))


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("llama", ("--equalize", "--smooth", "--awq")),
        ("llama", ("--repquant",)),
        ("tied", ("--rotate", "--smooth")),
        ("gpt2", ("--rmsnorm",)),
        ("gpt2", ("--awq", "--repquant")),
    ],
)
def test_plain_transformers_opens_a_rewritten_model_and_computes_the_same(
    family: str, flags: tuple[str, ...], run: Run, text_file: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    if family == "gpt2":
        gpt2(source)
    else:
        save_model(source, llama_config(tie_word_embeddings=family == "tied"))
    before = contents(source)
    found = run("rewrite", source, *flags, "-o", "out", "--calibration", text_file, *TEXT, "--json")
    assert found.returncode == 0, found.stderr
    answer = json.loads(found.stdout)
    assert {"--" + x["method"] for x in answer["outcomes"]} == set(flags)
    assert all(x["difference"] < 1e-8 and x["sites"] for x in answer["outcomes"])
    assert contents(source) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]
    reference = logits(source)
    assert float((logits(tmp_path / "out") - reference).abs().max() / reference.abs().max()) < 1e-5
    after = contents(tmp_path / "out")
    assert after["tokenizer.json"] == before["tokenizer.json"]
    assert any(before.get(name) != data for name, data in after.items() if name.endswith(".safetensors"))
    if family == "tied":
        again = run("quantize", "out", "--budget", "4bits", "--recipe", "fast", "-o", "small")
        assert again.returncode == 0, again.stderr


def test_what_cannot_be_stored_or_is_unknown_is_refused(llama: Path, run: Run, text_file: Path, tmp_path: Path) -> None:
    cases = [
        (("rewrite.methods=[repquant]", "rewrite.repquant.bias=true"), "bias"),
        (("rewrite.methods=[rmsnorm]",), "RMSNorm"),
        (("rewrite.methods=[awq, smooth]", "rewrite.awq.clip=true"), "name awq last"),
        (("rewrite.methods=[smoth]",), "did you mean smooth"),
    ]
    for changes, word in cases:
        recipe = load_recipe("balanced", (f"calibration.source={text_file}", *TEXT[1::2], *changes))
        with pytest.raises(InputError) as refusal:
            rewrite_model(resolve(str(llama)), recipe, tmp_path / "out", device="cpu")
        assert word in f"{refusal.value.what} {refusal.value.hint}"
        assert not list(tmp_path.iterdir())
    found = run("rewrite", llama, "-o", "out")
    assert found.returncode == 2
    assert "--smooth" in found.stderr
    assert not list(tmp_path.iterdir())


REWRITING = (
    "--set",
    "rewrite.methods=[smooth, awq]",
    "--set",
    "rewrite.awq.clip=true",
    "--set",
    "rewrite.awq.ratios=4",
)


def test_quantize_rewrites_first_survives_a_kill_and_says_what_it_did(
    llama: Path, run: Run, text_file: Path, tmp_path: Path
) -> None:
    words = ("quantize", llama, "--budget", "3.3bits", "-o", "out", "--calibration", text_file, *SMALL, *REWRITING)
    found = run(*words)
    assert found.returncode == 0, found.stderr
    assert "awq: " in found.stderr
    expected = contents(tmp_path / "out")
    record = json.loads(expected["llmcompress.json"])
    assert {x["method"] for x in record["rewriting"]["outcomes"]} == {"smooth", "awq"}
    assert "rewritten" in expected["README.md"].decode()
    assert "hints.safetensors" not in expected
    assert record["origin"]["model_digest"] == record["request"]["model"] != record["plan"]["model_digest"]
    (tmp_path / "out").rename(tmp_path / "first")
    running = subprocess.Popen(program(*words), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state, deadline = tmp_path / ".out.llmcompress", time.monotonic() + 120
    while not list(state.glob("commit-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert (state / "rewritten").is_dir()
    again = run(*words)
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "out") == expected
    assert not state.exists()


def test_plan_and_score_see_the_rewritten_model(llama: Path, run: Run, text_file: Path, tmp_path: Path) -> None:
    flags = ("--calibration", text_file, *SMALL, *REWRITING)
    scored = run("score", llama, "-o", "scores.json", *flags)
    assert scored.returncode == 0, scored.stderr
    planned = run("plan", llama, "--budget", "3.3bits", "--scores", "scores.json", "--json", *flags)
    assert planned.returncode == 0, planned.stderr
    made = run("quantize", llama, "--budget", "3.3bits", "--scores", "scores.json", "-o", "out", *flags)
    assert made.returncode == 0, made.stderr
    record = json.loads((tmp_path / "out" / "llmcompress.json").read_text())
    assert json.loads(planned.stdout)["allocation"]["assigned"] == record["plan"]["allocation"]["assigned"]
    without = run("plan", llama, "--budget", "3.3bits", "--scores", "scores.json", *flags[:-6])
    assert without.returncode == 2
    assert "another model" in without.stderr


def test_hints_come_back_and_limits_hold(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight, limits = torch.randn(6, 8), torch.rand(6, 2) + 0.2
    shared = torch.tensor(0.25)
    quantizers = {name: ActivationQuantizer(shared, torch.tensor(128.0), 8) for name in ("a", "b")}
    Hints(quantizers, {"a": limits}).write(tmp_path)
    found = Hints.read(tmp_path)
    assert found.quantizers == quantizers
    clamped = found.clamped("a", weight)
    for row in range(6):
        for column in range(8):
            bound = float(limits[row, column // 4])
            assert float(clamped[row, column]) == max(-bound, min(bound, float(weight[row, column])))
    assert found.clamped("b", weight) is weight


def test_hidden_states_carry_no_gradients_from_block_to_block(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise every block that was left behind stays in memory."""
    genuine, seen = BlockStream.run_block, []

    def watched(self: BlockStream, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        found = genuine(self, index, hidden, call)
        seen.append(found.requires_grad)
        return found

    monkeypatch.setattr(BlockStream, "run_block", watched)
    changes = (f"calibration.source={text_file}", *TEXT[1::2], "rewrite.methods=[equalize]")
    rewrite_model(resolve(str(llama)), load_recipe("balanced", changes), tmp_path / "out", device="cpu")
    assert seen
    assert not any(seen)


@torch.no_grad()
def test_static_ranges_hold_tokens_that_the_text_lacks(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = save_model(tmp_path / "model", llama_config())
    text, probe = torch.arange(40)[None] % 20, torch.arange(8)[None]
    errors = {}
    for unseen in (True, False):
        options = RewriteOptions.model_validate({"methods": ("repquant",), "repquant": {"unseen": unseen}})
        list(rewrite(RewriteJob(model, options, [text], probe), tmp_path / f"out-{unseen}"))
        quantizer = Hints.read(tmp_path / f"out-{unseen}").quantizers["model.layers.0.self_attn.q_proj"]
        read: list[Tensor] = []
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{unseen}", dtype=torch.float32)
        loaded.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda _, args, read=read: read.append(args[0])
        )
        loaded(torch.arange(20, 96)[None])
        errors[unseen] = float((quantizer(read[0]) - read[0]).abs().max() / quantizer.scale)
    assert errors[False] > 5
    assert errors[True] < 1
