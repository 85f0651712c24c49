"""The sampling sweep: greedy continuations of both models side by side, and what temperatures do to the distance.

After "Understanding the Impact of Post-Training Quantization on Large Language Models" (arXiv 2309.05210), with
continuations compared token by token in place of being graded.
"""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.eval.facts import Continuation
from llmcompress.eval.loading import context_of, opened
from llmcompress.eval.report import estimate

TEMPERATURES = (0.1, 0.3, 0.5, 0.7, 0.8, 1.0)
NEW_TOKENS = (64, 256, 1024)
PROMPTS, PROMPT_TOKENS = 16, 32
GRAM = 4


def prompts_of(tokens: Tensor) -> Tensor:
    """What is continued: the beginnings of the first sequences of `tokens` `(sequences, length)`."""
    return tokens[:PROMPTS, : min(PROMPT_TOKENS, tokens.shape[1] // 2)]


def lengths(prompt_tokens: int, context: int | None) -> tuple[int, ...]:
    """How long continuations are: those of `NEW_TOKENS` that fit into the context, else what fits."""
    room = (context or prompt_tokens + NEW_TOKENS[-1]) - prompt_tokens
    return tuple(n for n in NEW_TOKENS if n <= room) or (room,)


@torch.no_grad()
def greedy(model: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """The likeliest token again and again, end-of-text tokens included, int64 `(prompts, new_tokens)` on the CPU."""
    ids, cache = prompts.to(model.device), None
    for _ in range(new_tokens):
        answer = model(input_ids=ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        ids = torch.cat([ids, answer.logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts.shape[1] :].cpu()


def first_divergence(left: Tensor, right: Tensor) -> list[int]:
    """Of each row `(rows, tokens)` the index of the first token that differs; the number of tokens where none does."""
    differs = torch.cat([left != right, torch.ones(len(left), 1, dtype=torch.bool)], dim=1)
    found: list[int] = differs.int().argmax(1).tolist()
    return found


def repetition(row: Sequence[int]) -> float:
    """Share of the 4-grams of a text that occurred in it before; 0 where it is too short to have any."""
    grams = [tuple(row[i : i + GRAM]) for i in range(len(row) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def continuation(reference: Tensor, candidate: Tensor, *, prompt_tokens: int) -> Continuation:
    """Compare two models' continuations `(prompts, new tokens)` of the same prompts."""
    prompts, new = reference.shape
    diverged = first_divergence(reference, candidate)
    return Continuation(
        new_tokens=new,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        first_divergence=estimate(list(map(float, diverged))),
        identical=sum(index == new for index in diverged) / prompts,
        repetition_reference=estimate([repetition(row) for row in reference.tolist()]),
        repetition_candidate=estimate([repetition(row) for row in candidate.tolist()]),
    )


def continued(folders: tuple[Path, Path], tokens: Tensor, device: str) -> tuple[Continuation, ...]:
    """Continue beginnings of `tokens` `(sequences, length)` with reference and candidate, in float32, and compare."""
    prompts = prompts_of(tokens)
    size = prompts.shape[1]
    written: list[Tensor] = []
    new: tuple[int, ...] = ()
    for folder in folders:
        model = opened(folder, device, torch.float32)
        new = lengths(size, context_of(model))
        written.append(greedy(model, prompts, new[-1]))
        del model
        gc.collect()
    left, right = written
    return tuple(continuation(left[:, :n], right[:, :n], prompt_tokens=size) for n in new)
