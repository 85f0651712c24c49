"""Every bad model directory is refused before any library opens it, naming the file and a remedy."""

import json
import time
from pathlib import Path

import attacks
import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save, save_file

from llmcompress.errors import InputError, Refused
from llmcompress.model.integrity import digest_source, scan
from llmcompress.preflight import check_source
from llmcompress.preflight.header import read_header


@pytest.mark.parametrize("fault", attacks.FAULTS | attacks.WEIGHTS)
def test_a_fault_is_refused_at_once_with_the_file_and_a_remedy(fault: str, tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    check_source(folder)
    made = (attacks.FAULTS | attacks.WEIGHTS)[fault]
    made.damage(folder)
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        scan(check_source(folder))
    assert time.monotonic() - began < 2
    assert caught.value.exit_code == 2
    assert made.word in caught.value.what
    assert caught.value.hint
    lines = caught.value.what.splitlines()
    assert all(0 < len(line) < 300 and line.isprintable() for line in lines)
    assert str(tmp_path) not in caught.value.what + caught.value.hint
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize("fault", [name for name, fault in attacks.FAULTS.items() if fault.plain])
def test_what_is_only_wrong_in_a_plain_model_is_allowed_in_a_packed_one(fault: str, tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    attacks.FAULTS[fault].damage(folder)
    check_source(folder, packed=True)


def test_all_faults_are_found_at_once(tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    attacks.split(folder, {"x": attacks.FIRST})
    attacks.config(folder, hidden_size=-1, auto_map={}, num_attention_heads="2", dtype="load")
    attacks.fifo(folder / "merges.txt")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(Refused) as caught:
        check_source(folder)
    found = [finding.what for finding in caught.value.findings]
    for word in ("hidden_size", "auto_map", "num_attention_heads", "dtype", "merges.txt", "generation_config", "'x'"):
        assert sum(word in what for what in found) == 1, word
    assert len(found) == 7
    assert caught.value.what.splitlines() == found


def test_all_faults_of_a_header_are_found_at_once(tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    names = list(attacks.tensors())[:3]
    attacks.edited(folder, lambda d: [d[name].update(dtype="F99") for name in names])
    with pytest.raises(Refused) as caught:
        read_header(attacks.shard(folder))
    assert len(caught.value.findings) == 3


@pytest.mark.parametrize("whole", [True, False])
def test_a_good_directory_passes_and_agrees_with_the_library(whole: bool, tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    attacks.adapter(folder)
    if not whole:
        attacks.split(folder)
    files = check_source(folder)
    assert set(files.tensors) == set(attacks.tensors())
    for path in files.paths:
        with safe_open(path, "numpy") as library:
            for tensor in library.keys():  # noqa: SIM118 - not a dict
                ours = files.tensors[tensor]
                assert list(ours.shape) == library.get_slice(tensor).get_shape()
                assert ours.dtype == library.get_slice(tensor).get_dtype()
    digests = scan(files)
    assert [d.size_bytes for d in digests] == [path.stat().st_size for path in files.paths]
    assert digest_source(digests, files.config) != digest_source(digests, dict(files.config) | {"x": 1})


def test_hub_cache_links_are_allowed(tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "models--o--n" / "snapshots" / "abc")
    blobs = tmp_path / "models--o--n" / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert set(check_source(folder).tensors) == set(attacks.tensors())


def test_files_that_nobody_reads_may_be_anything(tmp_path: Path) -> None:
    folder = attacks.good(tmp_path / "model")
    for name in ("pytorch_model.bin", "modeling_evil.py", "optimizer.pt"):
        (folder / name).write_bytes(attacks.PICKLE)
    attacks.link(folder / "notes", Path("/etc"))
    attacks.fifo(folder / "pipe")
    (folder / "chat_template.jinja").write_text(attacks.HOSTILE)
    began = time.monotonic()
    check_source(folder)
    assert time.monotonic() - began < 1


def test_the_shipped_model_passes() -> None:
    import llmcompress

    assert check_source(Path(llmcompress.__file__).parent / "demo").shards == ("model.safetensors",)


def test_a_header_of_a_thousand_tensors_takes_less_than_50_ms(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    one = numpy.ones((2, 2), dtype=numpy.float32)
    save_file({f"model.layers.{n // 9}.self_attn.q_proj.{n % 9}.weight": one for n in range(1000)}, path)
    times = []
    for _ in range(3):
        began = time.process_time()
        assert len(read_header(path)) == 1000
        times.append(time.process_time() - began)
    assert min(times) < 0.05


SMALL = {"a.weight": numpy.arange(32, dtype="f4").reshape(8, 4), "b.weight": numpy.ones((3, 5), dtype="f2")}


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_mutated_bytes_are_refused_or_read_alike(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any damage to a header gives InputError or a reading that still fits the file; nothing else."""
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    content = bytearray(save(SMALL))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 220)))
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content))
    try:
        entries = read_header(path)
    except InputError:
        return
    assert max((e.stop for e in entries), default=path.stat().st_size) == path.stat().st_size


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*attacks.CONFIG, "text_config", "quantization_config", "pad_token_id", "rope_parameters"])


@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3), packed=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_config_is_refused_or_fits_the_weights(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[str, object], packed: bool
) -> None:
    """Nothing a config.json says ends in anything but a refusal, or a model no larger than the file's tensors."""
    folder = tmp_path_factory.getbasetemp() / "configured"
    if not folder.exists():
        attacks.good(folder)
    attacks.config(folder, **changes)
    try:
        found = check_source(folder, packed=packed)
    except InputError as error:
        assert error.hint  # noqa: PT017 - success is fine too
        return
    largest = max(max(entry.shape) for entry in found.tensors.values())
    assert (found.config["hidden_size"] or 0) <= largest
    assert (found.config["num_hidden_layers"] or 0) <= len(found.tensors)
    json.dumps(dict(found.config))
