"""Train the demo model that ships with the package, on text that Python itself carries.

    python tools/train_demo.py --output llmcompress/demo --steps 4200

Trains a byte-level BPE tokenizer and a small Llama (8 blocks, grouped-query attention, untied
head) on the training split of `llmcompress.model.corpus`, reports bits per byte on the evaluation
split, and writes a Hugging Face directory in bfloat16. A run can be stopped and started again:
`--state` holds the last checkpoint. The same seed, steps, versions and thread count give the same model.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmcompress.model.corpus import documents

BEGIN, END, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + '\\n' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
VOCABULARY = 1536
CONTEXT_TOKENS = 512


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that loses no byte: runs of spaces and newlines stay whole."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END,
        additional_special_tokens=[USER, ASSISTANT], model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tokens_of(tokenizer: PreTrainedTokenizerFast, split: str) -> tuple[list[Tensor], int]:
    """Token ids of every file of a split, and the number of bytes they stand for."""
    found, size = [], 0
    for _, text in documents(split):
        found.append(torch.tensor(tokenizer(text + END).input_ids, dtype=torch.long))
        size += len(text.encode())
    return found, size


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=256, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, pad_token_id=1, rms_norm_eps=1e-6,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, files: list[Tensor], size: int, limit: int | None = None) -> float:
    """Mean code length of the held-out files, each read in windows with half a window of context."""
    model.eval()
    total, seen = 0.0, 0
    windows = []
    stride = CONTEXT_TOKENS // 2
    for ids in files:
        for start in range(0, max(len(ids) - 1, 1), stride):
            first = max(start - stride, 0)
            windows.append((ids[first : start + stride + 1], start - first))
    tokens = sum(len(ids) - 1 for ids in files)
    if limit:
        windows = windows[:: max(len(windows) // limit, 1)]
    for ids, skip in windows:
        logits = model(input_ids=ids[None, :-1]).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits[skip:], ids[1 + skip :], reduction="sum")
        total += float(loss)
        seen += len(ids) - 1 - skip
    model.train()
    return total / seen * tokens / size / math.log(2)


def make_optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head and norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    tables = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." not in n]
    gains = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, momentum=0.95, nesterov=True),
        torch.optim.AdamW(
            [{"params": tables, "weight_decay": 0.01}, {"params": gains, "weight_decay": 0.0}],
            lr=rate * 0.3, betas=(0.9, 0.95),
        ),
    ]  # fmt: skip


def model_card(facts: dict) -> str:
    """The card that ships with the model."""
    return f"""---
license: apache-2.0
language: [en, code]
library_name: transformers
pipeline_tag: text-generation
tags: [llama, demo]
---

# The demo model of llmcompress

A Llama of {facts["parameters"]:,} parameters, so that `llmcompress quantize demo` runs with no download: 8 blocks,
hidden size 256, 4 query heads on 2 key-value heads, SwiGLU 256, untied head, byte-level BPE of {VOCABULARY} tokens,
context {CONTEXT_TOKENS}, bfloat16. It knows Python source and Python's documentation, and nothing else.

Trained from scratch by `tools/train_demo.py` on text every Python installation carries: the source of the standard
library and the topics of `pydoc_data` (Python Software Foundation License), {facts["train_bytes"]:,} bytes of it.
Files are split into training, calibration and evaluation by a digest of their name; no file is in two splits.

| figure | value |
|---|---|
| bits per byte on the {facts["held_out_bytes"]:,} held-out bytes | {facts["bits_per_byte_evaluation"]} |
| steps x batch x context | {facts["steps"]} x {facts["batch"]} x {CONTEXT_TOKENS} tokens |
| optimizer | Muon for the matrices in the blocks, AdamW for the rest, peak rate {facts["rate"]} |
| seed, torch | {facts["seed"]}, {facts["torch"]} |

It shows that a really trained model survives the pipeline. It supports no claim about large models, and its text is not
to be relied on.
"""


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, facts: dict) -> None:
    output.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.detach().to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()}
    (output / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    model.config.dtype = torch.bfloat16
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "README.md").write_text(model_card(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--state", type=Path, default=Path("demo-training-state"))
    parser.add_argument("--steps", type=int, default=4200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="a quarter faster, needs a C++ compiler")
    parser.add_argument("--stop-after", type=int, default=None, help="stop early, for a trial")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    options.state.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer([text for _, text in documents("train")])
    train, train_bytes = tokens_of(tokenizer, "train")
    held, held_bytes = tokens_of(tokenizer, "evaluation")
    model = build_model()
    optimizers = make_optimizers(model, options.rate)
    first = 0
    saved = options.state / "last.pt.safetensors"
    if saved.exists():
        model.load_state_dict(load_file(saved))
        first = json.loads((options.state / "last.json").read_text())["step"]
    shuffle = torch.Generator().manual_seed(options.seed)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(map(len, train))
    print(
        f"{parameters} parameters, {train_bytes} bytes = {tokens} tokens to train on, {held_bytes} held out", flush=True
    )

    def batches():
        while True:  # one epoch: the files in a new order, cut at a new offset
            order = torch.randperm(len(train), generator=shuffle).tolist()
            stream = torch.cat([train[i] for i in order])
            offset = int(torch.randint(CONTEXT_TOKENS, (1,), generator=shuffle))
            rows = (len(stream) - offset - 1) // CONTEXT_TOKENS
            inputs = stream[offset : offset + rows * CONTEXT_TOKENS].view(rows, -1)
            targets = stream[offset + 1 : offset + 1 + rows * CONTEXT_TOKENS].view(rows, -1)
            mixed = torch.randperm(rows, generator=shuffle)
            for start in range(0, rows - options.batch + 1, options.batch):
                take = mixed[start : start + options.batch]
                yield inputs[take], targets[take]

    fast = torch.compile(model) if options.compile else model
    feed = batches()
    for _ in range(first):
        next(feed)
    model.train()
    began = time.time()
    for step in range(first, options.steps):
        inputs, targets = next(feed)
        progress = step / options.steps
        scale = min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.6)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("full_lr", group["lr"])
                group["lr"] = group["full_lr"] * scale
        logits = fast(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            rate = (step - first + 1) * inputs.numel() / (time.time() - began)
            print(f"step {step} loss {loss.item():.4f} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 500 == 0:
            saved.write_bytes(save({n: t.contiguous() for n, t in model.state_dict().items()}))
            (options.state / "last.json").write_text(json.dumps({"step": step + 1}))
            print(
                f"step {step + 1} held out {bits_per_byte(model, held, held_bytes, 120):.4f} bits per byte", flush=True
            )
        if options.stop_after and step + 1 >= options.stop_after:
            break
    model = model.to(torch.bfloat16).float()  # what is shipped is what is measured
    facts = {
        "bits_per_byte_evaluation": round(bits_per_byte(model, held, held_bytes), 4),
        "steps": options.steps, "batch": options.batch, "rate": options.rate, "seed": options.seed,
        "parameters": parameters, "train_bytes": train_bytes, "train_tokens": tokens,
        "held_out_bytes": held_bytes, "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(facts, indent=2))
    write_model(model, tokenizer, options.output, facts)


if __name__ == "__main__":
    main()
