"""What rounding with feedback is worth on other text, when few calibration tokens reach a linear, as an expert's.

    python bench/few_tokens.py demo --json OUT.json

Linears of the first, the middle and the last block but one are rounded with the Hessian of so many tokens, as it is
or steadied (`Seen.steadied`), and their output error on other text is divided by that of rounding to nearest.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from common import publish
from torch import Tensor

from llmcompress.compress.grid import group_size_for
from llmcompress.compress.observe import groups_of, watching_inputs, weight_of
from llmcompress.compress.quantizers import gptq, rtn
from llmcompress.compress.rounding import Request, Seen
from llmcompress.hub.source import resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.model.trace import trace
from llmcompress.types import LinearSpec, QuantizerOptions

TOKENS = (2, 8, 32, 128, 512, 2048)
WAYS = ("as it is", "steadied")
OPTIONS = QuantizerOptions()


def inputs_and_weights(model: Path, samples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What some shared inputs are `(tokens, columns)`, and the weight of one linear that reads each."""
    skeleton = Skeleton.open(model)
    infos, stream = trace(skeleton).blocks, BlockStream(skeleton)
    batches = list(torch.split(token_batches(TextRequest("builtin", samples, 256, 0, "calibration"), model).tokens, 8))
    hidden, calls = stream.start(batches)
    skeleton.free_rest()
    wanted = {0, len(infos) // 2, max(len(infos) - 2, 0)}
    for info in infos:
        block = skeleton.load_block(info.index)
        read: dict[int, list[Tensor]] = {}
        with torch.no_grad(), watching_inputs(block, info, lambda n, x, read=read: read.setdefault(n, []).append(x)):
            for place, call in enumerate(calls):
                hidden[place] = stream.run_block(info.index, hidden[place], call[info.index])
        for number, members in groups_of(info).items() if info.index in wanted else ():
            yield torch.cat(read[number]).float(), weight_of(block, info, members[0]).contiguous()
        skeleton.free(block)


def ratios(inputs: Tensor, weight: Tensor, bits: int, generator: torch.Generator) -> dict[tuple[int, str], float]:
    """Error on the second half of the tokens over that of rounding to nearest, by number of tokens and way."""
    spec = LinearSpec(bits=bits, group_size=group_size_for(weight.shape[1], 128) or 32)
    half = len(inputs) // 2
    judge = inputs[half:].T @ inputs[half:] / half

    def error(seen: Seen | None) -> float:
        quantizer = rtn if seen is None else gptq
        (found,) = quantizer.quantize([Request(weight, spec)], seen, options=OPTIONS, dtype=torch.bfloat16)
        off = found.codes.dequantize() - weight
        return float(((off @ judge) * off).sum())

    plain, found = error(None), {}
    for count in TOKENS:
        rows = inputs[:half][torch.randperm(half, generator=generator)[:count]]
        seen = Seen(rows.T @ rows / count, count)
        found |= {(count, WAYS[0]): error(seen) / plain, (count, WAYS[1]): error(seen.steadied()) / plain}
    return found


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(0)
    for inputs, weight in inputs_and_weights(resolve(given.model).path, given.samples):
        for bits in (3, 4):
            for (count, way), ratio in ratios(inputs, weight, bits, generator).items():
                found.setdefault(f"{bits} bits, {count} tokens, {way}", []).append(ratio)
    rows = {
        key: {"mean": math.exp(sum(map(math.log, values)) / len(values)), "worst": max(values)}
        for key, values in found.items()
    }
    for key, row in rows.items():
        print(f"{key:32} {row['mean']:.3f}, worst {row['worst']:.2f}")
    publish(given.json, {"model": given.model, "linears": len(next(iter(found.values()))), "rows": rows})


if __name__ == "__main__":
    main()
