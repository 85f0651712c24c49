"""End to end with the real program: sizes, what is stored, resuming, and what a stranger's reader sees."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, llama_config, program, save_model
from safetensors import safe_open

from tests.forked import Forker

Run = Callable[..., subprocess.CompletedProcess[str]]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def recount(folder: Path) -> float:
    """Bits per weight of the packed linears, from the files alone."""
    bits = weights = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                tensor = shard.get_tensor(name)
                if name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_shape"):
                    bits += tensor.numel() * tensor.element_size() * 8
                if name.endswith("weight_shape"):
                    weights += int(tensor[0] * tensor[1])
    return bits / weights


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, forker: Forker, llama: Path, text_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("out")
    words = ("quantize", llama, "--budget", "3.3bits", "-o", "out", "--calibration", text_file, *SMALL)
    assert forker.run(words, folder).returncode == 0
    return folder / "out"


def test_budget_is_kept_and_nothing_is_left_over(output: Path) -> None:
    assert 3.3 * 0.97 < recount(output) <= 3.3
    assert sorted(p.name for p in output.parent.iterdir()) == ["out"]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {p.name for p in output.glob("*.safetensors")}
    assert oct((output / "config.json").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_side_files_are_copied_byte_for_byte(output: Path, llama: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (output / name).read_bytes() == (llama / name).read_bytes()
    config = json.loads((output / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == json.loads((llama / "config.json").read_text())
    targets = [t for group in section["config_groups"].values() for t in group["targets"]]
    assert len(targets) == len(set(targets)) == 21
    assert list(section["config_groups"]) == sorted(section["config_groups"])


def test_the_scores_of_the_plan_are_kept_and_shown(output: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from llmcompress.cli import cli
    from llmcompress.types import ScoreFile

    file = ScoreFile.parse((output / "scores.json").read_bytes(), "scores.json")
    plan = json.loads((output / "llmcompress.json").read_text())["plan"]
    assert [scores.scorer for scores in file.scores] == [plan["scorer"]]
    assert file.scores[0].model_digest == plan["model_digest"]
    assert {layer.linear for layer in file.scores[0].layers} >= {a["linear"] for a in plan["allocation"]["assigned"]}
    words = ["plan", str(output / "scores.json"), "--budget", "4bits", "--json"]
    again = json.loads(CliRunner().invoke(cli, words, catch_exceptions=False).stdout)["allocation"]
    assert 3.9 < again["bits_per_weight"] <= 4
    page = tmp_path / "page.html"
    CliRunner().invoke(cli, ["report", str(output), "-o", str(page)], catch_exceptions=False)
    for part in ("bits", "sensitivity", "frontier", "trials", "losses"):
        assert f'<section id="{part}"' in page.read_text()


def test_record_names_no_machine_and_hashes_everything(output: Path) -> None:
    text = (output / "llmcompress.json").read_text()
    assert str(output.parent) not in text
    assert os.uname().nodename not in text
    record = json.loads(text)
    assert {f["name"] for f in record["files"]} == {p.name for p in output.iterdir()} - {"llmcompress.json"}
    assert "base_model_relation" not in (output / "README.md").read_text()  # a local model has no hub name


def test_plain_transformers_opens_it_and_agrees_with_our_codes(output: Path) -> None:
    """Without our package: only torch, transformers and compressed-tensors."""
    script = (
        "import sys, torch, transformers\n"
        "assert 'llmcompress' not in sys.modules\n"
        "m, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32,"
        " output_loading_info=True)\n"
        "assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info\n"
        "x = torch.arange(40)[None] % 96\n"
        "torch.save(m(x).logits.detach(), sys.argv[2])\n"
        "assert m.generate(x, max_new_tokens=4, do_sample=False).shape == (1, 44)\n"
    )
    result = output.parent.parent / "logits.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(output), str(result)], check=True, timeout=240)
    from llmcompress.model.skeleton import Skeleton
    from llmcompress.model.stream import BlockStream
    from llmcompress.runtime.packed import PackedReader

    tokens = torch.arange(40)[None] % 96
    ours = next(iter(BlockStream(Skeleton.open(output, decode=PackedReader)).logits([tokens])))
    theirs = torch.load(result)
    assert float((ours - theirs).abs().max()) < 1e-4


def test_verify_passes_and_sees_every_kind_of_damage(output: Path, run: Run, tmp_path: Path) -> None:
    assert run("verify", output).returncode == 0
    for damage in ("flip", "budget", "missing"):
        copy = tmp_path / damage
        shutil.copytree(output, copy)
        if damage == "flip":
            path = copy / "model-00002-of-00004.safetensors"
            data = bytearray(path.read_bytes())
            data[-3] ^= 1
            path.write_bytes(data)
        elif damage == "missing":
            (copy / "generation_config.json").unlink()
        else:
            record = json.loads((copy / "llmcompress.json").read_text())
            record["plan"]["allocation"]["budget_bits"] = 5
            (copy / "llmcompress.json").write_text(json.dumps(record))
        found = run("verify", copy)
        assert found.returncode == 2, damage
        assert "error: verify:" in found.stderr


def test_eval_agrees_with_an_independent_script(
    output: Path, llama: Path, run: Run, text_file: Path, tmp_path: Path
) -> None:
    other = text_file.with_name("held-out.txt")
    other.write_text("it was the best of times, it was the worst of times. " * 80)
    flags = ("--data", other, "--samples", "8", "--sequence-length", "32", "--json")
    found = run("eval", output, "--ref", llama, "-o", "report", *flags)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"{report['summary']['kld']['mean']:.4f}" in page
    assert '<section id="losses"' in page
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(llama)(other.read_text()).input_ids
    rows = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    first = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    second = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    windows = {tuple(row.tolist()): row for row in rows}
    assert report["data"]["sequences"] == 8
    with torch.no_grad():
        p = {k: torch.log_softmax(first(row[None]).logits[0].double(), -1) for k, row in windows.items()}
        q = {k: torch.log_softmax(second(row[None]).logits[0].double(), -1) for k, row in windows.items()}
    klds = {float((p[k].exp() * (p[k] - q[k])).sum(-1).mean()) for k in windows}
    for value in report["per_sequence"]["kld"]:
        assert min(abs(value - other) for other in klds) < 1e-5


def test_eval_refuses_the_calibration_text(output: Path, llama: Path, run: Run, text_file: Path) -> None:
    found = run("eval", output, "--ref", llama, "--data", text_file, "--samples", "8", "--sequence-length", "32")
    assert found.returncode == 2
    assert "calibrated on" in found.stderr


def test_conv1d_models_are_written_and_plain_transformers_stops_rather_than_guess(run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64)
    folder = save_model(tmp_path / "gpt2", config)
    assert run("quantize", folder, "--budget", "3.5bits", "-o", "out", "--recipe", "fast").returncode == 0
    assert run("verify", "out").returncode == 0
    assert recount(tmp_path / "out") <= 3.5
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


def test_widths_that_fit_no_group_are_kept_and_said(run: Run, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "odd", llama_config(intermediate_size=172))
    found = run("quantize", folder, "--budget", "3.5bits", "-o", "out", "--recipe", "fast")
    assert found.returncode == 0
    assert "172 inputs are not divisible" in found.stderr
    assert recount(tmp_path / "out") <= 3.5
    assert run("verify", "out").returncode == 0


@pytest.mark.parametrize("budget", ["8bits/file", "130kB"])
def test_file_budgets_bound_the_shards(budget: str, llama: Path, run: Run, tmp_path: Path) -> None:
    dry = run("quantize", llama, "--budget", budget, "-o", "out", "--recipe", "fast", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert not (tmp_path / "out").exists()
    found = run("quantize", llama, "--budget", budget, "-o", "out", "--recipe", "fast", "--json")
    assert found.returncode == 0, found.stderr
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    answer = json.loads(found.stdout)
    assert size == answer["shard_bytes"]
    assert abs(json.loads(dry.stdout)["output_bytes"] - size) < 0.1 * size
    limit = 130_000 if budget == "130kB" else 8 * json.loads(dry.stdout)["parameters"] / 8
    assert limit * 0.97 < size <= limit


def test_a_calibration_text_is_looked_for_by_a_dry_run_and_not_passed_over_in_silence(run: Run, llama: Path) -> None:
    words = ("quantize", llama, "--budget", "4bits", "--calibration", "nothing.txt", "--dry-run")
    found = run(*words)
    assert found.returncode == 2
    assert "text nothing.txt: no such file" in found.stderr
    found = run(*words[:-1], "-o", "out", "--recipe", "fast")
    assert found.returncode == 0
    assert "calibration text nothing.txt is not read: neither zd nor rtn looks at text" in found.stderr


def start(folder: Path, *words: str | Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(program(*words), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("quantizer", ["gptq", "signround", "adaround"])
def test_two_runs_give_equal_bytes(quantizer: str, llama: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    flags = ("--set", f"quantizer={quantizer}", "--set", "quantize.iterations=20", *SMALL)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        words = ("quantize", llama, "--budget", "3.3bits", "-o", "out", "--calibration", text_file, *flags)
        found = run(*words, cwd=tmp_path / name)
        assert found.returncode == 0, found.stderr
    assert contents(tmp_path / "one" / "out") == contents(tmp_path / "two" / "out")


def test_kill_at_random_moments_then_rerun_is_bit_identical(
    output: Path, forker: Forker, llama: Path, text_file: Path, tmp_path: Path
) -> None:
    """OUT is absent or complete after every kill -9, and the rerun gives the very same bytes."""
    words = ("quantize", llama, "--budget", "3.3bits", "-o", "out", "--calibration", text_file, *SMALL)
    began = time.monotonic()
    subprocess.run(program(*words), cwd=tmp_path, check=True, capture_output=True, timeout=240)
    whole = time.monotonic() - began
    expected = contents(output)
    assert contents(tmp_path / "out") == expected
    source = random.Random(0)
    for _ in range(3):
        shutil.rmtree(tmp_path / "out")
        running = start(tmp_path, *words)
        time.sleep(source.uniform(0.45, 1.0) * whole)
        running.send_signal(signal.SIGKILL)
        running.wait()
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == expected
            if not (tmp_path / ".out.llmcompress" / "run.json").exists():
                continue  # it had finished
        finished = forker.run(words, tmp_path)
        assert finished.returncode == 0, finished.stderr
        assert contents(tmp_path / "out") == expected
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_run_killed_just_after_publishing_is_seen_to_be_finished(
    llama: Path, text_file: Path, tmp_path: Path, run: Run
) -> None:
    words = ("quantize", llama, "-o", "out", "--recipe", "fast", "--budget", "4bits")
    assert run(*words).returncode == 0
    expected = contents(tmp_path / "out")
    assert run(*words).returncode == 2  # an ordinary second run is refused
    state = tmp_path / ".out.llmcompress"
    state.mkdir()
    request = json.loads(expected["llmcompress.json"])["request"]
    (state / "run.json").write_text(json.dumps({"request": request, "environment": {}}))
    assert run(*words[:-1], "5bits").returncode == 2
    assert run(*words).returncode == 0
    assert contents(tmp_path / "out") == expected
    assert not state.exists()


def test_a_different_request_does_not_touch_unfinished_work(
    llama: Path, text_file: Path, tmp_path: Path, run: Run
) -> None:
    words = ("quantize", llama, "-o", "out", "--calibration", text_file, *SMALL)
    running = start(tmp_path, *words, "--budget", "3.3bits")
    state = tmp_path / ".out.llmcompress"
    deadline = time.monotonic() + 120
    while not list(state.glob("commit-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    before = contents(state)
    found = run(*words, "--budget", "3.4bits")
    assert found.returncode == 2
    assert "budget" in found.stderr
    assert contents(state) == before
    document = json.loads((state / "run.json").read_text())
    document["environment"]["torch"] = "1.0"
    (state / "run.json").write_text(json.dumps(document))
    resumed = run(*words, "--budget", "3.3bits", "-v")
    assert resumed.returncode == 0
    assert "another torch" in resumed.stderr
    assert "resuming" in resumed.stderr
    assert "q_proj  " in resumed.stderr
    assert run(*words, "--budget", "3.4bits", "--restart", "--force").returncode == 0


def test_terminate_keeps_work_and_says_so(llama: Path, text_file: Path, tmp_path: Path) -> None:
    words = ("quantize", llama, "-o", "out", "--calibration", text_file, "--budget", "3.3bits", *SMALL)
    running = subprocess.Popen(program(*words), cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    state = tmp_path / ".out.llmcompress"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    running.send_signal(signal.SIGTERM)
    _, talk = running.communicate(timeout=60)
    assert running.returncode == 143
    assert b"run the same command again" in talk
    assert not (tmp_path / "out").exists()


def test_a_second_run_on_one_output_is_turned_away(llama: Path, text_file: Path, tmp_path: Path, run: Run) -> None:
    from filelock import FileLock

    (tmp_path / ".out.llmcompress").mkdir()
    with FileLock(tmp_path / ".out.llmcompress" / "lock"):
        found = run("quantize", llama, "-o", "out", "--recipe", "fast", "--budget", "4bits")
    assert found.returncode == 6
    assert "another run" in found.stderr


def test_force_replaces_only_when_complete(
    output: Path, llama: Path, text_file: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    (tmp_path / "out" / "llmcompress.json").write_text("{}")
    words = ("quantize", llama, "-o", "out", "--recipe", "fast", "--budget", "4bits")
    assert run(*words).returncode == 2
    assert (tmp_path / "out" / "precious").exists()
    assert run(*words, "--force").returncode == 0
    assert not (tmp_path / "out" / "precious").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
