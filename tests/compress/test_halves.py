"""Halves of blocks that are skipped: plain transformers computes with zeros what our loader does not compute at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import llmcompress
from llmcompress.cli.prune import prune_command
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.prune.halves import Half, find_halves, whole
from llmcompress.compress.prune.measure import removal_damage
from llmcompress.compress.prune.run import Pruned, PruneRequest, prune
from llmcompress.compress.prune.write import Writing, check_pruned, write_pruned
from llmcompress.compress.run import Finished, QuantizeRequest, quantize
from llmcompress.errors import InputError
from llmcompress.hub.source import resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.recipes import load_recipe
from llmcompress.runtime.skipping import KEY, Nothing, SkipRecord

BLOCKS = 4
REMOVED = frozenset({Half(0, "attn"), Half(1, "mlp"), Half(2, "attn"), Half(3, "mlp")})
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def families() -> dict[str, Any]:
    """A configuration of every family that is promised, without what would stop `generate` early."""
    from transformers import Gemma2Config, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, OPTConfig, Qwen3Config

    grouped = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4}
    opt = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"ffn_dim": 128}
    return {
        "llama": llama_config(num_hidden_layers=BLOCKS),
        "qwen3": Qwen3Config(**grouped),
        "gemma2": Gemma2Config(**grouped, **kinds),
        "gemma3": Gemma3TextConfig(**grouped, **kinds),
        "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=BLOCKS, n_head=4, n_positions=64),
        "opt": OPTConfig(**opt, word_embed_proj_dim=64),
        "opt, post-norm": OPTConfig(**opt, word_embed_proj_dim=32, do_layer_norm_before=False),
        "neox": GPTNeoXConfig(**SIZES),
        "neox, serial": GPTNeoXConfig(**SIZES, use_parallel_residual=False),
    }


def shortened(source: Path, folder: Path, removed: frozenset[int | Half] = REMOVED) -> Path:
    """The model of `source` without some halves, written by `prune`'s own writer."""
    skeleton = Skeleton.open(source)
    writing = Writing(skeleton, removed, find_halves(skeleton))
    folder.mkdir()
    write_pruned(writing, folder)
    check_pruned(writing, folder, torch.arange(12)[None])
    return folder


def plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    return model.eval()


