"""Model cards: what the Hub reads of them is what was measured and inherited, and nothing in a name acts."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard
from markdown_it import MarkdownIt
from synthetic_reports import make_report

from llmcompress.compress.card import card
from llmcompress.compress.output import Origin
from llmcompress.eval.report import Estimate
from llmcompress.hub.card import UNMEASURED, Inherited, inherited, parts
from llmcompress.hub.source import Source
from llmcompress.pages.card import evaluated_card

HOSTILE = "<img src=x onerror=alert(1)>|**x**`\n\n# loud\n---\nlicense: mit\n[a](javascript:b)"
BODY = f"# A model\n\n{UNMEASURED}\n## Size\n\n| a |\n|---|\n| b |\n"


def origin(**card: Any) -> Origin:
    """The origin of a model on the Hub whose card says some things."""
    licence = card.get("license")
    return Origin.of(Source(Path(), "acme/base", "acme/base", "1" * 40, licence, Inherited(**card)), "0" * 64)


def read(text: str) -> ModelCard:
    """The card as the Hub's own library reads it: that raises where metadata are not what it knows."""
    found = ModelCard(text)
    assert found.data.to_dict() == parts(text)[0]
    return found


def metrics(text: str) -> dict[tuple[str, str], EvalResult]:
    """Every result, by data set and kind."""
    return {(r.dataset_type, r.metric_type): r for r in read(text).data.eval_results}


def test_licence_language_and_base_are_inherited() -> None:
    said = {"license": "other", "license_name": "acme licence", "license_link": "LICENSE", "language": ("en", "de")}
    data = read(card(origin(**said), "quantized", ("gptq",), "# x\n")).data
    assert (data.license, data.license_name, data.license_link) == ("other", "acme licence", "LICENSE")
    assert (data.language, data.base_model, data.base_model_relation) == (["en", "de"], "acme/base", "quantized")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["llmcompress", "gptq"]
    local = Origin.of(Source(Path(), "here", card=Inherited(base_model="acme/first")), "0" * 64)
    assert read(card(local, "finetune", ("pruned",), "")).data.base_model == "acme/first"
    plain = read(card(local.model_copy(update={"base_model": None}), "finetune", (), "")).data.to_dict()
    assert not {"base_model", "base_model_relation", "license", "language", "license_name"} & set(plain)


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: other\nlicense_name: x y\nlicense_link: https://a.b/c", ("other", "x y", "https://a.b/c", ())),
        ("license: mit\nlanguage:\n- en\n- 7\n- '<b>'\nlicense_name: 'a\"<b>'", ("mit", None, None, ("en",))),
        ("license: mit\nlicense_link: javascript:alert(1)\nlanguage: no", ("mit", None, None, ())),  # YAML's no: false
        ("license: mit\na: &a [x]\nlanguage: *a", ("mit", None, None, ())),  # not read at all but for the licence
        ("- a\n- list", (None, None, None, ())),
    ],
)
def test_of_a_strangers_card_only_plain_words_are_taken(tmp_path: Path, front: str, expected: tuple[Any, ...]) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# x\n")
    found = inherited(tmp_path)
    assert (found.license, found.license_name, found.license_link, found.language) == expected


def test_the_hub_reads_what_was_measured() -> None:
    report = make_report("small", mean=0.05)
    tasks = {"piqa": {"acc,none": 0.75, "acc_stderr,none": 0.01, "alias": "piqa"}}
    report = report.model_copy(update={"tasks": tasks, "reference_tasks": {"piqa": {"acc,none": 0.8}}})
    text = evaluated_card(card(origin(), "quantized", (), BODY), report, name="acme/small")
    found, summary = metrics(text), report.summary
    data = next(kind for kind, metric in found if metric == "perplexity")
    kld = found[data, "kl_divergence"]
    assert kld.metric_value == pytest.approx(summary.kld.mean, abs=1e-6)
    assert (kld.metric_args["low"], kld.metric_args["high"]) == pytest.approx(
        (summary.kld.low, summary.kld.high), abs=1e-6
    )
    assert kld.dataset_args["tokens_sha256"] == report.data.tokens_digest
    assert found[data, "perplexity"].metric_value == pytest.approx(summary.perplexity_candidate, abs=1e-6)
    assert found["piqa", "acc"].metric_value == 0.75
    assert found["piqa", "acc"].metric_args == {"standard_error": 0.01}
    assert len(found) == 5
    assert read(text).data.model_name == "acme/small"
    for said in (f"{summary.kld.mean:.5f}", f"{summary.kld.low:.5f} to {summary.kld.high:.5f}", "0.7500 ± 0.0100"):
        assert said in text
    assert "Not measured yet" not in text
    assert text.count("## ") == 2
    assert "## Size" in text


def test_new_figures_take_the_place_of_old_ones() -> None:
    first = evaluated_card(card(origin(), "quantized", (), BODY), make_report("small", mean=0.5), name="a/b")
    second, direct = (
        evaluated_card(text, make_report("small", mean=0.05), name="a/b")
        for text in (first, card(origin(), "quantized", (), BODY))
    )
    assert second == direct != first
    bare = evaluated_card("# only a heading\n", make_report("small", mean=0.05), name="a/b", attached=False)
    assert "## What it cost" in bare
    assert "report.html" not in bare


def test_figures_that_are_none_are_left_out() -> None:
    report = make_report("small", mean=0.05)
    none = Estimate(mean=None)
    gone = {"kld": none, "dnll": none, "perplexity_ratio": none, "perplexity_candidate": None}
    report = report.model_copy(update={"summary": report.summary.model_copy(update=gone), "finite": False})
    text = evaluated_card(BODY, report, name="a/b")
    assert {metric for _, metric in metrics(text)} == {"top1_agreement", "acc"}
    assert "It gives NaN or infinity" in text


def test_names_cannot_act() -> None:
    report = make_report(HOSTILE)
    changes = {
        "ref": report.ref.model_copy(update={"name": HOSTILE}),
        "data": report.data.model_copy(update={"source": HOSTILE}),
        "tasks": {HOSTILE: {f"{HOSTILE},none": 0.5}},
        "environment": {HOSTILE: HOSTILE},
        "command": HOSTILE,
        "date": HOSTILE,
    }
    text = evaluated_card(card(origin(), "quantized", (), BODY), report.model_copy(update=changes), name="a/b")
    assert read(text).data.license is None
    html = MarkdownIt("commonmark").enable("table").render(parts(text)[1])
    assert "<img" not in html
    assert "javascript" not in html.replace("&lt;", "<").partition("<a ")[2].partition(">")[0]
    assert html.count("<h") == 3
    assert "<strong>" not in html
