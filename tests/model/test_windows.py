"""Text to token batches: windows of the tokenized text, the same every time, and no more read than needed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import llmcompress
from llmcompress.errors import InputError
from llmcompress.model import text
from llmcompress.model.corpus import documents
from llmcompress.model.text import (
    Batches,
    TextRequest,
    load_tokenizer,
    same_text,
    token_batches,
    tokenizer_digest,
)

BEGIN = "<s>"
VOCABULARY = 400


def bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BEGIN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document for _, document in documents("train")[:5]), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return tokenizer


def saved(tokenizer: Tokenizer, folder: Path, **special: str) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(bpe(), tmp_path_factory.mktemp("tokenizer") / "bpe", bos_token=BEGIN)


def request_of(spec: str | Path, samples: int = 4, sequence_length: int = 8, seed: int = 0) -> TextRequest:
    return TextRequest(str(spec), samples, sequence_length, seed, "calibration")


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def slow_windows(rows: list[str], folder: Path, request: TextRequest) -> list[list[int]]:
    """Every window that may be chosen, by concatenating everything."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    joined: list[int] = []
    for row in rows:
        if row.strip():
            joined = joined + tokenizer.encode(row).ids
    length = request.sequence_length
    joined = joined[: 4 * request.samples * length]
    return [joined[at : at + length] for at in range(0, len(joined) - length + 1, length)]


ROWS = st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, samples=st.integers(1, 4), length=st.integers(8, 12), seed=st.integers(0, 2**32))
def test_windows_are_those_of_a_slow_concatenation(
    rows: list[str], samples: int, length: int, seed: int, folder: Path, tmp_path: Path
) -> None:
    request = request_of(write_rows(tmp_path / "a.jsonl", rows), samples, length, seed)
    windows = slow_windows(rows, folder, request)
    if len(windows) < samples:
        with pytest.raises(InputError):
            token_batches(request, folder)
        return
    tokens = token_batches(request, folder).tokens
    assert tokens.dtype == torch.int64
    assert tokens.shape == (samples, length)
    rest = iter(windows)  # a subsequence: no window twice, and in ascending order
    assert all(row in rest for row in tokens.tolist())


def test_every_window_has_its_turn_and_asking_for_all_gives_all(folder: Path, tmp_path: Path) -> None:
    rows = [document[:300] for _, document in documents("calibration")[:3]]
    path = write_rows(tmp_path / "a.jsonl", rows)
    windows = slow_windows(rows, folder, request_of(path, 2, 16))
    found = {
        tuple(row) for seed in range(60) for row in token_batches(request_of(path, 2, 16, seed), folder).tokens.tolist()
    }
    assert found == {tuple(window) for window in windows}
    every = slow_windows(rows, folder, request_of(path, 1000, 16))
    assert token_batches(request_of(path, len(every), 16), folder).tokens.tolist() == every


def test_documents_begin_with_the_special_token(folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["abc def ghi"] * 16)
    length = len(load_tokenizer(folder)("abc def ghi").input_ids)
    tokens = token_batches(request_of(path, 2 * length), folder).tokens.flatten()
    assert (tokens == 0).nonzero().flatten().tolist() == list(range(0, 16 * length, length))


def test_builtin_splits_differ_in_text_and_tokens(folder: Path) -> None:
    request = request_of("builtin", 16, 64)
    calibration = token_batches(request, folder)
    evaluation = token_batches(replace(request, split="evaluation"), folder)
    assert calibration.source == "builtin"
    assert not same_text(calibration.text_digest, evaluation)
    assert not {tuple(row) for row in calibration.tokens.tolist()} & {tuple(row) for row in evaluation.tokens.tolist()}
    assert len(torch.unique(calibration.tokens)) > 50


