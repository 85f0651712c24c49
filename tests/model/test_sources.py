"""Text from files and from the hub: what is read, and what is refused and how."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.errors import InputError, MachineError
from llmcompress.model import sources
from llmcompress.model.sources import read_documents


def read(spec: str | Path) -> list[str]:
    return list(read_documents(str(spec), "calibration")[1])


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(spec: str | Path) -> InputError:
    with pytest.raises(InputError) as caught:
        read(spec)
    assert caught.value.exit_code == 2
    assert caught.value.hint
    if isinstance(spec, Path):
        assert str(spec.parent) not in caught.value.what + caught.value.hint
    return caught.value


def test_a_text_file_is_one_document_verbatim(tmp_path: Path) -> None:
    text = "first\n\n  second \t\nthird ünï <|endoftext|> inside a line\n"
    assert read(written(tmp_path, "a.txt", text)) == [text]
    assert read_documents(str(tmp_path / "a.txt"), "calibration")[0] == "a.txt"


def test_a_separator_on_its_own_line_splits_and_blank_documents_go(tmp_path: Path) -> None:
    text = "<|endoftext|>\none\n<|endoftext|>\n \n<|endoftext|>\ntwo\nlines\n<|endoftext|>"
    assert read(written(tmp_path, "a.txt", text)) == ["one\n", "two\nlines\n"]


def test_line_ends_and_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    plain = read(written(tmp_path, "plain.txt", "one\ntwo\n"))
    assert read(written(tmp_path, "dos.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")) == plain
    assert read(written(tmp_path, "dos.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n\r\n')) == ["x"]
    assert read(written(tmp_path, "dos.json", b'\xef\xbb\xbf["x"]')) == ["x"]


def test_a_document_too_long_for_memory_goes_on_as_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_DOCUMENT", 10)
    text = "".join(f"line {i}\n" for i in range(20))
    found = read(written(tmp_path, "a.txt", text))
    assert "".join(found) == text
    assert len(found) > 5
    assert all(10 <= len(document) <= 20 for document in found[:-1])


ROWS: tuple[tuple[Any, str], ...] = (
    ("plain", "plain"),
    ({"text": "t", "content": "c", "other": "o"}, "t"),
    ({"content": "c", "other": "o"}, "c"),
    ({"body": "b", "number": 3, "nothing": None}, "b"),
    ({"text": 5, "content": "c"}, "c"),
    (
        {"id": "7", "messages": [{"role": "user", "content": "hi"}, {"role": "bot", "content": "yo"}]},
        "user: hi\nbot: yo",
    ),
    ({"messages": [{"role": "a", "content": [{"type": "text", "text": "p"}, {"type": "image"}]}]}, "a: p"),
    ({"messages": [{"role": "a", "content": None}]}, "a: "),
)
BAD_ROWS = ("{}", "[]", "3", "null", '{"a": "x", "b": "y"}', '{"text": null}', '{"messages": ["hi"]}',
            '{"messages": [{"role": "a", "content": 5}]}')  # fmt: skip


@pytest.mark.parametrize(("row", "text"), ROWS)
def test_the_text_of_a_row_is_found(row: Any, text: str, tmp_path: Path) -> None:
    assert read(written(tmp_path, "a.jsonl", f"\n{json.dumps(row)}\n\n")) == [text]
    assert read(written(tmp_path, "a.json", json.dumps([row]))) == [text]


@pytest.mark.parametrize("row", BAD_ROWS)
def test_a_row_without_text_is_named(row: str, tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", f'{{"text": "fine"}}\n{row}\n')
    assert "a.jsonl: line 2: no text field" in refusal(path).what
    assert "a.json: entry 1: no text field" in refusal(written(tmp_path, "a.json", f"[{row}]")).what


@given(documents=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1))
def test_the_three_forms_of_a_list_agree(documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("forms")
    assert read(written(folder, "a.json", json.dumps(documents))) == documents
    assert read(written(folder, "a.jsonl", "\n".join(json.dumps({"text": d}) for d in documents))) == documents
    plain = [d.replace("\0", "").replace("\r", "").replace("<|", "") + "\n" for d in documents]
    text = f"{sources.SEPARATOR}\n".join(plain)
    assert read(written(folder, "a.txt", text)) == [d for d in plain if d.strip()]


def test_damaged_json_names_the_line(tmp_path: Path) -> None:
    assert "a.jsonl: line 3: not valid JSON" in refusal(written(tmp_path, "a.jsonl", '"a"\n\n{"text": \n')).what
    assert "a.jsonl: line 1: nested" in refusal(written(tmp_path, "a.jsonl", "[" * 200_000)).what
    assert "a.json: not valid JSON" in refusal(written(tmp_path, "a.json", '["a"\n')).what
    assert "a.json: not a list" in refusal(written(tmp_path, "a.json", '{"text": "a"}')).what
    assert "line 1: half a surrogate pair" in refusal(written(tmp_path, "a.jsonl", '"\\ud800"')).what


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_binary_foreign_and_empty_files_are_refused(name: str, tmp_path: Path) -> None:
    assert "not UTF-8" in refusal(written(tmp_path, name, b"\x89PNG\r\n\x1a\n\xff")).what
    assert "binary data" in refusal(written(tmp_path, name, b"abc\0def")).what
    assert "not UTF-8" in refusal(written(tmp_path, name, "caf\u00e9".encode("latin-1"))).what
    for nothing in ("", " \n\n"):
        assert "empty" in refusal(written(tmp_path, name, nothing)).what


def test_an_undecodable_line_is_named(tmp_path: Path) -> None:
    assert "a.txt: line 3: not UTF-8 (byte 2)" in refusal(written(tmp_path, "a.txt", b"one\ntwo\nab\xff\n")).what


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_line_longer_than_the_limit_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE_BYTES", 100)
    exactly = json.dumps("x" * 97) + "\n"
    assert len(exactly) == 100
    assert len(read(written(tmp_path, name, exactly * 2))) >= 1
    assert f"{name}: line 2: longer than 100 bytes" in refusal(written(tmp_path, name, exactly + "x" * 101)).what


def test_reading_goes_no_further_than_asked(tmp_path: Path) -> None:
    lines = read_documents(str(written(tmp_path, "a.jsonl", '"one"\n"two"\nbroken')), "calibration")[1]
    assert [next(lines), next(lines)] == ["one", "two"]
    with pytest.raises(InputError, match="line 3"):
        next(lines)


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    written(tmp_path, "calibration.txt", "x")
    error = refusal(tmp_path / "calibratoin.txt")
    assert error.what == "text calibratoin.txt: no such file"
    assert error.hint == "did you mean calibration.txt?"
    assert "builtin" in refusal(tmp_path / "zzz.parquet").hint
    assert "no such file" in refusal(tmp_path / "no" / "folder.txt").what


def test_folders_and_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    assert "a folder" in refusal(tmp_path / "folder.txt").what
    assert "a folder" in refusal(tmp_path).what
    assert "an unknown kind of file" in refusal(written(tmp_path, "a.pdf", "x")).what
    refusal("")


@pytest.mark.parametrize("spec", ["wikitext2", "../a/b", "/no/such", "a/b/c", "org/name:", "org/name:a:b:c", "a b/c"])
def test_unknown_words_list_what_is_allowed(spec: str) -> None:
    error = refusal(spec)
    assert all(word in error.hint for word in ("builtin", "self", ".txt", ".jsonl", ".parquet", "org/name"))


def test_a_near_miss_names_the_word() -> None:
    assert "did you mean builtin?" in refusal("bulitin").hint


def test_self_is_not_a_source_that_can_be_read() -> None:
    assert "sampled from a model" in refusal("self").what


def test_builtin_follows_the_split() -> None:
    name, calibration = read_documents("builtin", "calibration")
    assert name == "builtin"
    assert not set(calibration) & set(read_documents("builtin", "evaluation")[1])


class Unknown(Exception):
    """Stands for the base class of the data set library's errors."""


