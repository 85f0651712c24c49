"""A quantized output head, end to end: what is stored, what strangers read, budgets, resuming, tied models."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL, llama_config, program, save_model
from safetensors import safe_open

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.allocate.spend import spend
from llmcompress.compress.pipeline import Opened, open_model
from llmcompress.compress.quantizers import rtn
from llmcompress.compress.rounding import Request
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.model.checkpoint import CheckpointReader
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.trace import trace
from llmcompress.preflight import check_source
from llmcompress.recipes import load_recipe
from llmcompress.runtime.packed import PackedReader
from llmcompress.types import Candidate, LayerScore, LinearSpec, QuantizerOptions, Scores

Run = Callable[..., subprocess.CompletedProcess[str]]

BUDGETS = {
    "file": ("--budget", "5.8bits/file"),
    "pin": ("--budget", "3.9bits", "--set", "plan.pin.lm_head=8"),
}
STRANGER = """
import sys, torch, transformers
assert "llmcompress" not in sys.modules
m, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
x = torch.arange(40)[None] % 96
torch.save(m(x).logits.detach(), sys.argv[2])
assert m.generate(x, max_new_tokens=4, do_sample=False).shape == (1, 44)
"""
KILLER = """
import os, signal, sys
from llmcompress.compress import apply, journal
moment, sys.argv = sys.argv[1], ["llmcompress", *sys.argv[2:]]
def die(*words, **more):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "calibrating":
    apply.head_input = die
elif moment == "written":
    genuine = apply.quantize_head
    apply.quantize_head = lambda *words: die(genuine(*words))
else:
    commit = journal.Journal.commit
    journal.Journal.commit = lambda self, record: (commit(self, record), record.step == 4 and die())
from llmcompress.cli import main
main()
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def recount(folder: Path) -> tuple[int, int, int]:
    """Bits and weights of the packed linears, and bytes of the shards, from the files alone."""
    bits = weights = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                tensor = shard.get_tensor(name)
                if name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_shape"):
                    bits += tensor.numel() * tensor.element_size() * 8
                if name.endswith("weight_shape"):
                    weights += int(tensor[0] * tensor[1])
    return bits, weights, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, llama: Path, text_file: Path) -> dict[str, Path]:
    """Uninterrupted runs, one for each way to have the head quantized; do not write into them."""
    found = {}
    for name, flags in BUDGETS.items():
        folder = tmp_path_factory.mktemp(name)
        words = program("quantize", llama, "-o", "out", "--calibration", text_file, *SMALL, *flags)
        subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=240)
        found[name] = folder / "out"
    return found


@pytest.fixture(params=list(BUDGETS))
def output(request: pytest.FixtureRequest, outputs: dict[str, Path]) -> Path:
    """One of them."""
    return outputs[request.param]