@torch.no_grad()
def answers(model: Any) -> tuple[Tensor, Tensor]:
    """Logits of two rows, one of them padded, and what is generated from them with a cache."""
    tokens = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    told = {"attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    return model(tokens).logits, model.generate(tokens, **told, use_cache=True, pad_token_id=0)


@pytest.mark.parametrize("family", sorted(families()))
def test_plain_transformers_and_our_loader_compute_the_same(family: str, tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", families()[family])
    out = shortened(source, tmp_path / "out")
    plain, ours = plain_model(out), llmcompress.load(out, dtype=torch.float32)
    assert type(ours) is type(plain)
    (logits, tokens), (same_logits, same_tokens) = answers(plain), answers(ours)
    assert torch.equal(logits, same_logits)
    assert torch.equal(tokens, same_tokens)
    assert not torch.allclose(logits, answers(plain_model(source))[0], atol=1e-3)
    assert sum(isinstance(module, Nothing) for module in ours.modules()) == 4
    gone = [name for name in plain.state_dict() if name not in ours.state_dict()]
    matrices = [name for name in gone if plain.state_dict()[name].ndim > 1]
    assert len(matrices) >= 8
    assert not any(plain.state_dict()[name].any() for name in matrices)
    with pytest.raises(InputError):
        ours.save_pretrained(tmp_path / "again")  # type: ignore[operator]


def test_a_cache_of_fixed_size_and_beams_come_to_the_same(tmp_path: Path) -> None:
    out = shortened(save_model(tmp_path / "source", families()["llama"]), tmp_path / "out")
    plain, ours = plain_model(out), llmcompress.load(out, dtype=torch.float32)
    tokens = torch.arange(3, 11)[None]
    for told in ({"cache_implementation": "static"}, {"num_beams": 3}):
        told |= {"max_new_tokens": 8, "do_sample": False, "min_new_tokens": 8}
        assert torch.equal(plain.generate(tokens, **told), ours.generate(tokens, **told)), told  # type: ignore[operator]


def test_families_whose_attention_adds_the_stream_itself_are_refused(tmp_path: Path) -> None:
    from transformers import BloomConfig

    source = save_model(tmp_path / "bloom", BloomConfig(vocab_size=96, hidden_size=64, n_layer=BLOCKS, n_head=4))
    halves = find_halves(Skeleton.open(source))
    assert not halves.modules
    assert len(halves.refused) == 2 * BLOCKS
    request = PruneRequest(resolve(str(source)), None, load_recipe("balanced"), "cpu", "", sublayers=True)
    with pytest.raises(InputError, match="residual stream"):
        list(prune(request))


@torch.no_grad()
def slow_kld(folder: Path, halves: frozenset[int | Half], tokens: Tensor) -> list[float]:
    """KL by sequence from a transformers model whose writers were set to zero."""
    from transformers import AutoModelForCausalLM

    whole_model, cut = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for _ in range(2))
    for half in halves:
        assert isinstance(half, Half)
        block = cut.model.layers[half.block]
        writer: nn.Linear = block.self_attn.o_proj if half.part == "attn" else block.mlp.down_proj
        writer.weight.zero_()
    p, q = (torch.log_softmax(m(tokens, use_cache=False).logits, -1) for m in (whole_model, cut))
    return [float(x) for x in (p.exp() * (p - q)).sum(-1).mean(-1)]


def test_damage_is_that_of_the_model_with_its_writers_at_zero(llama: Path) -> None:
    tokens = torch.randint(96, (4, 20), generator=torch.Generator().manual_seed(0))
    skeleton = Skeleton.open(llama)
    a, b, c = Half(0, "attn"), Half(0, "mlp"), Half(2, "mlp")
    sets = [frozenset[int | Half](some) for some in ({a}, {b}, {c}, {a, c}, {a, b})]
    found = removal_damage(skeleton, sets, list(tokens.split(2)), halves=find_halves(skeleton))
    for klds, removed in zip(found.kld, sets, strict=True):
        assert torch.allclose(klds, torch.tensor(slow_kld(llama, removed, tokens)).double(), atol=1e-5)
    block = removal_damage(skeleton, [frozenset({0})], list(tokens.split(2)))
    assert torch.equal(found.kld[4], block.kld[0])


@settings(max_examples=50, deadline=None)
@given(st.sets(st.tuples(st.integers(0, 3), st.sampled_from(("attn", "mlp", "block")))))
def test_two_halves_are_a_block(drawn: set[tuple[int, str]]) -> None:
    removal = whole([block if part == "block" else Half(block, part) for block, part in drawn])
    gone = {(b, p) for b, part in drawn for p in (("attn", "mlp") if part == "block" else (part,))}
    for block in range(4):
        assert (block in removal) == ({(block, "attn"), (block, "mlp")} <= gone)
        for part in ("attn", "mlp"):
            assert (Half(block, part) in removal or block in removal) == ((block, part) in gone)
    assert whole(removal) == removal


SMALL = ("calibration.samples=6", "calibration.sequence_length=32", "calibration.score_samples=4")


def pruned(source: Path, text: Path, output: Path | None, **more: Any) -> Pruned:
    recipe = load_recipe("balanced", (f"calibration.source={text}", *SMALL))
    request = PruneRequest(resolve(str(source)), output, recipe, "cpu", "", **({"sublayers": True, "by": "kl"} | more))
    return [event for event in prune(request) if isinstance(event, Pruned)][-1]


def test_pruning_again_keeps_what_is_skipped_and_both_halves_make_a_block(
    llama: Path, text_file: Path, tmp_path: Path
) -> None:
    first = pruned(llama, text_file, tmp_path / "one", count=1).record
    (half,) = first.halves
    block = int(half.partition(".")[0])
    second = pruned(tmp_path / "one", text_file, tmp_path / "two", count=1).record
    assert half in second.halves or block in second.removed
    third = pruned(tmp_path / "one", text_file, tmp_path / "three", sublayers=False, by="voids", count=1).record
    kept = [i for i in range(3) if i not in third.removed]
    document = json.loads((tmp_path / "three" / "config.json").read_text())
    if block in kept:
        assert SkipRecord.of(document) is not None
        assert document[KEY]["halves"] == [f"{kept.index(block)}.{half.partition('.')[2]}"]
    else:
        assert KEY not in document
    everything = frozenset[int | Half]({Half(1, "attn"), Half(1, "mlp"), Half(2, "mlp")})
    out = shortened(llama, tmp_path / "four", whole(everything))
    document = json.loads((out / "config.json").read_text())
    assert document["num_hidden_layers"] == 2
    assert document[KEY]["halves"] == ["1.mlp"]
    assert torch.equal(answers(plain_model(out))[0], answers(llmcompress.load(out, dtype=torch.float32))[0])


def test_pairs_find_what_single_steps_walk_past() -> None:
    from llmcompress.compress.prune.choose import Chooser, Search, choose

    def damage(some: frozenset[int]) -> float:
        return 0.1 if some == {0, 1} else 0.5 if some <= {2, 3} else 0.9

    def measure(sets: Any) -> Tensor:
        return torch.tensor([[damage(some)] * 3 for some in sets], dtype=torch.float64)

    for pairs, best in (((), (2, 3)), ((frozenset({0, 1}),), (0, 1))):
        chooser = Chooser(measure, [5.0, 5.0, 1.0, 1.0], Search(beam=1, shortlist=2), pairs=pairs)
        assert choose(chooser, count=2, max_kld=None)[-1].removed == best


@pytest.mark.parametrize("quantizer", ["gptq", "signround", "hqq", "codebook", "twotier", "nf4", "fp8"])
def test_quantizing_leaves_zeros_zero_and_the_record_in_place(
    quantizer: str, text_file: Path, llama: Path, tmp_path: Path
) -> None:
    out = shortened(llama, tmp_path / "out", frozenset({Half(0, "attn"), Half(1, "mlp")}))
    for path in llama.glob("tokenizer*"):
        (out / path.name).write_bytes(path.read_bytes())
    changes = [f"calibration.source={text_file}", *SMALL, f"quantizer={quantizer}", "plan.group_size=64"]
    changes += ["quantize.high_share=0.125", "plan.bits=[2, 3, 4]"] if quantizer == "twotier" else []
    changes += ["quantize.iterations=2"] if quantizer in ("signround", "adaround") else []
    recipe = load_recipe("balanced", tuple(changes))
    budget = parse_budget("8.6bits")
    found = list(quantize(QuantizeRequest(resolve(str(out)), tmp_path / "small", recipe, budget, "cpu", "")))
    finished = found[-1]
    assert isinstance(finished, Finished)
    zeros = [
        a for a in finished.plan.allocation.assigned if "layers.0.self_attn" in a.linear or "layers.1.mlp" in a.linear
    ]
    others = [a for a in finished.plan.allocation.assigned if a not in zeros]
    assert len(zeros) == 7
    assert max(a.spec.bits for a in zeros) <= min(a.spec.bits for a in others)
    dense, ours = (llmcompress.load(tmp_path / "small", dtype=torch.float32, dense=dense) for dense in (True, False))
    assert sum(isinstance(module, Nothing) for model in (dense, ours) for module in model.modules()) == 4
    assert "0.attn, 1.mlp" in (tmp_path / "small" / "README.md").read_text()
    from llmcompress.preflight import check_source
    from llmcompress.runtime.packed import PackedReader
    from llmcompress.runtime.shards import ShardReader

    document = json.loads((tmp_path / "small" / "config.json").read_text())
    reader = PackedReader(ShardReader(check_source(tmp_path / "small", packed=True).paths), document)
    assert all(not reader.read(f"{a.linear}.weight").any() for a in zeros)
    (logits, tokens), (same, same_tokens) = answers(dense), answers(ours)
    assert torch.allclose(logits, same, atol=1e-4)
    assert torch.equal(tokens, same_tokens)


def test_a_record_that_does_not_fit_is_refused(llama: Path, tmp_path: Path) -> None:
    out = shortened(llama, tmp_path / "out", frozenset({Half(0, "attn")}))
    document = json.loads((out / "config.json").read_text())
    for change in ({"version": 2}, {"zero": {"model.layers.9.mlp": 0}}, {"halves": 3}):
        (out / "config.json").write_text(json.dumps(document | {KEY: document[KEY] | change}))
        with pytest.raises(InputError):
            llmcompress.load(out)
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        llmcompress.load(llama)
    assert load_file(next(out.glob("*.safetensors")))


def test_the_command(llama: Path, text_file: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    small = [word for change in SMALL for word in ("--set", change)]
    found = run(
        "prune", llama, "--sublayers", "--halves", "1", "--pairs", "-o", "out", "--calibration", text_file, *small
    )
    assert found.returncode == 0, found.stderr
    assert "skipped" in found.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llmcompress.load" in card
    refused = CliRunner().invoke(prune_command, [str(llama), "--halves", "1"])
    assert isinstance(refused.exception, InputError)
    assert "--sublayers" in refused.exception.hint
