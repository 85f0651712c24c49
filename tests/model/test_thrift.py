"""No more is held than is used: tensors read in pieces, ends of the model loaded apart, large ones not in the heap."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import llama_config, save_model
from safetensors.torch import save_file

from llmcompress.errors import InputError
from llmcompress.model import checkpoint
from llmcompress.model.checkpoint import read_float, read_tensor
from llmcompress.model.heap import map_large_tensors, use_huge_pages
from llmcompress.model.needs import HOLES, PROGRAM, Stage, Stages, fit
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.preflight import check_source
from llmcompress.preflight.header import TensorEntry, read_header
from tests.forked import Forker

TOKENS = torch.tensor([[3, 14, 15, 92, 65]])


def entry_of(folder: Path, tensor: torch.Tensor) -> TensorEntry:
    save_file({"x": tensor}, folder / "x.safetensors")
    return read_header(folder / "x.safetensors")[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64])
def test_a_tensor_read_in_pieces_is_the_whole_in_float32(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 64)
    tensor = (torch.randn(7, 13) * 100).to(dtype)
    entry = entry_of(tmp_path, tensor)
    found = read_float(entry)
    assert found.dtype == (torch.float32 if dtype.is_floating_point else dtype)
    assert torch.equal(found, read_tensor(entry).to(found.dtype))


def test_pieces_are_searched_for_nan_and_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 64)
    tensor = torch.randn(100)
    tensor[77] = torch.nan
    with pytest.raises(InputError, match="NaN or infinity at index 77"):
        read_float(entry_of(tmp_path, tensor))
    entry = entry_of(tmp_path, torch.randn(100))
    with pytest.raises(InputError, match="ends inside tensor"):
        read_float(replace(entry, start=entry.start + 8, stop=entry.stop + 8))


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_loaded_where_they_are_used(tied: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", llama_config(tie_word_embeddings=tied))
    whole = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    skeleton = Skeleton.open(folder)
    embedding, head = (f() for f in (skeleton.model.get_input_embeddings, skeleton.model.get_output_embeddings))
    stream = BlockStream(skeleton)
    hidden, calls = stream.start([TOKENS])
    assert head.weight.is_meta == (not tied)
    assert not embedding.weight.is_meta
    skeleton.free_rest()
    for index in range(len(skeleton.blocks)):
        stream.pass_block(index, hidden, calls)
    logits = stream.leave(TOKENS, hidden[0])
    assert embedding.weight.is_meta == (not tied)
    assert torch.equal(logits, whole(input_ids=TOKENS).logits)
    assert torch.allclose(stream.leave(TOKENS[:, 1:3], hidden[0][:, 1:3]), logits[:, 1:3], atol=1e-5)
    assert not any(parameter.requires_grad for parameter in skeleton.model.parameters())
    skeleton.load_rest()
    assert not embedding.weight.is_meta
    assert torch.equal(skeleton.model.get_output_embeddings().weight, whole.lm_head.weight)


def test_a_tensor_that_is_missing_at_the_exit_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", llama_config(tie_word_embeddings=False))
    skeleton = Skeleton.open(folder)
    there = {name: target for name, target in skeleton.names.module_of.items() if target != "lm_head.weight"}
    skeleton.names = replace(skeleton.names, module_of=there)
    with pytest.raises(InputError, match=r"lm_head\.\w+ is missing"):
        skeleton.load_exit()


@pytest.mark.skipif(not map_large_tensors(), reason="another C library than glibc")
def test_large_tensors_stay_out_of_the_heap_whatever_was_freed(forker: Forker, tmp_path: Path) -> None:
    found = forker.run((), tmp_path, call="tests.heap_cases:large_tensors")
    assert found.returncode == 0, found.stderr


@pytest.mark.skipif(not map_large_tensors(), reason="another C library than glibc")
def test_what_comes_of_a_hessian_takes_no_more_than_is_forecast(forker: Forker, tmp_path: Path) -> None:
    found = forker.run((), tmp_path, call="tests.heap_cases:factors")
    assert found.returncode == 0, found.stderr


def test_what_the_environment_says_of_huge_pages_stays() -> None:
    asked: dict[str, str] = {}
    use_huge_pages(asked)
    assert asked == {"THP_MEM_ALLOC_ENABLE": "1"}
    asked["THP_MEM_ALLOC_ENABLE"] = "0"
    use_huge_pages(asked)
    assert asked["THP_MEM_ALLOC_ENABLE"] == "0"


def stages(more: int = 0) -> Callable[[int], Stages]:
    return lambda size: (Stage("small", {"block": 1}), Stage("big", {"x": size << 30}, 3 << 30, {"y": more}))


def test_files_come_before_smaller_batches_and_those_before_a_refusal() -> None:
    beside = PROGRAM + HOLES
    assert fit(stages(), 4, None).words(4) == ""
    free = fit(stages(), 4, (7 << 30) + beside)
    assert (free.batch_size, free.spilled, free.needed_bytes) == (4, False, (7 << 30) + beside)
    files = fit(stages(), 4, (7 << 30) + beside - 1)
    assert (files.batch_size, files.spilled, files.needed_bytes) == (4, True, (4 << 30) + beside)
    fewer = fit(stages(), 4, (4 << 30) + beside - 1)
    assert (fewer.batch_size, fewer.needed_bytes) == (2, (2 << 30) + beside)
    assert (
        fewer.words(4) == "to keep to the memory: hidden states go to files, batches of 2, so that last bits may differ"
    )
    with pytest.raises(InputError, match="big takes 1510MB"):
        fit(stages(), 4, 1 << 30)
    assert fit(stages(5 << 30), 4, (7 << 30) + beside).needed_bytes == (7 << 30) + beside  # only where it is limited
    with pytest.raises(InputError, match="too little"):
        fit(stages(5 << 30), 4, (6 << 30) + beside - 1)


def test_validated_files_are_the_ones_read(llama: Path) -> None:
    files = check_source(llama)
    name = next(iter(files.tensors))
    assert torch.equal(Skeleton.open(llama).reader.read(name).float(), read_float(files.tensors[name]))
