"""Rounding of linears that read one input, divided among the processes of a run.

What is divided is cut the same way however many processes there are, so that the codes are the same to the last bit.
"""

import json
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from llmcompress.compress.lowrank import corrected
from llmcompress.compress.rounding import Quantized, Request, Seen, portions
from llmcompress.kernels.codes import Codes
from llmcompress.model.crew import Crew, json_of
from llmcompress.types import QuantizerOptions

PART_WEIGHTS = 1 << 20  # requests are rounded together until they are so many
TENSORS = ("codes", "scale", "zero", "codebook", "high", "up", "down")  # of Codes, as `quantize` gives them
NOTES = "notes"


def dealt(
    crew: Crew,
    quantizer: ModuleType,
    requests: Sequence[Request],
    seen: Seen | None,
    *,
    options: QuantizerOptions,
    dtype: torch.dtype,
) -> list[Quantized]:
    """`corrected` of all requests, on every process, each part by one of them; `seen` is the same on all."""
    if seen is None:  # nothing to feed back: each weight by itself, and done sooner than sent
        return corrected(quantizer, requests, seen, options=options, dtype=dtype)
    parts = portions(requests, range(len(requests)), PART_WEIGHTS)
    owners = crew.deal([sum(requests[place].weight.numel() for place in part) for part in parts])
    found: dict[int, Quantized] = {}
    for part, owner in zip(parts, owners, strict=True):
        if owner == crew.rank:
            asked = [requests[place] for place in part]
            found |= zip(part, corrected(quantizer, asked, seen, options=options, dtype=dtype), strict=True)
    seen.known.clear()
    for rank in range(crew.size if crew.size > 1 else 0):
        own = _packed(found) if rank == crew.rank else {}
        found |= _unpacked(crew.spread(own, rank), requests)
    return [found[place] for place in range(len(requests))]


def _packed(found: dict[int, Quantized]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for place, result in found.items():
        notes = bytearray(json.dumps([result.blind, *result.fallbacks]).encode())
        tensors[f"{place} {NOTES}"] = torch.frombuffer(notes, dtype=torch.uint8)
        for name in TENSORS:
            if (tensor := getattr(result.codes, name)) is not None:
                tensors[f"{place} {name}"] = tensor
    return tensors


def _unpacked(tensors: dict[str, Tensor], requests: Sequence[Request]) -> dict[int, Quantized]:
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, _, part = name.partition(" ")
        found.setdefault(int(place), {})[part] = tensor
    results = {}
    for number, parts in found.items():
        codes = Codes(spec=requests[number].spec, **{name: parts.get(name) for name in TENSORS})  # type: ignore[arg-type]
        blind, *fallbacks = json_of(parts[NOTES])
        results[number] = Quantized(codes, tuple(fallbacks), blind)
    return results
