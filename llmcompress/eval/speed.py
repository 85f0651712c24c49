"""How fast a model reads and writes on this machine, and what it takes in memory."""

import gc
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmcompress.eval.facts import Speed
from llmcompress.eval.loading import context_of, opened

BATCHES = (1, 8)
PROMPT_TOKENS, NEW_TOKENS = 128, 32
Side = Literal["reference", "candidate"]
SIDES: tuple[Side, Side] = ("reference", "candidate")
ROUNDS = 3  # of which the median is taken, after one that is not counted
HIGH_WATER = Path("/proc/self/clear_refs")


def resident_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones once; on an accelerator what its allocator holds."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(found.values())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def speeds(folders: tuple[Path, Path], tokens: Tensor, device: str) -> tuple[Speed, ...]:
    """Load reference and candidate as users do, in the dtype of config.json, one after the other, and time them.

    tokens  `(sequences, length)`, beginnings of which are read
    """
    found: list[Speed] = []
    for side, folder in zip(SIDES, folders, strict=True):
        model = opened(folder, device)
        found += [_speed(model, side, tokens, batch) for batch in BATCHES]
        del model
        gc.collect()
    return tuple(found)


def _speed(model: Any, side: Side, tokens: Tensor, batch: int) -> Speed:
    context = context_of(model) or PROMPT_TOKENS + NEW_TOKENS
    new = min(NEW_TOKENS, context // 2)
    prompt = min(PROMPT_TOKENS, context - new, tokens.shape[1])
    rows = tokens[torch.arange(batch) % len(tokens), :prompt].to(model.device)
    watching = _forget_peak(model.device)
    _timed(model, rows, new)
    times = [_timed(model, rows, new) for _ in range(ROUNDS)]
    return Speed(
        side=side,
        batch=batch,
        prompt_tokens=prompt,
        new_tokens=new,
        prefill_tokens_per_second=batch * prompt / statistics.median(reading for reading, _ in times),
        decode_tokens_per_second=batch * new / statistics.median(writing for _, writing in times),
        resident_bytes=resident_bytes(model),
        peak_bytes=_peak(model.device) if watching else None,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device.type,
    )


@torch.no_grad()
def _timed(model: Any, rows: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of reading a prompt, and of writing `new_tokens` one by one, greedily."""
    wait: Callable[[], object] = torch.cuda.synchronize if rows.device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    answer = model(input_ids=rows, use_cache=True)
    following = answer.logits[:, -1].argmax(-1, keepdim=True)
    wait()
    middle = time.perf_counter()
    for _ in range(new_tokens):
        cache = answer.past_key_values
        seen = following if cache is not None else rows
        answer = model(input_ids=seen, past_key_values=cache, use_cache=True)
        following = answer.logits[:, -1].argmax(-1, keepdim=True)
    wait()
    return middle - began, time.perf_counter() - middle


def _forget_peak(device: torch.device) -> bool:
    """Begin to watch for the most memory; whether that can be done here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        HIGH_WATER.write_text("5")
    except OSError:
        return False
    return True


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
