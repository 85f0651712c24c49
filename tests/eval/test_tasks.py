"""Public tasks: local documents, refusals, and the same figures as lm-evaluation-harness by hand."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import InputError
from llmcompress.eval import tasks
from llmcompress.eval.task_files import LOCAL, file_of, read_rows, write_group
from llmcompress.eval.tasks import TaskRequest, run_tasks

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_documents_get_their_labels_and_the_fields_of_the_task(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "valid.jsonl", [{"goal": "a"}, {"good": "b", "bad": "c", "uid": "x"}])
    assert read_rows(file) == [{"goal": "a"}, {"sentence_good": "b", "sentence_bad": "c", "UID": "x"}]
    (tmp_path / "valid-labels.lst").write_text("1\n0\n")
    assert [row["label"] for row in read_rows(file)] == [1, 0]
    (tmp_path / "valid-labels.lst").write_text("1\n")
    with pytest.raises(InputError, match="not one label for each of 2"):
        read_rows(file)


@pytest.mark.parametrize(
    ("content", "word"),
    [("", "no documents"), ("[1]\n", "line 1: not an object"), ('{"a": 1}\n{', "line 2"), (None, "No such")],
)
def test_files_that_are_no_documents_are_refused(tmp_path: Path, content: str | None, word: str) -> None:
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(InputError, match=word):
        read_rows(tmp_path / "x.jsonl")


def test_documents_of_several_tasks_make_a_group(tmp_path: Path) -> None:
    one = write_lines(tmp_path / "one.jsonl", [{"text": "a"}, {"text": "b"}])
    two = write_lines(tmp_path / "two.jsonl", [{"uid": "p", "good": "a", "bad": "b"}, {"uid": "q", "good": "c"}])
    assert file_of("lambada_openai") == ("lambada_openai", None)
    assert write_group({"lambada": one, "blimp": two}, tmp_path) == {"blimp"}
    assert file_of(f"lambada={one}") == ("lambada", one)
    members = json.loads((tmp_path / f"{LOCAL}.yaml").read_text())["task"]
    assert [(m.get("task"), m.get("group"), m.get("dataset_name")) for m in members] == [
        ("lambada", None, "default"),
        (None, "blimp", None),
    ]
    assert (tmp_path / "data-1" / "1.jsonl").read_text() == '{"UID": "q", "sentence_good": "c"}\n'


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as refused:
        run_tasks(TaskRequest(("piqa",), None, 8, "cpu"), tmp_path, tmp_path)
    assert "llmcompress[tasks]" in refused.value.hint


def piqa(folder: Path) -> Path:
    """Documents that fit PIQA, and GSM8K too."""
    gsm8k = {"question": "q", "answer": "#### 1"}
    rows = [{"goal": f"goal {i}", "sol1": "the fox" * (i % 3 + 1), "sol2": f"a dog {i}"} | gsm8k for i in range(12)]
    (folder / "valid-labels.lst").write_text("\n".join(str(i % 2) for i in range(12)))
    return write_lines(folder / "valid.jsonl", rows)


@needs_harness
@pytest.mark.filterwarnings("ignore")  # of its dependencies
def test_figures_are_those_of_the_harness_by_hand(llama: Path, tmp_path: Path) -> None:
    import lm_eval
    from conftest import llama_config, save_model
    from lm_eval.tasks import TaskManager

    other = save_model(tmp_path / "other", llama_config(), seed=1)
    file = piqa(tmp_path)
    request = TaskRequest((f"piqa={file}",), 10, 4, "cpu")
    found = run_tasks(request, llama, other)
    labelled = write_lines(tmp_path / "labelled.jsonl", read_rows(file))
    task = {
        "task": "by_hand", "dataset_path": "json", "output_type": "multiple_choice", "validation_split": "validation",
        "dataset_kwargs": {"data_files": {"validation": str(labelled)}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "Question: {{goal}}\nAnswer:", "doc_to_target": "label", "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    for folder, ours in ((llama, found.reference_tasks), (other, found.tasks)):
        by_hand = lm_eval.simple_evaluate(
            model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, tasks=[task], limit=10,
            batch_size=4, device="cpu", task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip
        for key in ("acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"):
            assert ours["piqa"][key] == by_hand["results"]["by_hand"][key]
    documents = found.documents["piqa"]
    assert (documents.metric, documents.doc_ids) == ("acc", tuple(range(10)))
    assert sum(documents.reference) / 10 == found.reference_tasks["piqa"]["acc,none"]
    assert sum(documents.candidate) / 10 == found.tasks["piqa"]["acc,none"]
    assert found.harness["n-samples"]["piqa"] == {"original": 12, "effective": 10}
    assert set(found.tasks) == {"piqa"}


@needs_harness
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("piqqa", "piqa"),
        ("blimp={file}", "UID"),
        ("gsm8k={file}", "shows examples"),
        ("lambada_openai={file}", "field of the task"),
    ],
)
def test_what_cannot_be_run_is_refused(llama: Path, tmp_path: Path, words: str, hint: str) -> None:
    with pytest.raises(InputError) as refused:
        run_tasks(TaskRequest((words.format(file=piqa(tmp_path)),), None, 4, "cpu"), llama, llama)
    assert hint in f"{refused.value.what} {refused.value.hint}"


def test_standard_error_is_given_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import os

    with tasks._quietly():
        os.write(2, b"noise\n")
    os.write(2, b"words\n")
    assert capfd.readouterr().err == "words\n"