def test_another_process_and_another_hash_seed_give_the_same(folder: Path) -> None:
    script = (
        "import sys, pathlib; from llmcompress.model.text import TextRequest, token_batches;"
        "b = token_batches(TextRequest('builtin', 16, 64, 3, 'calibration'), pathlib.Path(sys.argv[1]));"
        "print(b.digest, b.text_digest)"
    )
    root = str(Path(llmcompress.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env={"PYTHONHASHSEED": "11", "OMP_NUM_THREADS": "1"}, cwd=root, capture_output=True, text=True, check=True,
    )  # fmt: skip
    here = token_batches(request_of("builtin", 16, 64, 3), folder)
    assert found.stdout.split() == [here.digest, here.text_digest]


def test_global_random_numbers_neither_matter_nor_change(folder: Path) -> None:
    torch.manual_seed(1)
    first = token_batches(request_of("builtin"), folder)
    state = torch.get_rng_state()
    torch.rand(5)
    second = token_batches(request_of("builtin"), folder)
    assert first.digest == second.digest
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    assert token_batches(request_of("builtin", seed=1), folder).digest != first.digest


def test_the_text_digest_follows_the_text_alone(folder: Path, tmp_path: Path) -> None:
    rows = [document for _, document in documents("calibration")[:4]]
    few = token_batches(request_of(write_rows(tmp_path / "a.jsonl", rows), 1), folder)
    many = token_batches(request_of(tmp_path / "a.jsonl", 50, 16, seed=9), folder)
    assert few.digest != many.digest
    assert same_text(few.text_digest, many)
    changed = [*rows[:-1], rows[-1][:-1] + "~"]
    moved = [rows[0] + rows[1][:1], rows[1][1:], *rows[2:]]
    for other in (changed, moved):
        assert not same_text(
            few.text_digest, token_batches(request_of(write_rows(tmp_path / "b.jsonl", other)), folder)
        )


def test_reading_stops_when_enough_was_seen(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "a.jsonl", [f"row number {i} of many" for i in range(100)])
    path.write_text(path.read_text() + "\n{broken")
    monkeypatch.setattr(text, "DIGEST_BYTES", 100)
    near = token_batches(request_of(path, 2), folder)
    assert token_batches(request_of(path, 8), folder).text_digest == near.text_digest
    with pytest.raises(InputError, match="line 101"):
        token_batches(request_of(path, 200), folder)


@pytest.mark.parametrize("head", ["", "\t" * 30_000], ids=["plain", "few tokens at first"])
def test_only_the_beginning_of_a_long_document_is_tokenized(
    head: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = head + "".join(document for _, document in documents("calibration")[:12])
    (tmp_path / "a.txt").write_text(document)
    tokenizer = bpe()
    tokenizer.normalizer = normalizers.Replace("\t", "")
    place = saved(tokenizer, tmp_path / "tokenizer", bos_token=BEGIN)
    loaded, seen = load_tokenizer(place), list[int]()

    def spy(piece: str, **options: Any) -> Any:
        seen.append(len(piece))
        return loaded(piece, **options)

    monkeypatch.setattr(text, "load_tokenizer", lambda _: spy)
    request = request_of(tmp_path / "a.txt", 8)
    tokens = token_batches(request, place).tokens.tolist()
    assert max(seen) < len(document)
    assert all(row in slow_windows([document], place, request) for row in tokens)


def test_a_truncating_tokenizer_does_not_shorten_documents(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.enable_truncation(16)
    place = saved(tokenizer, tmp_path / "tokenizer", bos_token=BEGIN)
    (tmp_path / "a.txt").write_text("some words that go on " * 100)
    assert token_batches(request_of(tmp_path / "a.txt", 20), place).tokens.shape == (20, 8)


def test_too_short_text_says_how_much_there_is_and_what_would_do(folder: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ["some words that go on " * 30])
    tokens = len(load_tokenizer(folder)("some words that go on " * 30).input_ids)
    for samples, length in ((128, 512), (64, 16)):
        with pytest.raises(InputError) as caught:
            token_batches(request_of(path, samples, length), folder)
        needed = f"{samples * length} are needed ({samples} x {length})"
        assert caught.value.what == f"calibration text a.jsonl has {tokens} tokens, {needed}"
        assert "fewer samples or shorter sequences" in caught.value.hint
        said = {word.split("=")[0]: int(word.split("=")[1]) for word in caught.value.hint.split() if "=" in word}
        fitting = request_of(path, said["calibration.samples"], said["calibration.sequence_length"])
        assert token_batches(fitting, folder).tokens.numel() > tokens // 2
    with pytest.raises(InputError, match="evaluation text") as caught:
        token_batches(replace(request_of(path, 99), split="evaluation", sized_by="options"), folder)
    assert "--samples" in caught.value.hint


def test_a_tokenizer_that_drops_everything_leaves_too_little(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.post_processor = processors.ByteLevel()
    tokenizer.normalizer = normalizers.Replace(Regex("[\\s\\S]"), "")
    place = saved(tokenizer, tmp_path / "tokenizer")
    with pytest.raises(InputError, match="has 0 tokens, 32 are needed"):
        token_batches(request_of("builtin"), place)


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (-1, 8), (1, 7), (1, 0), (1, -8)])
def test_impossible_sizes_are_refused(samples: int, length: int, folder: Path) -> None:
    with pytest.raises(InputError, match=f"{samples} x {length} tokens"):
        token_batches(request_of("builtin", samples, length), folder)


def damages() -> dict[str, str]:
    return {"cut": '{"version": "1.0", "added', "list": "[]", "strange": '{"model": {"type": "Foo"}}', "none": ""}


@pytest.mark.parametrize("kind", [*damages(), "missing", "merges"])
def test_a_damaged_tokenizer_is_an_input_error(kind: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "model"
    place.mkdir()
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    if kind == "missing":
        for path in place.iterdir():
            path.unlink()
    elif kind == "merges":  # the library raises a plain Exception for this one
        document = json.loads((place / "tokenizer.json").read_text())
        document["model"]["merges"].append(["no", "such"])
        (place / "tokenizer.json").write_text(json.dumps(document))
    else:
        (place / "tokenizer.json").write_text(damages()[kind])
    with pytest.raises(InputError, match="model: cannot load the tokenizer") as caught:
        load_tokenizer(place)
    assert str(tmp_path) not in caught.value.what
    assert ("tokenizer.json" in caught.value.what) == (kind != "missing")


def test_the_tokenizer_digest_follows_names_and_bytes(folder: Path, tmp_path: Path) -> None:
    first = tokenizer_digest(folder)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert tokenizer_digest(tmp_path) != first
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not a tokenizer file")
    assert tokenizer_digest(tmp_path) == first
    with (tmp_path / "tokenizer.json").open("ab") as stream:
        stream.write(b" ")
    assert tokenizer_digest(tmp_path) != first


def test_batches_split_in_order_and_digest_shape_and_ids() -> None:
    tokens = torch.arange(40).view(5, 8)
    batches = Batches(tokens, "builtin", "")
    parts = batches.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat(parts), tokens)
    assert Batches(tokens.clone(), "other", "x").digest == batches.digest
    assert Batches(tokens.T.contiguous().T, "", "").digest == batches.digest
    assert Batches(tokens.view(8, 5), "", "").digest != batches.digest
    assert Batches(tokens.flip(0), "", "").digest != batches.digest
    assert Batches(tokens[:0], "", "").split(2) == []
