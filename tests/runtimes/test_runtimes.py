"""The table of runtimes: it agrees with what writes and reads the formats, and plans for a runtime keep to it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import llama_config, save_model
from hypothesis import assume, given
from hypothesis import strategies as st

import llmcompress
from llmcompress.cli import cli
from llmcompress.cli.options import RUNTIMES
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.export import ggml
from llmcompress.compress.export.families import FAMILIES
from llmcompress.compress.export.formats import gptq
from llmcompress.compress.formats import exporter_of
from llmcompress.compress.pipeline import open_model
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.kernels.samples import random_codes
from llmcompress.plugins import available
from llmcompress.recipes import load_recipe
from llmcompress.runtimes import Weight, find_runtime, table
from llmcompress.runtimes.aim import fitting, promised
from llmcompress.runtimes.answers import AS_WRITTEN, Answer, Subject, ask, layout_of
from llmcompress.spec import INPUTS, LinearSpec
from llmcompress.types import QuantizerOptions
from tests.synthetic_scores import make_scores, make_trace

SPECS = [
    LinearSpec(bits=3, group_size=128), LinearSpec(bits=4, group_size=32), LinearSpec(bits=8, group_size=256),
    LinearSpec(bits=4, group_size=64, kind="nf4"), LinearSpec(bits=4, group_size=64, kind="fp4", double=True),
    LinearSpec(bits=4, group_size=64, kind="asymmetric"), LinearSpec(bits=3, group_size=0, kind="codebook"),
    LinearSpec(bits=8, group_size=256, kind="int8", inputs=INPUTS["int8"]),
    LinearSpec(bits=8, group_size=256, kind="fp8"), LinearSpec(bits=3, group_size=64, high_share=0.125),
    LinearSpec(bits=2, group_size=64, rank=4), LinearSpec(bits=5, group_size=64),
]  # fmt: skip


def weight(spec: LinearSpec, name: str = "m.0.o_proj", *, rows: int = 256, columns: int = 256) -> Weight:
    return Weight(name=name, spec=spec, rows=rows, columns=columns)


def asked(subject: Subject) -> dict[tuple[str, str], Answer]:
    return {(answer.runtime, answer.how): answer for answer in ask(subject)}


def test_the_table_names_what_there_is() -> None:
    assert {runtime.name for runtime in table().runtimes} == {*RUNTIMES, "llmcompress"}
    assert {export.format for export in table().exports} <= set(available("llmcompress.compress.export.formats"))
    for runtime in table().runtimes:
        assert all(runtime.door(layout) is not None for layout in runtime.plan.layouts)
        assert all(door.source for door in runtime.doors)
    with pytest.raises(InputError, match="unknown runtime"):
        find_runtime("vlm")


@given(specs=st.sets(st.sampled_from(SPECS), min_size=1, max_size=4), softmax=st.booleans(), cache=st.booleans())
def test_the_layout_is_the_one_that_is_written(specs: set[LinearSpec], softmax: bool, cache: bool) -> None:
    options = QuantizerOptions(softmax="log2" if softmax else "none", kv_cache="fp8" if cache else "none")
    written = exporter_of(specs, options).__name__.rpartition(".")[2]
    words = {"compressed_tensors": "compressed-tensors", "bnb": "bitsandbytes", "native": "native"}
    assert layout_of(tuple(map(weight, specs)), options.kv_cache, softmax) == words[written]


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    size=st.sampled_from([8, 16, 32, 48, 64, 128, 0]),
    rows=st.sampled_from([30, 32, 64]),
    columns=st.sampled_from([48, 96, 128, 256]),
    kind=st.sampled_from(["int", "nf4", "codebook"]),
)
def test_what_gptq_holds_is_what_it_says(bits: int, size: int, rows: int, columns: int, kind: str) -> None:
    size = size or columns
    assume(columns % size == 0)
    changes: dict[str, Any] = {"kind": kind, "bits": 4 if kind == "nf4" else bits}
    spec = LinearSpec(**{"group_size": 0 if kind == "codebook" else size, **changes})
    terms = next(export.exact for export in table().exports if export.format == "gptq")
    said = terms.fault(weight(spec, rows=rows, columns=columns))
    assert (said is None) == (gptq.refusal(spec, rows, columns) is None)


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), size=st.sampled_from([16, 32, 64, 128]), high=st.booleans())
def test_what_gguf_holds_is_what_it_writes(bits: int, size: int, high: bool) -> None:
    spec = LinearSpec(bits=bits, group_size=size, high_share=0.25 if high and bits < 7 else 0.0)
    integers = ggml.integers_of(random_codes(spec, 4, 256))
    assert integers is not None
    terms = next(export.exact for export in table().exports if export.format == "gguf")
    said = terms.fault(weight(spec, rows=4))
    assert (said is None) == (ggml.type_for(*integers) is not None)
    door = find_runtime("llamacpp").door("gguf")
    assert door is not None
    assert set(door.terms.families or ()) == set(FAMILIES)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_fits_is_what_the_runtime_opens(runtime: str) -> None:
    trace = make_trace(2)
    sizes = {x.name: (x.rows, x.columns) for x in trace.linears}
    every = {name: tuple(s for s in SPECS if s.inputs is None) for name in sizes}
    found = fitting(runtime, trace, every)
    for name, specs in found.items():
        for spec in specs:
            one = {x.name: (spec if spec in every[x.name] else specs[0]) for x in trace.linears}
            weights = tuple(weight(s, n, rows=sizes[n][0], columns=sizes[n][1]) for n, s in one.items())
            answer = promised(runtime, Subject("llama", layout_of(weights), weights))
            assert answer is not None
            assert answer.exact
            assert answer.packed or runtime == "transformers"
        for spec in set(every[name]) - set(specs):  # alone in a model, it is refused, or wider than it need be
            rows, columns = sizes[name]
            alone = (weight(spec, name, rows=rows, columns=columns),)
            answers = asked(Subject("llama", layout_of(alone), alone))
            good = [a for (who, _), a in answers.items() if who == runtime and a.packed and a.exact]
            assert not good or spec.bits not in find_runtime(runtime).plan.bits


def test_fused_linears_that_differ_are_refused_where_they_are_fused() -> None:
    specs = {"q_proj": 3, "k_proj": 3, "v_proj": 4}
    weights = tuple(weight(LinearSpec(bits=b, group_size=64), f"m.0.attn.{n}") for n, b in specs.items())
    answers = asked(Subject("llama", layout_of(weights), weights))
    assert "fused" in answers["vllm", AS_WRITTEN].reason
    assert answers["transformers", AS_WRITTEN].loads


@pytest.mark.parametrize("alike", ["model", "block", "nothing"])
def test_experts_are_fused_as_far_as_a_runtime_says(alike: str) -> None:
    bits = {"model": (4, 4, 4, 4), "block": (4, 4, 8, 8), "nothing": (4, 8, 4, 8)}[alike]
    names = [f"m.layers.{block}.mlp.experts.{expert}.up_proj" for block in range(2) for expert in range(2)]
    weights = tuple(
        weight(LinearSpec(bits=b, group_size=64), n).model_copy(update={"expert": True})
        for b, n in zip(bits, names, strict=True)
    )
    assert layout_of(weights) == "compressed-tensors"
    answers = asked(Subject("mixtral", layout_of(weights), weights))
    opened = {who for who, how in answers if how == AS_WRITTEN and answers[who, how].loads}
    expected = {"model": {"transformers", "vllm", "sglang"}, "block": {"vllm", "sglang"}, "nothing": set()}[alike]
    assert opened == {*expected, "llmcompress"}
    assert not any(how.endswith(("gptq", "bnb", "native", "gguf")) for _, how in answers)


def test_a_family_that_llama_cpp_has_not_is_refused_before_anything_is_scored() -> None:
    trace = make_trace(1).model_copy(update={"model_type": "gpt_neox"})
    candidates = {x.name: (LinearSpec(bits=4, group_size=32),) for x in trace.linears}
    with pytest.raises(InputError, match="this is a gpt_neox model"):
        fitting("llamacpp", trace, candidates)
    assert fitting("any", trace, candidates) == candidates


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("plan.runtime=sglang", "plan.bits=[2,3]"), "SGLang 0.5.23 takes 4, 8 bits"),
        (("plan.runtime=sglang", "plan.pin.q_proj=3"), r"plan.pin.q_proj: \[3\]"),
        (("plan.runtime=sglang", "plan.candidates.q_proj=[3]"), "plan.candidates.q_proj"),
        (("plan.runtime=vlm",), "plan.runtime"),
    ],
)
def test_widths_a_runtime_does_not_take_are_refused(changes: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_recipe("balanced", changes)


def test_a_recipe_is_narrowed_to_the_runtime() -> None:
    part = load_recipe("balanced", ("plan.runtime=llamacpp", "plan.candidates.q_proj=[3,4,8]")).plan
    assert (part.bits, part.head_bits, part.group_size) == ((4, 5, 8), (4, 8), 32)
    assert part.candidates == {"q_proj": (4, 8)}
    assert load_recipe("balanced", ("plan.runtime=vllm", "plan.group_size=256")).plan.group_size == 128
    assert load_recipe("balanced", ("plan.runtime=vllm", "plan.group_size=64")).plan.group_size == 64


def test_a_quantizer_whose_formats_have_no_place_is_refused(llama: Path) -> None:
    for changes, hint in ((("quantizer=hqq", "plan.runtime=vllm"), "gptq"), (("plan.runtime=bnb",), "--recipe nf4")):
        with pytest.raises(InputError, match="can be stored for") as caught:
            open_model(Source(llama, "llama"), load_recipe("fast", changes), "cpu")
        assert hint in caught.value.hint


def test_the_table_is_printed_and_budgets_are_refused_with_advice(tmp_path: Path) -> None:
    trace = make_trace(2)
    from llmcompress.types import ScoreFile

    file = ScoreFile(model="m", trace=trace, scores=(make_scores(trace),), group_size=128, other_bytes=1000)
    path = tmp_path / "scores.json"
    path.write_text(file.model_dump_json())
    words = ["plan", str(path), "--budget", "4.6bits"]
    shown = CliRunner().invoke(cli, words, catch_exceptions=False).stdout
    assert "vLLM" in shown
    document = json.loads(CliRunner().invoke(cli, [*words, "--runtime", "sglang", "--json"]).stdout)
    bits = {assigned["spec"]["bits"] for assigned in document["allocation"]["assigned"]}
    assert bits == {4, 8}
    assert next(a for a in document["runtimes"] if a["runtime"] == "sglang")["verdict"] == "runs packed"
    failed = CliRunner().invoke(cli, ["plan", str(path), "--budget", "3.5bits", "--runtime", "sglang"])
    assert isinstance(failed.exception, InputError)
    assert "SGLang" in failed.exception.what
    assert "another runtime" in failed.exception.hint


TOKENS = torch.tensor([list(range(40))])
CASES = [
    ("fast", ("plan.bits=[2,3,4,8]", "plan.group_size=64"), "4bits"),
    ("nf4", (), "8bits"),
]


@torch.no_grad()
@pytest.mark.parametrize(("recipe", "changes", "budget"), CASES)
def test_the_claim_is_what_happens(
    recipe: str, changes: tuple[str, ...], budget: str, llama: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    list(quantize(QuantizeRequest(
        Source(llama, "llama"), out, load_recipe(recipe, changes), parse_budget(budget), "cpu", ""
    )))  # fmt: skip
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(out), "--json"], catch_exceptions=False).stdout)
    answers = {(a["runtime"], a["how"]): a for a in shown["runtimes"]}
    expected = llmcompress.load(out, dense=True)(TOKENS).logits
    assert answers["llmcompress", AS_WRITTEN]["packed"]
    assert answers["transformers", AS_WRITTEN]["loads"]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert float((theirs(TOKENS).logits - expected).abs().max()) <= 1e-2
    size = sum(t.numel() * t.element_size() for n, t in theirs.state_dict().items() if "o_proj" in n)
    packed = size < 0.75 * 3 * 64 * 64 * 2
    assert packed == answers["transformers", AS_WRITTEN]["packed"]


def test_inspecting_a_plain_model_says_who_opens_it(tmp_path: Path) -> None:
    source = save_model(tmp_path / "plain", llama_config(num_hidden_layers=1))
    shown = json.loads(CliRunner().invoke(cli, ["inspect", str(source), "--json"], catch_exceptions=False).stdout)
    assert next(a for a in shown["runtimes"] if a["runtime"] == "vllm")["loads"]
