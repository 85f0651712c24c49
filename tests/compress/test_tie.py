"""Tied blocks: what sharing weights measures, what is stored, and that every reader computes the same."""

import itertools
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_model
from heal_help import logits_of
from safetensors.torch import load_file
from torch import Tensor

import llmcompress
from llmcompress.compress.heal.places import Places
from llmcompress.compress.heal.request import HealRequest
from llmcompress.compress.heal.run import Healed, heal
from llmcompress.compress.heal.training import Schedule
from llmcompress.compress.pipeline import open_model
from llmcompress.compress.prune.choose import Chooser, Search, choose
from llmcompress.compress.prune.measure import damage_of
from llmcompress.compress.statistics import mean
from llmcompress.compress.tie.run import TiedResult, TieRequest, tie
from llmcompress.compress.tie.weights import BASES, FIRST, LAST, MEAN, Group, Tied, Ties
from llmcompress.compress.verify import require, verify
from llmcompress.errors import InputError
from llmcompress.hub.source import resolve
from llmcompress.model.text import TextRequest
from llmcompress.recipes import load_recipe

Run = Callable[..., subprocess.CompletedProcess[str]]
TEXT = ("calibration.samples=6", "calibration.sequence_length=32", "calibration.score_samples=4")
TOKENS = torch.randint(3, 40, (4, 20), generator=torch.Generator().manual_seed(5))
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four blocks, the second and third of which differ in their norms alone."""
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path_factory.mktemp("four") / "four", llama_config(num_hidden_layers=4))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    left, right = (dict(model.model.layers[index].named_parameters()) for index in (1, 2))
    for name, parameter in left.items():
        if parameter.ndim == 2:
            right[name].data.copy_(parameter.data)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def tied_to(source: Path, folder: Path, text_file: Path, **asked: Any) -> Path:
    recipe = load_recipe("balanced", (f"calibration.source={text_file}", *TEXT))
    last = list(tie(TieRequest(resolve(str(source)), folder, recipe, "cpu", "prune --tie", **asked)))[-1]
    assert isinstance(last, TiedResult)
    assert last.record.bytes_after == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def llama_output(four: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups with corrections."""
    return tied_to(four, tmp_path_factory.mktemp("llama") / "tied", text_file, groups=2, rank=8)


@pytest.fixture(scope="module")
def gpt2_output(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of GPT-2's transposed linears, in bfloat16."""
    from transformers import AutoModelForCausalLM, GPT2Config

    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=4, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    source = save_model(folder / "gpt2", config)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source, max_shard_size="200KB")
    return tied_to(source, folder / "tied", text_file, groups=2, rank=8)


@pytest.fixture(params=["llama_output", "gpt2_output"])
def output(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@torch.no_grad()
def slow_kld(folder: Path, groups: Sequence[Group], tokens: Tensor) -> list[float]:
    """KL by sequence from a transformers model whose matrices were replaced, in float64."""
    from transformers import AutoModelForCausalLM

    whole, cut = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2))
    for group in groups:
        for name in dict(cut.model.layers[0].named_modules()):
            if name.endswith(MATRICES):
                weights = [whole.model.layers[i].get_submodule(name).weight for i in group.blocks]
                shared = {FIRST: weights[0], LAST: weights[-1], MEAN: sum(weights) / len(weights)}[group.base]
                for index in group.blocks:
                    cut.model.layers[index].get_submodule(name).weight.copy_(shared)
    p, q = (torch.log_softmax(model(tokens, use_cache=False).logits, -1) for model in (whole, cut))
    return [float(x) for x in (p.exp() * (p - q)).sum(-1).mean(-1)]


def ties_of(source: Path, **more: Any) -> Ties:
    opened = open_model(resolve(str(source)), load_recipe("balanced"), "cpu")
    return Ties(opened.skeleton, opened.trace, **more)


def test_damage_is_that_of_the_model_with_its_weights_replaced(four: Path) -> None:
    ties = ties_of(four, size=3)
    sets = [[Group(0, 2, base)] for base in BASES] + [[Group(0, 2, MEAN), Group(2, 2, LAST)], [Group(1, 3, MEAN)], []]
    found = damage_of(ties.skeleton, [Tied(ties, some) for some in sets], list(TOKENS.split(2))).kld
    for row, some in zip(found, sets, strict=True):
        assert torch.allclose(row, torch.tensor(slow_kld(four, some, TOKENS)).double(), atol=1e-5)
    assert not found[-1].any()
    assert found[:-1].all()