def test_the_head_has_a_shard_and_a_group_of_its_own(output: Path, llama: Path) -> None:
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    groups = [group["targets"] for group in config["config_groups"].values()]
    assert ["lm_head"] in groups
    assert len([t for targets in groups for t in targets]) == len({t for targets in groups for t in targets}) == 22
    assert config["ignore"] == []
    index = json.loads((output / "model.safetensors.index.json").read_text())["weight_map"]
    last = {name for name, shard in index.items() if shard == "model-00005-of-00005.safetensors"}
    assert last == {f"lm_head.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
    assert not [name for name in index if name == "lm_head.weight"]
    rest = {name for name, shard in index.items() if shard == "model-00001-of-00005.safetensors"}
    assert rest == {"model.embed_tokens.weight", "model.norm.weight"}


def test_every_figure_is_what_the_files_say(output: Path, llama: Path, run: Run, text_file: Path) -> None:
    bits, weights, size = recount(output)
    record = json.loads((output / "llmcompress.json").read_text())
    allocation, trace_ = record["plan"]["allocation"], trace(Skeleton.open(llama))
    assert weights == sum(x.weights for x in trace_.every) == sum(x.weights for x in trace_.linears) + 96 * 64
    assert (allocation["storage_bits"], allocation["file_bytes"]) == (bits, size)
    assert allocation["bits_per_weight"] == pytest.approx(bits / weights)
    assert allocation["file_bits_per_weight"] == pytest.approx(size * 8 / trace_.parameters)
    limit = parse_budget(allocation["budget"])
    assert (bits / weights if limit.kind == "linears" else size * 8 / trace_.parameters) <= limit.amount
    assert [x["linear"] for x in record["blocks"][3]["linears"]] == ["lm_head"]
    assert "The output head is quantized as well" in (output / "README.md").read_text()
    other = text_file.with_name("other.txt")
    other.write_text("it was the best of times, it was the worst of times. " * 80)
    flags = ("--data", other, "--samples", "4", "--sequence-length", "32", "--json")
    found = run("eval", output, "--ref", llama, "-o", "report", *flags)
    assert found.returncode == 0, found.stderr
    footprint = json.loads(found.stdout)["footprint"]
    assert footprint["quantized_weights"] == weights
    assert footprint["bits_per_weight"] == pytest.approx(bits / weights)
    assert footprint["file_bits_per_weight"] == pytest.approx(size * 8 / trace_.parameters)
    assert footprint["parameters"] == trace_.parameters
    assert run("verify", output).returncode == 0


def test_plain_transformers_opens_it_and_agrees_with_our_codes(output: Path, tmp_path: Path) -> None:
    """Without our package: only torch, transformers and compressed-tensors."""
    result = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-W", "ignore", "-c", STRANGER, str(output), str(result)], check=True, timeout=240)
    tokens = torch.arange(40)[None] % 96
    ours = next(iter(BlockStream(Skeleton.open(output, decode=PackedReader)).logits([tokens])))
    assert float((ours - torch.load(result)).abs().max()) < 1e-3
    assert float(ours.std()) > 0.1


def head_inputs(skeleton: Skeleton) -> torch.Tensor:
    """What the head of a model reads on a text of its own, `(tokens, hidden)`."""
    read: list[torch.Tensor] = []
    skeleton.model.get_submodule("lm_head").register_forward_pre_hook(lambda _, args: read.append(args[0]))
    tokens = torch.randint(3, 40, (16, 32), generator=torch.Generator().manual_seed(1))
    next(iter(BlockStream(skeleton).logits([tokens])))
    return read[0].flatten(0, 1)


def test_the_head_is_rounded_on_what_it_really_reads(output: Path, llama: Path) -> None:
    """On what it reads in the quantized model, the head gives the original logits better than rounding it would."""
    files = check_source(output, packed=True)
    packed = PackedReader(CheckpointReader(files.tensors), files.config)
    stored = packed.linear("lm_head")
    weight = Skeleton.open(llama).reader.read("lm_head.weight").float()
    inputs = head_inputs(Skeleton.open(output, decode=PackedReader))
    wanted = head_inputs(Skeleton.open(llama)) @ weight.T
    spec = LinearSpec(bits=stored.spec.bits, group_size=64)
    request = Request(weight, spec)
    (found,) = rtn.quantize([request], None, options=QuantizerOptions(), dtype=torch.bfloat16)
    nearest = found.codes.dequantize()

    def harm(candidate: torch.Tensor) -> float:
        return float((inputs @ candidate.T - wanted).square().mean())

    assert 0 < harm(stored.dequantize()) < harm(nearest)


def kill(moment: str, words: tuple[str | Path, ...], folder: Path) -> None:
    """Run until a moment of the head step, then `kill -9`."""
    script = [sys.executable, "-c", KILLER, moment, *map(str, words)]
    killed = subprocess.run(script, cwd=folder, capture_output=True, timeout=240, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize("moment", ["calibrating", "written", "committed", "shard damaged", "logits damaged"])
def test_a_run_killed_in_the_head_step_goes_on_to_the_same_bytes(
    moment: str, outputs: dict[str, Path], llama: Path, text_file: Path, tmp_path: Path, run: Run
) -> None:
    words = ("quantize", llama, "-o", "out", "--calibration", text_file, *SMALL, *BUDGETS["pin"])
    kill(moment, words, tmp_path)
    state, shard = tmp_path / ".out.llmcompress", tmp_path / "out.partial" / "model-00005-of-00005.safetensors"
    assert (state / "commit-00003.json").exists()
    assert (state / "commit-00004.json").exists() == (moment not in ("calibrating", "written"))
    assert shard.exists() == (moment != "calibrating")
    if moment == "written":  # without its record it is garbage, whatever it holds
        shard.write_bytes(shard.read_bytes()[:-1])
    if moment.endswith("damaged"):
        path = shard if moment.startswith("shard") else state / "hidden-00004.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    finished = run(*words)
    assert finished.returncode == 0, finished.stderr
    assert "resuming" in finished.stderr
    assert contents(tmp_path / "out") == contents(outputs["pin"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_budget_over_the_linears_leaves_the_head_where_it_was(llama: Path, run: Run, tmp_path: Path) -> None:
    assert run("quantize", llama, "--budget", "4bits", "-o", "out", "--recipe", "fast").returncode == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    with safe_open(tmp_path / "out" / "model-00001-of-00004.safetensors", "pt") as rest:
        kept = rest.get_tensor("lm_head.weight")
    assert torch.equal(kept, Skeleton.open(llama).reader.read("lm_head.weight"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    assert "head" not in (tmp_path / "out" / "README.md").read_text()


def test_a_tied_head_is_left_alone_and_nothing_is_said(run: Run, tmp_path: Path, text_file: Path) -> None:
    folder = save_model(tmp_path / "tied", llama_config(tie_word_embeddings=True))
    assert trace(Skeleton.open(folder)).head is None
    words = ("quantize", folder, "-o", "out", "--recipe", "fast")
    found = run(*words, "--budget", "6bits/file")
    assert found.returncode == 0, found.stderr
    assert "head" not in found.stdout + found.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"]
    result = tmp_path / "logits.pt"
    words_ = [sys.executable, "-W", "ignore", "-c", STRANGER, str(tmp_path / "out"), str(result)]
    subprocess.run(words_, check=True, timeout=240)
    tokens = torch.arange(40)[None] % 96
    ours = next(iter(BlockStream(Skeleton.open(tmp_path / "out", decode=PackedReader)).logits([tokens])))
    assert float((ours - torch.load(result)).abs().max()) < 1e-3
    refused = run(*words[:1], folder, "-o", "other", "--budget", "4bits", "--set", "plan.pin.lm_head=8")
    assert refused.returncode == 2
    assert "no linear of this model has that name" in refused.stderr
    assert "no weight of its own" in refused.stderr


def test_a_pinned_linear_gets_its_width_and_nothing_else_does(run: Run, llama: Path, tmp_path: Path) -> None:
    pins = ("--set", "plan.pin.down_proj=8", "--set", "plan.candidates.*.q_proj=[3, 4]")
    found = run("quantize", llama, "-o", "out", "--recipe", "fast", "--budget", "4.6bits", *pins)
    assert found.returncode == 0, found.stderr
    record = json.loads((tmp_path / "out" / "llmcompress.json").read_text())
    bits = {a["linear"]: a["spec"]["bits"] for a in record["plan"]["allocation"]["assigned"]}
    assert {b for name, b in bits.items() if name.endswith("down_proj")} == {8}
    assert {b for name, b in bits.items() if name.endswith(("q_proj", "k_proj", "v_proj"))} <= {3, 4}
    assert "lm_head" not in bits


def test_families_that_return_tuples_or_scale_their_logits_keep_their_quantized_head(run: Run, tmp_path: Path) -> None:
    from transformers import BloomConfig, CohereConfig

    sizes = {"vocab_size": 96, "hidden_size": 64, "tie_word_embeddings": False}
    bloom = BloomConfig(n_layer=2, n_head=4, **sizes)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    cohere = CohereConfig(
        intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **sizes, **ends
    )
    for name, config in (("bloom", bloom), ("cohere", cohere)):
        folder = save_model(tmp_path / name, config)
        for pins in ((), ("--set", "plan.pin.lm_head=8")):
            found = run("quantize", folder, "-o", f"{name}{len(pins)}", "--budget", "5bits", "--recipe", "fast", *pins)
            assert found.returncode == 0, found.stderr  # verify reopens it and compares logits
            assert "logits" in found.stdout


@pytest.fixture(scope="module")
def opened(llama: Path) -> Opened:
    return open_model(Source(llama, "llama"), load_recipe("balanced"), "cpu", whole_file=True)


def scores_of(opened: Opened, seed: int, *, head: bool) -> Scores:
    source = torch.Generator().manual_seed(seed)
    layers = []
    for name, specs in opened.candidates.items():
        weight = float(torch.rand((), generator=source)) + 1e-3
        found = tuple(Candidate(spec=s, damage=weight * 4.0**-s.bits) for s in specs)
        if head or name != "lm_head":
            layers.append(LayerScore(linear=name, candidates=found))
    return Scores(
        scorer="toy", unit="nats/token", model_digest="m", calibration_digest="c", seed=0, layers=tuple(layers)
    )


@pytest.mark.parametrize("head", [True, False])
def test_byte_budgets_are_never_passed_and_nearly_spent(opened: Opened, head: bool) -> None:
    """Sizes of the real shards, over the whole range of budgets."""
    shards = opened.shards
    smallest = shards.file_bytes({name: specs[0] for name, specs in opened.candidates.items()})
    largest = shards.file_bytes({name: specs[-1] for name, specs in opened.candidates.items()})
    more = {"group_size": 128, "file_bytes": shards.file_bytes, "candidates": opened.candidates}
    for place in range(12):
        scores = scores_of(opened, place, head=head)
        size = smallest + (largest - smallest) * place // 11
        for text in (f"{size}B", f"{size * 8 / opened.trace.parameters + 1e-6:.7f}bits/file"):
            found = spend(opened.trace, scores, parse_budget(text), **more)
            assert found.file_bytes == shards.file_bytes({a.linear: a.spec for a in found.assigned})
            assert found.file_bytes <= size
            assert found.storage_bits > found.budget_bits * 0.995 or found.under_budget_reason
    with pytest.raises(InputError) as caught:
        spend(opened.trace, scores_of(opened, 0, head=head), parse_budget(f"{smallest - 1}B"), **more)
    nearest = parse_budget(caught.value.what.rsplit(" ", 1)[-1])
    assert spend(opened.trace, scores_of(opened, 0, head=head), nearest, **more).file_bytes == smallest
