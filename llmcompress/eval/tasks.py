"""Public tasks through lm-evaluation-harness: both models on the same documents, its prompts, its scores.

Nothing is scored here. A task's documents may come from a local file instead of the Hub: then the harness's own task
reads a data set made of that file (`task_files.py`).
"""

import contextlib
import difflib
import importlib
import importlib.metadata
import io
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmcompress.errors import InputError
from llmcompress.eval.loading import opened
from llmcompress.eval.report import TaskDocuments
from llmcompress.eval.task_files import LOCAL, PARTS_HINT, file_of, write_group
from llmcompress.model.text import load_tokenizer

BY_NAME = "give the task by its name alone"
RESAMPLES = 1000  # behind the standard errors of metrics that are not means, such as perplexity
KEPT = ("n-shot", "n-samples", "versions", "higher_is_better", "task_hashes", "group_subtasks")
Rows = dict[str, dict[str, float | str]]


@dataclass(frozen=True)
class TaskRequest:
    """Tasks by name, `NAME`, or with their documents from a file, `NAME=FILE`; the first `limit` of each, or all."""

    names: tuple[str, ...]
    limit: int | None
    batch_size: int
    device: str


@dataclass(frozen=True)
class TaskResults:
    """What both models scored; fields go into the report under the same names."""

    tasks: Rows
    reference_tasks: Rows
    harness: dict[str, Any]
    documents: dict[str, TaskDocuments]


def run_tasks(request: TaskRequest, reference: Path, candidate: Path) -> TaskResults:
    """Both models, one after the other, on every task, in float32.

    Raises InputError where the harness is missing, a task is unknown, or its documents cannot be had or do not fit it.
    """
    try:
        with _quietly():
            importlib.import_module("lm_eval.tasks")
            importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        words = "" if error.name == "lm_eval" else f", which cannot be imported: {error}"
        raise InputError(f"--tasks needs lm-evaluation-harness{words}", "pip install 'llmcompress[tasks]'") from None
    with tempfile.TemporaryDirectory(prefix="llmcompress-tasks-") as scratch, _quietly():
        names, manager = _prepared(request.names, Path(scratch))
        before, after = (_run(names, manager, request, folder=folder) for folder in (reference, candidate))
    samples = before["samples"], after["samples"]
    return TaskResults(
        tasks=_rows(after),
        reference_tasks=_rows(before),
        harness={
            "lm_eval_version": importlib.metadata.version("lm-eval"),
            **{key: {name: of for name, of in after.get(key, {}).items() if name != LOCAL} for key in KEPT},
        },
        documents={name: _documents(name, samples[0][name], samples[1][name]) for name in sorted(samples[1])},
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the harness's bars and remarks, nor those of the programs it starts."""
    logger = logging.getLogger("lm_eval")
    level, errors, nowhere = logger.level, os.dup(2), os.open(os.devnull, os.O_WRONLY)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        logger.setLevel(logging.ERROR)
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(errors, 2)
            os.close(errors)
            os.close(nowhere)
            logger.setLevel(level)


def _prepared(words: Sequence[str], scratch: Path) -> tuple[list[str], Any]:
    """Names of tasks as the harness knows them, and what it finds them with; those with files are one group."""
    from lm_eval.tasks import TaskManager  # lazy: the extra `tasks`

    tasks = dict(map(file_of, words))
    files = {name: file for name, file in tasks.items() if file is not None}
    groups = write_group(files, scratch)
    manager = TaskManager(include_path=str(scratch))
    for name in tasks:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists them"
            raise InputError(f"--tasks: lm-evaluation-harness has no task {name!r}", hint)
        if name in files and (name in groups) != (name in manager.all_groups):
            raise InputError(f"--tasks: {files[name].name} does not fit {name!r}", PARTS_HINT)
    with _explained():
        local = manager.load([LOCAL])["tasks"] if files else {}
    for name, task in local.items():
        if task.config.num_fewshot:
            raise InputError(f"--tasks: {name} shows examples, its documents cannot come from one file", BY_NAME)
    return [*([LOCAL] if files else []), *(name for name in tasks if name not in files)], manager


def _run(names: Sequence[str], manager: Any, request: TaskRequest, *, folder: Path) -> dict[str, Any]:
    import lm_eval  # lazy: the extra `tasks`
    from lm_eval.models.huggingface import HFLM  # lazy: with it

    model = opened(folder, request.device, torch.float32)
    harness = HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=request.batch_size)
    with _explained():
        found: dict[str, Any] = lm_eval.simple_evaluate(
            model=harness,
            tasks=list(names),
            limit=request.limit,
            bootstrap_iters=RESAMPLES,
            task_manager=manager,
        )
    return found


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn what the harness raises for bad input into InputError."""
    from jinja2 import UndefinedError  # lazy: with the extra `tasks`

    try:
        yield
    except UndefinedError as error:
        raise InputError(f"--tasks: the documents lack a field of the task: {error}", "give the task's own") from None
    except AssertionError:  # how it refuses an answer that alone exceeds the context
        raise InputError("--tasks: an answer is longer than the model's context", "leave that task out") from None
    except (OSError, ValueError) as error:  # what the data sets library raises where there is no data
        words = " ".join(str(error).split())[:200]
        raise InputError(f"--tasks: {words}", "without network give the documents: --tasks NAME=FILE.jsonl") from None


def _rows(found: Mapping[str, Any]) -> Rows:
    """The harness's result rows, of tasks and of groups that have figures, without our own group."""
    rows = {**found["results"], **found.get("groups", {})}
    return {
        name: {key: value if isinstance(value, str) else float(value) for key, value in row.items() if _plain(value)}
        for name, row in rows.items()
        if name != LOCAL
    }


def _plain(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value))


def _documents(name: str, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> TaskDocuments:
    """What each document scored with both models: its accuracy where there is one, else the task's first metric."""
    if [(row["doc_id"], row["doc_hash"]) for row in before] != [(row["doc_id"], row["doc_hash"]) for row in after]:
        raise InputError(f"--tasks {name}: the models were given different documents", "report this task")
    metrics = [key for key in after[0]["metrics"] if isinstance(after[0][key], int | float)]
    metric = "acc" if "acc" in metrics or not metrics else metrics[0]
    return TaskDocuments(
        metric=metric,
        doc_ids=tuple(int(row["doc_id"]) for row in after),
        reference=tuple(float(row[metric]) for row in before),
        candidate=tuple(float(row[metric]) for row in after),
    )
