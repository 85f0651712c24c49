"""Atomic writes and strict readers."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import InputError, MachineError
from llmcompress.files import commit_bytes, file_digest, parse_json, parse_yaml, read_json, read_small
from llmcompress.recipes import Recipe, load_recipe, recipe_names


def test_a_commit_replaces_at_once_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "a"
    commit_bytes(path, b"one")
    before = file_digest(path)
    commit_bytes(path, b"t", b"wo")
    assert path.read_bytes() == b"two"
    assert file_digest(path) != before
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_refused_commit_changes_nothing(tmp_path: Path) -> None:
    with pytest.raises(MachineError):
        commit_bytes(tmp_path / "none" / "a", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MachineError):
        commit_bytes(tmp_path / "folder", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', "NaN", "[" * 100_000, "{", '{"a": Infinity}', "1e999",
     "9" * 5000, b"\xff\xfe[\x001\x00]\x00", b"\xef\xbb\xbf1"],
)  # fmt: skip
def test_json_is_strict(text: str | bytes) -> None:
    with pytest.raises(InputError, match=r"x\.json"):
        parse_json(text, "x.json")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)
    )
)
@settings(max_examples=60)
def test_json_that_is_fine_is_read(value: object) -> None:
    assert parse_json(json.dumps(value), "x") == value


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\na: 2",
        "a: &x [1]\nb: *x",
        "a: !!python/object/apply:os.system ['true']",
        "a: [",
        "1: 2",
        "? [a]\n: b",
        "a: !!str 5",
        "!!map {a: 1}",
        "a: !x [1]",
        "a: ! 1",
        "[" * 5000,
        "a: " + "9" * 5000,
    ],
)
def test_yaml_is_strict(text: str) -> None:
    with pytest.raises(InputError, match=r"x\.yaml"):
        parse_yaml(text, "x.yaml")


def test_small_files_are_read_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b"[1]")
    assert read_json(path, 3) == [1]
    with pytest.raises(InputError, match="more than 2 bytes"):
        read_json(path, 2)
    os.mkfifo(tmp_path / "pipe")
    for odd in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / "none"):
        with pytest.raises(InputError, match=odd.name):
            read_small(odd)
    with pytest.raises(InputError, match="pipe"):
        load_recipe(str(tmp_path / "pipe"))


@pytest.mark.parametrize("name", recipe_names())
def test_ready_made_recipes_are_valid_and_described(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert len(recipe.description) > 20


def test_changes_reach_the_recipe_and_its_digest() -> None:
    changed = load_recipe("balanced", ("plan.group_size=64", "quantize.damp=0.05", "plan.bits=[4]", "seed=3"))
    assert (changed.plan.group_size, changed.quantize.damp, changed.plan.bits, changed.seed) == (64, 0.05, (4,), 3)
    assert changed.digest() != Recipe().digest()


@given(st.text(max_size=40))
@settings(max_examples=150)
def test_any_change_is_applied_or_refused(text: str) -> None:
    try:
        load_recipe("fast", (text,))
    except InputError as error:
        assert error.hint  # noqa: PT017 - success is fine too
