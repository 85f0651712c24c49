"""Every bad model directory is refused before any library opens it, naming the file and a remedy."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save, save_file

from llmcompress.errors import InputError
from llmcompress.model.header import read_header
from llmcompress.model.integrity import digest_source, scan
from llmcompress.model.preflight import check_source, check_tokenizer

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 4}


def tensors() -> dict[str, numpy.ndarray]:
    return {
        "a.weight": numpy.arange(32, dtype=numpy.float32).reshape(8, 4),
        "b.weight": numpy.ones((3, 5), dtype=numpy.float16),
    }


def good(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(), folder / "model.safetensors")
    return folder


def sharded(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for place, (name, value) in enumerate(tensors().items(), 1):
        save_file({name: value}, folder / f"model-0000{place}-of-00002.safetensors")
    index(folder, {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"})
    return folder


def index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def header(folder: Path, document: object, payload: bytes = b"\0" * 16, *, length: int | None = None) -> None:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    size = (len(text) if length is None else length).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(size + text + payload)


def entry(start: int, stop: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def shard(folder: Path) -> Path:
    return folder / "model.safetensors"


def cut(folder: Path, count: int) -> None:
    shard(folder).write_bytes(shard(folder).read_bytes()[:count])


def link(folder: Path, target: Path) -> None:
    shard(folder).unlink()
    shard(folder).symlink_to(target)


def outside(folder: Path) -> None:
    save_file(tensors(), folder.parent / "outside.safetensors")
    link(folder, folder.parent / "outside.safetensors")


def fifo(folder: Path) -> None:
    shard(folder).unlink()
    os.mkfifo(shard(folder))


def directory(folder: Path) -> None:
    shard(folder).unlink()
    shard(folder).mkdir()


def pickled(folder: Path) -> None:
    shard(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch PWNED'\ntR.")


def integers(folder: Path) -> None:
    save_file({"a.weight": numpy.ones((2, 2), dtype=numpy.int32)}, shard(folder))


def not_finite(folder: Path, value: float) -> None:
    broken = tensors()
    broken["a.weight"][3, 2] = value
    save_file(broken, shard(folder))


SINGLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "bad json": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "deep json": (lambda f: (f / "config.json").write_text("[" * 200_000), "config.json"),
    "NaN in json": (lambda f: (f / "config.json").write_text('{"model_type": NaN}'), "config.json"),
    "duplicate keys in config": (
        lambda f: (f / "config.json").write_text('{"model_type": "a", "model_type": "b"}'),
        "config.json",
    ),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "model_type"),
    "not causal": (lambda f: config(f, architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
    "encoder-decoder": (lambda f: config(f, is_encoder_decoder=True), "causal"),
    "already quantized": (lambda f: config(f, quantization_config={"quant_method": "gptq"}), "gptq"),
    "auto_map": (lambda f: config(f, auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "auto_map in the tokenizer": (
        lambda f: (f / "tokenizer_config.json").write_text('{"auto_map": {}}'),
        "tokenizer_config.json",
    ),
    "kernel to download": (lambda f: config(f, attn_implementation="org/kernel"), "attn_implementation"),
    "absurd depth": (lambda f: config(f, num_hidden_layers=10**9), "num_hidden_layers"),
    "negative width": (lambda f: config(f, hidden_size=-4), "hidden_size"),
    "no weights": (lambda f: shard(f).unlink(), "model.safetensors"),
    "pickle only": (pickled, "pickled"),
    "empty file": (lambda f: shard(f).write_bytes(b""), "model.safetensors"),
    "cut header": (lambda f: cut(f, 20), "model.safetensors"),
    "truncated": (lambda f: cut(f, -5), "model.safetensors"),
    "trailing bytes": (lambda f: shard(f).write_bytes(shard(f).read_bytes() + b"x"), "model.safetensors"),
    "huge header": (lambda f: header(f, {}, length=2**63), "model.safetensors"),
    "header beyond the file": (lambda f: header(f, {}, length=4000), "model.safetensors"),
    "header not json": (lambda f: header(f, b"{]"), "model.safetensors"),
    "header not a table": (lambda f: header(f, [1, 2]), "model.safetensors"),
    "duplicate tensors": (
        lambda f: header(f, b'{"a": ' + json.dumps(entry(0, 16)).encode() + b', "a": ' + b"{}}"),
        "model.safetensors",
    ),
    "overlap": (lambda f: header(f, {"a": entry(0, 16), "b": entry(8, 24)}, b"\0" * 24), "overlaps"),
    "hole": (lambda f: header(f, {"a": entry(0, 16), "b": entry(32, 48)}, b"\0" * 48), "hole"),
    "unknown dtype": (lambda f: header(f, {"a": entry(0, 16, dtype="F99")}), "F99"),
    "shape lies": (lambda f: header(f, {"a": entry(0, 16, shape=(5,))}), "needs"),
    "negative shape": (lambda f: header(f, {"a": entry(0, 16, shape=(-4,))}), "shape"),
    "product overflows": (lambda f: header(f, {"a": entry(0, 16, shape=(2**40, 2**40))}), "values"),
    "extra header field": (lambda f: header(f, {"a": entry(0, 16) | {"x": 1}}), "malformed"),
    "integer weights": (integers, "I32"),
    "link outside": (outside, "link"),
    "link loop": (lambda f: link(f, shard(f)), "link"),
    "dangling link": (lambda f: link(f, f / "nothing"), "link"),
    "fifo": (fifo, "regular"),
    "directory": (directory, "model.safetensors"),
    "NaN": (lambda f: not_finite(f, float("nan")), "index 14"),
    "infinity": (lambda f: not_finite(f, float("-inf")), "index 14"),
}
LYING: dict[str, tuple[object, str]] = {
    "traversal": ({"a.weight": "../outside/x.safetensors"}, "a.weight"),
    "absolute": ({"a.weight": "/etc/hostname"}, "a.weight"),
    "nested": ({"a.weight": "sub/x.safetensors"}, "a.weight"),
    "backslash": ({"a.weight": "..\\x.safetensors"}, "a.weight"),
    "hidden": ({"a.weight": ".x.safetensors"}, "a.weight"),
    "not safetensors": ({"a.weight": "config.json"}, "a.weight"),
    "not a name": ({"a.weight": 7}, "a.weight"),
    "empty": ({}, "weight_map"),
    "not a table": ("x", "weight_map"),
    "missing shard": ({"a.weight": "model-00003-of-00002.safetensors"}, "model-00003"),
    "tensor not there": (
        {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00001-of-00002.safetensors"},
        "b.weight",
    ),
    "tensor not named": (
        {"a.weight": "model-00001-of-00002.safetensors", "c": "model-00002-of-00002.safetensors"},
        "c",
    ),
}


def refuses(folder: Path, word: str) -> None:
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        scan(check_source(folder))
    assert time.monotonic() - began < 2
    assert caught.value.exit_code == 2
    assert word in caught.value.what
    assert caught.value.hint
    assert len(caught.value.what) + len(caught.value.hint) < 400
    assert str(folder.parent) not in caught.value.what


@pytest.mark.parametrize("fault", SINGLE)
def test_faults_of_a_single_file(fault: str, tmp_path: Path) -> None:
    folder = good(tmp_path / "model")
    damage, word = SINGLE[fault]
    damage(folder)
    refuses(folder, word)
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("fault", LYING)
def test_faults_of_an_index(fault: str, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    weight_map, word = LYING[fault]
    index(folder, weight_map)
    refuses(folder, word)


def test_a_shard_of_another_tensor_twice_is_refused(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    save_file(tensors(), folder / "model-00002-of-00002.safetensors")
    refuses(folder, "another shard")


@pytest.mark.parametrize("make", [good, sharded])
def test_a_good_directory_passes_and_agrees_with_the_library(make: Callable[[Path], Path], tmp_path: Path) -> None:
    files = check_source(make(tmp_path / "model"))
    assert set(files.tensors) == {"a.weight", "b.weight"}
    for name in files.shards:
        with safe_open(files.folder / name, "numpy") as library:
            for tensor in library.keys():  # noqa: SIM118 - not a dict
                ours = files.tensors[tensor]
                assert list(ours.shape) == library.get_slice(tensor).get_shape()
                assert ours.dtype == library.get_slice(tensor).get_dtype()
    digests = scan(files)
    assert [d.size_bytes for d in digests] == [(files.folder / name).stat().st_size for name in files.shards]
    assert digest_source(digests, files.config) != digest_source(digests, dict(files.config) | {"x": 1})


def test_hub_cache_links_are_allowed(tmp_path: Path) -> None:
    folder = good(tmp_path / "models--o--n" / "snapshots" / "abc")
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    shard(folder).rename(blobs / "123")
    shard(folder).symlink_to("../../blobs/123")
    assert set(check_source(folder).tensors) == {"a.weight", "b.weight"}


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = good(tmp_path / "model")
    check_tokenizer(folder, 1)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 3}}, "added_tokens": [{"id": 9}]}))
    check_tokenizer(folder, 10)
    with pytest.raises(InputError, match="9"):
        check_tokenizer(folder, 9)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_bytes_are_refused_or_read_alike(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any damage to a header gives InputError or a reading that still fits the file; nothing else."""
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    content = bytearray(save(tensors()))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 220)))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content))
    try:
        entries = read_header(path)
    except InputError:
        return
    assert max((e.stop for e in entries), default=path.stat().st_size) == path.stat().st_size
