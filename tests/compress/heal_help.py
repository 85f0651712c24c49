"""What the tests of healing share."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.heal.training import Schedule
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.hub.source import resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.recipes import load_recipe
from llmcompress.runtime.adapter import reader_of

SCHEDULE = Schedule(steps=12, batch_size=4, rate=5e-3, every=4, period=3)
TOKENS = torch.randint(3, 40, (6, 16), generator=torch.Generator().manual_seed(3))


def noisy(source: Path, folder: Path, within: str = "layers") -> Path:
    """A copy of a model with noise on its matrices: something that can be healed."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and within in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.3)
    model.save_pretrained(folder, max_shard_size="200KB")
    return folder


def quantized(source: Path, folder: Path, budget: str, *changes: str) -> Path:
    small = ("calibration.samples=4", "calibration.sequence_length=16", "calibration.score_samples=4")
    recipe = load_recipe("balanced", (*small, "plan.group_size=32", "plan.trials=false", *changes))
    for _ in quantize(QuantizeRequest(resolve(str(source)), folder, recipe, parse_budget(budget), "cpu", "quantize")):
        pass
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@torch.no_grad()
def logits_of(folder: Path, tokens: Tensor) -> Tensor:
    """As `eval` and `verify` read it."""
    return next(iter(BlockStream(Skeleton.open(folder, decode=reader_of(folder))).logits([tokens])))
