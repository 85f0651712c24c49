"""Decoding with a random Llama of 160 million parameters: tokens per second, packed and not.

    python bench/decode.py --threads 2 --json bench/results/decode-cpu.json

The shape is that of a model with 12 blocks of 768 (vocabulary 32000). Weights are rounded to the nearest code, the head
included; every variant generates the same number of tokens, greedily, after the same prompt, in turn.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from torch import nn

from llmcompress.kernels import backends, fourbit, stored
from llmcompress.kernels.codes import Codes
from llmcompress.runtime.modules import PackedLinear
from llmcompress.spec import LinearSpec

PROMPT = 16
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "tie_word_embeddings": False,
}


def rounded(weight: torch.Tensor, spec: LinearSpec) -> Codes:
    """Nearest codes of a weight."""
    if spec.kind == "nf4":
        codes, absmax = fourbit.quantize_blocks(weight, "nf4", spec.group_size)
        return Codes(codes, absmax, spec)
    grouped = weight.float().view(len(weight), -1, spec.group_size)
    half = 1 << (spec.bits - 1)
    scale = (grouped.abs().amax(2) / (half - 0.5)).to(torch.bfloat16)
    codes = (grouped / scale.float()[:, :, None]).round().clamp(-half, half - 1) + half
    return Codes(codes.view(weight.shape).to(torch.uint8), scale, spec)


def pack(model: nn.Module, specs: list[LinearSpec]) -> nn.Module:
    """Put packed linears in place of all, formats in turn."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for place, (name, module) in enumerate(linears):
        spec = specs[place % len(specs)]
        tensors = stored.tensors_of("", rounded(module.weight.data, spec))
        new = PackedLinear(spec, tensors, (module.out_features, module.in_features))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model


def fresh(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The same random model each time."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).to(dtype).eval()


def with_bitsandbytes() -> nn.Module:
    """The model as transformers loads it with bitsandbytes, nf4, the head included, its fast path on."""
    with tempfile.TemporaryDirectory() as folder:
        fresh().save_pretrained(folder)
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=[],
        )
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, dtype=torch.bfloat16
        ).eval()


def megabytes(model: nn.Module) -> float:
    """Of weights and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


@torch.no_grad()
def seconds(model: nn.Module, tokens: int) -> float:
    """Of generating some tokens one by one."""
    prompt = torch.arange(PROMPT)[None] + 100
    begin = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, min_new_tokens=tokens,
                   do_sample=False, pad_token_id=0)  # fmt: skip
    return time.perf_counter() - begin


def main() -> None:
    """Run and print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    four, three, two = (LinearSpec(bits=bits, group_size=128) for bits in (4, 3, 2))
    nf4 = LinearSpec(bits=4, group_size=64, kind="nf4")
    models = {
        "bfloat16": fresh(),
        "bitsandbytes nf4": with_bitsandbytes(),
        "llmcompress nf4": pack(fresh(), [nf4]),
        "llmcompress int4": pack(fresh(), [four]),
        "llmcompress 2, 3 and 4 bits": pack(fresh(), [two, three, four]),
        "llmcompress int4, no compiler": pack(fresh(), [four]),
    }
    if options.realtime:
        for thread in Path("/proc/self/task").iterdir():  # building the models has started those that help
            os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))
    rows = []
    for round_ in range(options.rounds + 1):
        for label, model in models.items():
            backends.use("torch_cpu" if label.endswith("compiler") else None)
            taken = seconds(model, 4 if round_ == 0 else options.tokens)
            if round_:
                rows.append({"label": label, "tokens_per_second": options.tokens / taken})
    cells = []
    for label, model in models.items():
        speeds = sorted(row["tokens_per_second"] for row in rows if row["label"] == label)
        cells.append({"label": label, "best": speeds[-1], "median": speeds[len(speeds) // 2], "MB": megabytes(model)})
        print(f"{label:32} {speeds[-1]:7.1f} tokens/s, median {cells[-1]['median']:7.1f}, {megabytes(model):6.1f} MB")
    if options.json:
        facts = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "bitsandbytes")}
        machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        facts |= {"threads": options.threads, "machine": machine, "tokens": options.tokens}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
