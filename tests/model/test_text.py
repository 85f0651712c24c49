"""Text to tokens: the same everywhere, windows of the real text, and clear refusals."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXT, llama_config
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import InputError
from llmcompress.model.corpus import documents, split_of
from llmcompress.model.text import (
    Batches,
    TextRequest,
    load_tokenizer,
    sample_tokens,
    token_batches,
    tokenizer_digest,
    unseen_tokens,
)


def request(spec: object, samples: int = 4, length: int = 16, seed: int = 0) -> TextRequest:
    return TextRequest(str(spec), samples, length, seed, "calibration")


def test_windows_are_cut_from_the_joined_documents(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    source = random.Random(0)
    path.write_text("\n<|endoftext|>\n".join("".join(source.choices("adfhjlmnotu ", k=200)) for _ in range(2)))
    found = token_batches(request(path, samples=5), llama)
    tokenizer = load_tokenizer(llama)
    ids = [i for part in path.read_text().split("<|endoftext|>\n") for i in tokenizer(part).input_ids]
    windows = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    rows = found.tokens.tolist()
    assert len({tuple(window) for window in windows}) == len(windows)
    assert all(row in windows for row in rows)
    assert [windows.index(row) for row in rows] == sorted({windows.index(row) for row in rows})


def test_same_tokens_in_another_process_and_after_other_random_numbers(llama: Path, text_file: Path) -> None:
    torch.manual_seed(123)
    digest = token_batches(request(text_file), llama).digest
    torch.rand(10)
    assert token_batches(request(text_file), llama).digest == digest
    code = (
        "import sys; from pathlib import Path; from llmcompress.model.text import *;"
        "print(token_batches(TextRequest(sys.argv[1], 4, 16, 0, 'calibration'), Path(sys.argv[2])).digest)"
    )
    words = [sys.executable, "-W", "ignore", "-c", code, str(text_file), str(llama)]
    found = subprocess.run(words, capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7", "PATH": ""})
    assert found.stdout.strip() == digest
    assert token_batches(request(text_file, seed=1), llama).digest != digest


def test_every_form_of_file_gives_the_same_text(llama: Path, tmp_path: Path) -> None:
    parts = [TEXT * 3, TEXT * 2, "more " * 50]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(parts))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"id": 1, "text": p}) for p in parts))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"story": p}) for p in parts))
    (tmp_path / "a.json").write_text(json.dumps(parts))
    found = {token_batches(request(tmp_path / n), llama).digest for n in ("a.txt", "a.jsonl", "b.jsonl", "a.json")}
    assert len(found) == 1


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("a.txt", b"", "empty"),
        ("a.txt", b"caf\xe9 au lait", "UTF-8"),
        ("a.txt", b"nul \x00 byte", "binary"),
        ("a.txt", b"short", "needed"),
        ("a.jsonl", b'{"text": "x"}\n{broken', "line 2"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', "line 1"),
        ("a.json", b'{"text": "x"}', "list"),
        ("a.pdf", b"x", "kind"),
    ],
)
def test_bad_text_is_refused(name: str, content: bytes, word: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        token_batches(request(tmp_path / name), llama)
    assert word in caught.value.what
    assert str(tmp_path) not in caught.value.what


def test_missing_and_unknown_sources_are_refused(llama: Path, tmp_path: Path) -> None:
    for spec in (tmp_path / "none.txt", "builtn", "/x/y"):
        with pytest.raises(InputError):
            token_batches(request(spec), llama)


@given(st.lists(st.text("abcdefgh \n", min_size=30, max_size=80), min_size=3, max_size=6), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_no_window_is_used_twice(
    llama: Path, tmp_path_factory: pytest.TempPathFactory, parts: list[str], seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "parts.json"
    numbered = [f"{place} {part}" for place, part in enumerate(parts)]
    path.write_text(json.dumps(numbered))
    found = token_batches(request(path, samples=5, length=8, seed=seed), llama)
    ids = [i for part in numbered for i in load_tokenizer(llama)(part).input_ids]
    windows = [ids[i : i + 8] for i in range(0, len(ids) - 7, 8)]
    for row in found.tokens.tolist():
        assert row in windows
        windows.remove(row)


def test_splits_share_no_file() -> None:
    names = {split: {name for name, _ in documents(split)} for split in ("train", "calibration", "evaluation")}  # type: ignore[arg-type]
    assert all(len(found) > 5 for found in names.values())
    assert not names["train"] & names["evaluation"]
    assert not names["calibration"] & names["evaluation"]
    assert split_of("json/decoder.py") == split_of("json/decoder.py")


def test_batches_split_in_order() -> None:
    batches = Batches(torch.arange(24).view(6, 4), "x", "y")
    assert torch.equal(torch.cat(batches.split(4)), batches.tokens)
    assert [len(part) for part in batches.split(4)] == [4, 2]


@pytest.mark.parametrize(("vocabulary", "most"), [(100, 1000), (100, 20), (24, 1000), (25, 7), (27, 9)])
def test_unseen_tokens_are_those_a_text_lacks(vocabulary: int, most: int) -> None:
    batches = Batches(torch.arange(24).view(6, 4), "x", "y").split(4)
    found = unseen_tokens(batches, vocabulary, most=most)
    ids = [token for batch in found for row in batch.tolist() for token in row[1:]]
    absent = set(range(24, vocabulary))
    assert set(ids) <= absent
    assert min(len(absent), most) / 2 <= len(set(ids)) <= most
    assert len(absent) > most or set(ids) == absent
    assert all(batch.shape[1] == min(4, len(set(ids)) + 1) and len(batch) <= 4 for batch in found)
    assert all(bool((batch[:, 0] == 0).all()) for batch in found)
    assert len(ids) < len(set(ids)) + 4
    assert len(ids) < 8 or ids != sorted(ids)


def test_tokenizer_digest_sees_every_byte(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes())
    one = tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((llama / "tokenizer.json").read_bytes() + b" ")
    assert tokenizer_digest(tmp_path) != one


def test_text_sampled_from_the_model_follows_it(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama_config()).eval()
    tokenizer = load_tokenizer(llama)
    one = sample_tokens(model, tokenizer, samples=3, sequence_length=12, seed=1)
    torch.rand(5)
    assert torch.equal(one, sample_tokens(model, tokenizer, samples=3, sequence_length=12, seed=1))
    assert not torch.equal(one, sample_tokens(model, tokenizer, samples=3, sequence_length=12, seed=2))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[7] = 0.0
    rigged = model.lm_head.register_forward_hook(
        lambda _, __, out: torch.where(torch.arange(96) == 7, 50.0, -50.0).expand_as(out)
    )
    found = sample_tokens(model, tokenizer, samples=2, sequence_length=8, seed=0)
    rigged.remove()
    assert found[:, 0].tolist() == [tokenizer.bos_token_id] * 2
    assert found[:, 1:].unique().tolist() == [7]
