"""The demo model that ships: small, shaped for every feature, and really trained."""

import math

import torch

from llmcompress.hub.source import resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import TextRequest, load_tokenizer, token_batches
from llmcompress.model.trace import trace


def test_it_is_small_and_shaped_for_every_feature() -> None:
    source = resolve("demo")
    assert (source.path / "model.safetensors").stat().st_size <= 8_000_000
    assert (source.path / "README.md").is_file()
    skeleton = Skeleton.open(source.path)
    config = skeleton.config
    assert len(skeleton.blocks) >= 8
    assert config.num_key_value_heads < config.num_attention_heads
    assert not config.tie_word_embeddings
    assert all(x.rows % 64 == 0 and x.columns % 64 == 0 for x in trace(skeleton).linears)
    assert all(entry.dtype == "BF16" for entry in skeleton.files.tensors.values())
    tokenizer = load_tokenizer(source.path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|assistant|>\n")
    assert tokenizer.decode(tokenizer("def f(x):\n    return 'é'").input_ids, skip_special_tokens=True).endswith("'é'")


def test_it_has_learned_the_held_out_files() -> None:
    """At most 1.75 bits per byte on windows of the evaluation split."""
    source = resolve("demo")
    batches = token_batches(TextRequest("builtin", 16, 512, 0, "evaluation"), source.path)
    tokenizer = load_tokenizer(source.path)
    nats, size = 0.0, 0
    for tokens, logits in zip(
        batches.split(4), BlockStream(Skeleton.open(source.path)).logits(batches.split(4)), strict=True
    ):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        nats += float(loss)
        size += sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in tokens)
    assert nats / size / math.log(2) <= 1.75