def hub(monkeypatch: pytest.MonkeyPatch, rows: Any) -> list[dict[str, Any]]:
    """Puts a data set library in place whose every data set has these rows, or raises; returns the calls."""
    calls: list[dict[str, Any]] = []

    def load_dataset(name: str, **options: Any) -> Iterator[Any]:
        calls.append({"name": name, **options})
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row

    library = ModuleType("datasets")
    vars(library).update(load_dataset=load_dataset, exceptions=SimpleNamespace(DatasetsError=Unknown))
    monkeypatch.setitem(sys.modules, "datasets", library)
    return calls


def test_a_data_set_is_streamed_by_split_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, [{"text": "a", "other": "x"}, {"text": " ", "other": ""}, {"text": "c", "other": "z"}])
    for spec, label, texts in (
        ("org/name", "org/name:train", ["a", "c"]),
        ("org/name:train", "org/name:train", ["a", "c"]),
        ("org/name:test:other", "org/name:test:other", ["x", "z"]),
    ):
        found, documents = read_documents(spec, "calibration")
        assert (found, list(documents)) == (label, texts)
    assert [call["split"] for call in calls] == ["train", "train", "test"]
    assert all(call["streaming"] and "trust_remote_code" not in call for call in calls)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (ConnectionError("no route"), MachineError),
        (TimeoutError("slow"), MachineError),
        (Unknown("half a download"), MachineError),
        (FileNotFoundError("no such data set"), InputError),
        (ValueError("Bad split: test"), InputError),
    ],
)
def test_failures_of_the_hub_are_told_apart(
    failure: Exception, kind: type[InputError | MachineError], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, [{"text": "a"}, failure])
    with pytest.raises(kind, match=str(failure)) as caught:
        read("org/name")
    assert ("builtin needs no network" in caught.value.hint) == (kind is MachineError)


def test_wrong_columns_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, [{"body": "a", "title": "b", "n": 1}])
    assert "body, title, n" in refusal("org/name:train:text").hint
    assert "holds int" in refusal("org/name:train:n").what
    assert "row 1: no text field, found body, title, n" in refusal("org/name").what


@pytest.mark.parametrize(("spec", "module"), [("org/name", "datasets"), ("a.parquet", "pyarrow.parquet")])
def test_a_missing_extra_is_named(spec: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "a.parquet", "x")
    monkeypatch.setitem(sys.modules, module, None)
    error = refusal(spec)
    assert module.partition(".")[0] in error.what
    assert error.hint == "pip install 'llmcompress[data]'"


def test_parquet_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
    parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")
    monkeypatch.setattr(sources, "PARQUET_ROWS", 7)
    texts = [f"document {i}" for i in range(50)]
    parquet.write_table(arrow.table({"text": texts, "n": list(range(50))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == texts
    parquet.write_table(arrow.table({"n": [1, 2]}), tmp_path / "b.parquet")
    assert "b.parquet: row 1: no text field" in refusal(tmp_path / "b.parquet").what
    refusal(written(tmp_path, "half.parquet", (tmp_path / "a.parquet").read_bytes()[:300]))