def test_corrections_of_full_rank_give_the_original_and_lower_ones_the_nearest(four: Path) -> None:
    klds, left = [], []
    for rank in (0, 4, 64):
        ties = ties_of(four, rank=rank)
        group = Group(0, 2, LAST)
        if rank:
            ties.fit([group], list(TOKENS.split(2)))
        klds.append(float(damage_of(ties.skeleton, [Tied(ties, [group])], [TOKENS]).kld.mean()))
        own = {name: ties._stored(0)[name] for name in ties.linears[0]}
        left.append([float((own[name] - ties.weight(group, 0, name)).norm()) for name in own])
    assert klds[0] > klds[1] > 100 * klds[2]
    assert klds[2] < 1e-9
    assert all(a > b > c for a, b, c in zip(*left, strict=True))


def test_a_mean_leaves_the_least_to_correct_and_bytes_are_equal(four: Path) -> None:
    ties = ties_of(four, rank=8)

    def left(base: str) -> float:
        group = Group(0, 2, base)
        return sum(
            float((ties._stored(i)[n] - ties.shared(group, n)).square().sum()) for i in (0, 1) for n in ties.linears[i]
        )

    assert left(MEAN) < min(left(FIRST), left(LAST))
    assert len({ties.saved_bytes(Group(0, 2, base)) for base in BASES}) == 1


def test_blocks_that_are_alike_are_found_and_leave_no_trace(
    four: Path, run: Run, text_file: Path, tmp_path: Path
) -> None:
    words = [word for change in TEXT for word in ("--set", change)]
    found = run("prune", four, "--tie", "2", "-o", "out", "--calibration", text_file, *words, "--json")
    assert found.returncode == 0, found.stderr
    assert "with {1+2} tied: KL 0.00000" in found.stderr
    record = json.loads(found.stdout)
    assert record["groups"] == ["1+2"]
    assert record["kld"] == 0
    assert record["instead"]["kld"] > 0
    assert record["instead"]["more"] == -record["instead"]["kld"]
    assert torch.equal(logits_of(tmp_path / "out", TOKENS), logits_of(four, TOKENS))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert "tying costs less" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    refused = run("quantize", "out", "--budget", "4bits", "-o", "small")
    assert refused.returncode == 2
    assert "share their weights" in refused.stderr
    assert "export" in refused.stderr
    looked = json.loads(run("inspect", "out", "--json").stdout)
    assert looked["tied"] == [[1, 2]]
    assert looked["weights"] == sum(t.numel() for path in four.glob("*.safetensors") for t in load_file(path).values())


