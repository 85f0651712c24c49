"""Tasks of lm-evaluation-harness with their documents from local files.

Every file becomes a small data set, in a folder, in which it stands for each split a task may read; a group of the
harness's own kind then names the tasks and gives them that folder for their data set.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.files import parse_json, to_json

LOCAL = "llmcompress_local"
SPLITS = ("train", "validation", "test")
RENAMED = {"good": "sentence_good", "bad": "sentence_bad", "uid": "UID"}  # BLiMP's fields where they are short
PART = "UID"  # says which of a group's tasks a document belongs to
WHOLE = "default"
PARTS_HINT = "documents of a group of tasks say in a field UID which task each belongs to, those of a task do not"


def file_of(word: str) -> tuple[str, Path | None]:
    """`NAME` or `NAME=FILE` as the name of a task and the file of its documents."""
    name, given, file = word.partition("=")
    return name, Path(os.path.expanduser(file)) if given else None


def write_group(files: Mapping[str, Path], folder: Path) -> set[str]:
    """Write the documents of each task, and a group `LOCAL` of these tasks, into `folder`.

    Returns those names whose documents belong to several tasks, so that they must be groups of the harness.
    Raises InputError where a file is not a table of documents.
    """
    members, groups = [], set()
    for number, (name, file) in enumerate(files.items()):
        data = folder / f"data-{number}"
        parts = _write_data(data, read_rows(file))
        if len(parts) > 1:
            groups.add(name)
        member = {
            "group" if name in groups else "task": name,
            "dataset_path": str(data),
            "dataset_kwargs": {"cache_dir": str(folder / "cache")},
        }
        members.append(member | ({"dataset_name": WHOLE} if parts == {WHOLE} else {}))
    (folder / f"{LOCAL}.yaml").write_text(to_json({"group": LOCAL, "task": members}), encoding="utf-8")
    return groups


def _write_data(folder: Path, rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """A data set as the `datasets` library reads it from a folder; the names of its parts."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        parts.setdefault(str(row.get(PART, WHOLE)), []).append(json.dumps(row, ensure_ascii=False))
    folder.mkdir()
    configs = []
    for number, (part, lines) in enumerate(parts.items()):
        file = f"{number}.jsonl"
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        configs.append({"config_name": part, "data_files": [{"split": split, "path": file} for split in SPLITS]})
    (folder / "README.md").write_text(f"---\n{to_json({'configs': configs})}---\n", encoding="utf-8")
    return set(parts)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Documents of a JSON-lines file; where X-labels.lst lies beside X.jsonl, its lines are their `label`.

    Raises InputError naming the line that is wrong.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        words = getattr(error, "strerror", None) or "not text"
        raise InputError(f"{path.name}: {words}", "give a JSON-lines file: --tasks NAME=FILE.jsonl") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        row = parse_json(line, f"{path.name}, line {number}")
        if not isinstance(row, dict):
            raise InputError(f"{path.name}, line {number}: not an object", "one document a line, as JSON")
        rows.append({RENAMED.get(str(key), str(key)): value for key, value in row.items()})
    if not rows:
        raise InputError(f"{path.name}: no documents", "one document a line, as JSON")
    labels = path.with_name(f"{path.stem}-labels.lst")
    return _labelled(rows, labels) if labels.is_file() else rows


def _labelled(rows: Sequence[Mapping[str, Any]], labels: Path) -> list[dict[str, Any]]:
    values = labels.read_text(encoding="utf-8").split()
    if len(values) != len(rows) or not all(value.isdigit() for value in values):
        raise InputError(f"{labels.name}: not one label for each of {len(rows)} documents", "download both files again")
    return [{**row, "label": int(value)} for row, value in zip(rows, values, strict=True)]
