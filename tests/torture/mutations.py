"""Thousands of mutated shards, indexes, configs and recipes: refused with advice, or read as they were meant."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import numpy
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from llmcompress.errors import InputError, one_line
from llmcompress.preflight import check_source
from llmcompress.preflight.header import read_header
from llmcompress.recipes import load_recipe, recipe_names, recipe_text
from tests.preflight import attacks
from tests.torture.jobs import Tally

DEADLINE_MS = 2000
SMALL = {"a.weight": numpy.arange(32, dtype="f4").reshape(8, 4), "b.weight": numpy.ones((3, 5), dtype="f2")}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
NAMES = st.sampled_from([*attacks.tensors(), "", "x", "../x", "__metadata__"])
TARGETS = st.sampled_from([attacks.FIRST, attacks.SECOND, "../x.safetensors", "/etc/hostname", "x.bin"]) | VALUES
Property = Callable[[Path, st.DataObject], str]


def _bytes(data: st.DataObject, content: bytes, within: int) -> bytes:
    """Some bytes replaced, inserted or cut out, and sometimes the end cut off."""
    found = bytearray(content)
    for _ in range(data.draw(st.integers(1, 5))):
        place = data.draw(st.integers(0, max(min(len(found), within) - 1, 0)))
        patch = data.draw(st.binary(max_size=4))
        found[place : place + data.draw(st.integers(0, 4))] = patch
    return bytes(found[: data.draw(st.integers(0, len(found)))] if data.draw(st.integers(0, 4)) == 0 else found)


def shard(folder: Path, data: st.DataObject) -> str:
    """A shard that is read is read as safetensors reads it."""
    path = folder / "mutated.safetensors"
    path.write_bytes(_bytes(data, save(SMALL), data.draw(st.sampled_from((8, 230, 10_000)))))
    try:
        entries = read_header(path)
    except InputError as error:
        return _told(error)
    try:
        with safe_open(path, "numpy") as library:
            names = set(library.keys())
    except SafetensorError:  # we may know a dtype or a size of names less or more than it does
        names = {entry.name for entry in entries}
    if names != {entry.name for entry in entries}:
        raise AssertionError(f"read {entries}, safetensors reads {names}")
    return "read"


def index(folder: Path, data: st.DataObject) -> str:
    """An index that is followed leads to plain shards beside it."""
    path = folder / attacks.INDEX
    document = {
        "metadata": {},
        "weight_map": attacks.weight_map() | data.draw(st.dictionaries(NAMES, TARGETS, max_size=3)),
    }
    text = json.dumps(document).encode()
    path.write_bytes(text if data.draw(st.booleans()) else _bytes(data, text, len(text)))
    try:
        found = check_source(folder)
    except InputError as error:
        return _told(error)
    if {entry.path.parent for entry in found.tensors.values()} != {folder}:
        raise AssertionError("it reads files elsewhere")
    return "read"


def config(folder: Path, data: st.DataObject) -> str:
    """A config that is taken asks for no more than the weights can hold."""
    keys = st.sampled_from([*attacks.CONFIG, "text_config", "quantization_config", "pad_token_id", "rope_parameters"])
    changed = attacks.CONFIG | data.draw(st.dictionaries(keys, VALUES, max_size=3))
    text = json.dumps(changed).encode()
    (folder / "config.json").write_bytes(text if data.draw(st.booleans()) else _bytes(data, text, len(text)))
    try:
        found = check_source(folder)
    except InputError as error:
        return _told(error)
    if (found.config.get("num_hidden_layers") or 0) > len(found.tensors):
        raise AssertionError("a model deeper than its weights is taken")
    return "read"


def recipe(folder: Path, data: st.DataObject) -> str:
    """A recipe that is taken says the same when it is written out and read again."""
    path = folder / "recipe.yaml"
    text = recipe_text(data.draw(st.sampled_from(recipe_names())))[0].encode()
    if data.draw(st.booleans()):
        document = yaml.safe_load(text)
        section = data.draw(st.sampled_from([*document]))
        inside = document[section] if isinstance(document[section], dict) else document
        inside[data.draw(st.sampled_from([*inside]) | st.text(max_size=9))] = data.draw(VALUES)
        text = yaml.safe_dump(document).encode()
    path.write_bytes(_bytes(data, text, len(text)) if data.draw(st.booleans()) else text)
    try:
        found = load_recipe(str(path))
    except InputError as error:
        return _told(error)
    path.write_text(yaml.safe_dump(found.model_dump(mode="json")))
    if load_recipe(str(path)) != found:
        raise AssertionError("it does not survive being written out")
    return "read"


def _told(error: InputError) -> str:
    lines = error.what.splitlines()
    if not error.hint or not lines or any(one_line(line) != line or len(line) > 400 for line in lines):
        raise AssertionError(f"a refusal without advice, or one that cannot be printed: {error.what!r} {error.hint!r}")
    return "refused"


PROPERTIES: dict[str, Property] = {"shard": shard, "index": index, "config": config, "recipe": recipe}


def mutations(scratch: Path, times: int, seed: int) -> Tally:
    """`times` documents, a quarter of each kind."""
    tally = Tally("mutated shards, indexes, configs, recipes")
    for kind, check in PROPERTIES.items():
        folder = attacks.good(scratch / f"mutated-{kind}")
        if kind == "index":
            attacks.split(folder)
        try:
            _run(kind, check, folder, tally, times=times // len(PROPERTIES), seed=seed)
        except (Exception, ExceptionGroup) as error:  # noqa: BLE001 - whatever it is, it is what is looked for
            tally.wrong(f"{kind}: {type(error).__name__}: {str(error)[:600]}")
    return tally


def _run(kind: str, check: Property, folder: Path, tally: Tally, *, times: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @settings(max_examples=times, deadline=DEADLINE_MS, database=None, suppress_health_check=[*HealthCheck])
    @given(data=st.data())
    def every(data: Any) -> None:
        tally.add(f"{kind} {check(folder, data)}")

    every()
    if os.listdir(folder.parent).count("PWNED"):
        tally.wrong(f"{kind}: code ran")