@torch.no_grad()
def test_every_reader_computes_the_same(output: Path, tmp_path: Path) -> None:
    expected = logits_of(output, TOKENS)
    require(verify(output))
    shared, dense = (llmcompress.load(output, dtype=torch.float32, dense=dense) for dense in (False, True))
    for model in (shared, dense):
        assert torch.allclose(model(TOKENS).logits, expected, atol=1e-4)
    prompt = {"inputs": TOKENS[:, :6], "attention_mask": torch.ones(4, 6), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(shared.generate(**prompt), dense.generate(**prompt))  # type: ignore[operator]
    held = sum(p.numel() for p in shared.parameters())
    assert held == sum(t.numel() for path in output.glob("*.safetensors") for t in load_file(path).values())
    assert held < 0.9 * sum(p.numel() for p in dense.parameters())
    shared.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    assert torch.equal(logits_of(tmp_path / "again", TOKENS), expected)


@pytest.mark.parametrize("second", ["cpu", "disk"])
def test_a_map_that_is_worked_out_may_not_spread_shared_weights(
    second: str, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What accelerate makes of `auto` where there are several devices, as if there were."""
    places = {"model.embed_tokens": "cpu", "model.layers": second, "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.rotary_emb": "cpu"}
    monkeypatch.setattr("transformers.integrations.accelerate.infer_auto_device_map", lambda *_, **__: places)
    if second == "cpu":
        assert llmcompress.load(output, device_map="auto")(TOKENS).logits.isfinite().all()
        return
    with pytest.raises(InputError, match="blocks that share weights lie on one device"):
        llmcompress.load(output, device_map="auto")


def test_plain_transformers_refuses_and_an_export_opens_there(output: Path, run: Run, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(output)
    del config.quantization_config  # whose method plain transformers, which does not import us, only warns of
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(output, config=config)
    found = run("export", output, "--format", "bf16", "--dtype", "float32", "-o", "plain")
    assert found.returncode == 0, found.stderr
    with torch.no_grad():
        answers = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(TOKENS).logits
    assert torch.allclose(answers, logits_of(output, TOKENS), atol=1e-4)


@pytest.mark.parametrize("method", [None, "lora"])
def test_healing_trains_corrections_or_an_adapter(
    method: str | None, llama_output: Path, four: Path, text_file: Path, tmp_path: Path
) -> None:
    request = HealRequest(
        source=resolve(str(llama_output)), against=resolve(str(four)), output=tmp_path / "out",
        text=TextRequest(str(text_file), 40, 16, 0, "calibration"), device="cpu", command="heal", method=method,
        places=Places("all"), schedule=Schedule(steps=12, batch_size=4, rate=3e-3, every=4), held_out=8,
    )  # fmt: skip
    last = list(heal(request))[-1]
    assert isinstance(last, Healed)
    assert last.record.helped
    assert last.record.kld.mean < last.record.kld_before.mean
    changed = {
        name
        for path in llama_output.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if not torch.equal(tensor, load_file(request.output / path.name)[name])
    }
    if method == "lora":
        assert not changed
        assert last.record.adapter_bytes
    else:
        ends = {name.rpartition(".")[2] for name in changed if "norm" not in name}
        assert ends == {"weight_up", "weight_down"}
        assert any("norm" in name for name in changed)
    require(verify(request.output))
    if method is None:
        answers = llmcompress.load(request.output, dtype=torch.float32)(TOKENS).logits
        assert torch.allclose(answers, logits_of(request.output, TOKENS), atol=1e-4)


def test_groups_that_overlap_are_never_tried() -> None:
    """Exhaustively: damages are random, and blocks may be in one group only."""
    generator = torch.Generator().manual_seed(1)
    sets = [frozenset(some) for size in (1, 2, 3) for some in itertools.combinations(range(7), size)]
    table = {some: torch.rand(3, generator=generator, dtype=torch.float64) for some in sets}

    def apart(some: frozenset[int]) -> bool:
        return all(b - a > 1 for a, b in itertools.pairwise(sorted(some)))

    def measure(asked: Sequence[frozenset[int]]) -> Tensor:
        assert all(map(apart, asked))
        return torch.stack([table[some] for some in asked])

    steps = choose(Chooser(measure, [0.0] * 7, Search(99, 99), allowed=apart), count=3, max_kld=None)
    for size, step in enumerate(steps, 1):
        best = min((some for some in sets if len(some) == size and apart(some)), key=lambda s: mean(table[s].tolist()))
        assert frozenset(step.removed) == best
    few = Chooser(measure, [0.0] * 3, Search(), allowed=apart)
    assert len(choose(few, count=3, max_kld=None)) == 2


def test_what_cannot_be_asked_for(four: Path, run: Run, text_file: Path, tmp_path: Path) -> None:
    source, recipe = resolve(str(four)), load_recipe("balanced", (f"calibration.source={text_file}", *TEXT))
    asked: list[tuple[dict[str, Any], str]] = [
        ({"groups": 3}, "1 to 2"),
        ({"size": 5}, "2 to 4"),
        ({"exclude": (1, 3)}, "no 2 neighbouring"),
        ({"exclude": (9,)}, "numbered 0 to 3"),
        ({"rank": 64}, "smaller rank"),
        ({"keep": 0.9}, "ties no group"),
        ({"exclude": (1,), "max_kld": 0.0}, "--groups 1"),
    ]
    for more, word in asked:
        with pytest.raises(InputError) as refusal:
            list(tie(TieRequest(source, tmp_path / "out", recipe, "cpu", "", **more)))
        assert word in str(refusal.value.what) + str(refusal.value.hint)
    for words in (["--rank", "4"], ["--groups", "1"], ["--tie", "2", "--blocks", "1"], ["--tie", "2", "--sublayers"]):
        found = run("prune", four, "-o", "out", *words)
        assert found.returncode == 2, words
    assert not list(tmp_path.iterdir())


DAMAGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "no groups": lambda tied: tied.pop("groups"),
    "another version": lambda tied: tied.update(version=2),
    "shares what shares": lambda tied: tied["shared"].update({next(iter(tied["shared"].values())): "x"}),
    "of no tensor": lambda tied: tied["shared"].update({next(iter(tied["shared"])): "model.layers.9.mlp.up_proj"}),
    "of another shape": lambda tied: tied["shared"].update({name("3", "mlp.up_proj"): name("2", "self_attn.q_proj")}),
}


def name(block: str, linear: str) -> str:
    return f"model.layers.{block}.{linear}"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_refused(damage: str, llama_output: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama_output, tmp_path / "damaged")
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    DAMAGES[damage](document["quantization_config"]["tied"])
    (folder / "config.json").write_text(json.dumps(document), encoding="utf-8")
    for reading in (lambda: logits_of(folder, TOKENS), lambda: llmcompress.load(folder)):
        with pytest.raises(InputError):
            reading()
