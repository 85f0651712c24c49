"""Decoding on a GPU with a random model of Llama-2-7B's shape: tokens per second, and the part of the physical limit.

    python bench/decode_gpu.py --json OUT [--formats bf16,int4,...] [--blocks 32] [--context 512]

Blocks and linears are those of transformers and of `llmcompress.load`; a block is compiled once, and a whole step, from
token to next token, is one captured graph with a static cache. The limit is the bytes a step must read (weights, head,
keys and values of the context) over the copy bandwidth measured in the same process. The head stays in bfloat16.
"""

import argparse
import gc
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import triton
from decode import rounded
from gpu_formats import FORMATS
from torch import Tensor, nn

from llmcompress.kernels import stored
from llmcompress.runtime.modules import PackedLinear
from llmcompress.runtime.siblings import introduce
from llmcompress.spec import LinearSpec

STEPS, ROUNDS, WARM = 32, 5, 3


def fresh(blocks: int, context: int) -> nn.Module:
    """A random model in bfloat16; every block believes to be the first, so that they share one compiled program."""
    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=blocks, num_attention_heads=32,
        max_position_embeddings=max(context, 2048), attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0
    return model.requires_grad_(False)


def pack(model: nn.Module, spec: LinearSpec) -> None:
    """Packed linears in the blocks; those of one shape hold the same codes, in memory of their own."""
    made: dict[tuple[int, int], dict[str, Tensor]] = {}
    for layer in model.model.layers:
        for name, linear in [(n, m) for n, m in layer.named_modules() if isinstance(m, nn.Linear)]:
            size = (linear.out_features, linear.in_features)
            if size not in made:
                made[size] = stored.tensors_of("", rounded(linear.weight.data.float(), spec))
            new = PackedLinear(spec, {part: tensor.cuda() for part, tensor in made[size].items()}, size)
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, new)
        introduce(layer)
        for new in [module for module in layer.modules() if isinstance(module, PackedLinear)]:
            new.settle(torch.zeros((1, new.in_features), dtype=torch.bfloat16, device="cuda"))


def step_of(model: nn.Module, context: int, compiled: bool) -> tuple[Callable[[], None], Callable[[], None], Tensor]:
    """A step that writes the next token over the last one, something to start anew, and the token."""
    inner, token = model.model, torch.full((1, 1), 7, device="cuda")
    caches = [transformers.StaticCache(config=model.config, max_cache_len=context) for _ in inner.layers]
    places = torch.arange(context, device="cuda")

    def block(layer: nn.Module, hidden: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor], cache: object) -> Tensor:
        found: Tensor = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
        return found

    run = torch.compile(block, fullgraph=True) if compiled else block

    @torch.no_grad()
    def step() -> None:
        position = caches[0].layers[0].cumulative_length.to("cuda")
        hidden = inner.embed_tokens(token)
        rotary = inner.rotary_emb(hidden, position.view(1, 1))
        mask = (places <= position).view(1, 1, 1, -1)
        for layer, cache in zip(inner.layers, caches, strict=True):
            hidden = run(layer, hidden, mask, rotary, cache)
        token.copy_(model.lm_head(inner.norm(hidden)).argmax(-1))

    def again() -> None:
        token.fill_(7)
        for cache in caches:
            cache.layers[0].cumulative_length.zero_()

    return step, again, token


def captured(step: Callable[[], None], again: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The step as a graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(WARM):
            step()
    torch.cuda.synchronize()
    again()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def milliseconds(graph: torch.cuda.CUDAGraph, again: Callable[[], None]) -> float:
    """Median time of a step over some rounds."""
    found = []
    for _ in range(ROUNDS):
        again()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(STEPS):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / STEPS)
    return statistics.median(found)


def bytes_read(model: nn.Module, context: int) -> int:
    """Of a step: what every linear keeps on the GPU, and the cache, which a static one is read whole."""
    total = 0
    for module in model.modules():
        if isinstance(module, PackedLinear):
            total += sum(t.numel() * t.element_size() for t in module._working()[1] if t.ndim > 1)
        elif isinstance(module, nn.Linear):
            total += module.weight.numel() * module.weight.element_size()
    return int(total) + model.config.num_hidden_layers * 2 * context * model.config.hidden_size * 2


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    source = torch.randn(1 << 28, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return 2 * source.numel() * 2 / statistics.median(times)


def measure(name: str, options: argparse.Namespace, bandwidth: float) -> dict[str, object]:
    """One format."""
    model = fresh(options.blocks, options.context)
    if name != "bf16":
        pack(model, FORMATS[name])
    gc.collect()
    torch.cuda.empty_cache()
    step, again, token = step_of(model, options.context, not options.eager)
    graph = captured(step, again)
    taken, size = milliseconds(graph, again), bytes_read(model, options.context)
    again()
    first = []
    for _ in range(4):
        graph.replay()
        first.append(int(token))
    floor = size / bandwidth * 1e3
    print(f"{name:<6} {taken:7.3f} ms a token, {1e3 / taken:7.1f} tokens/s, {floor / taken:6.1%} of the limit, "
          f"{torch.cuda.memory_allocated() / 1e9:.2f} GB, {first}", flush=True)  # fmt: skip
    torch.compiler.reset()
    return {"format": name, "milliseconds": taken, "tokens_per_second": 1e3 / taken, "bytes": size,
            "floor": floor / taken, "allocated": torch.cuda.memory_allocated(), "first": first}  # fmt: skip


def main() -> None:
    """Run and print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bf16,int4,int3,int2,int8,nf4")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--eager", action="store_true", help="blocks as they are, not compiled")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use")
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, {bandwidth / 1e12:.2f} TB/s")
    facts = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    facts |= {"transformers": transformers.__version__, "copy": bandwidth, "blocks": options.blocks}
    rows = []
    for name in options.formats.split(","):
        rows.append(measure(name, options, bandwidth))
        if options.json:
            found = {**facts, "context": options.context, "compiled": not options.eager, "formats": rows}
            options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
