"""What an export still shows of its record without the checkpoint it was made from: its logits, or its tensors."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from llmcompress.compress.export.records import ExportRecord
from llmcompress.compress.export.run import FORMATS
from llmcompress.compress.verify import Check, check_logits
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.plugins import find


def export_checks(folder: Path, record: ExportRecord, device: str = "cpu") -> Iterator[Check]:
    """Yield a check of the logits of the probe or, where files are no checkpoint by themselves, of their tensors."""
    module = find(FORMATS, record.format)
    if not hasattr(module, "decode"):
        yield _check_tensors(module, folder, record)
    elif record.probe is not None:
        skeleton = Skeleton.open(folder, device, decode=module.decode(folder))
        tokens = torch.tensor([record.probe.tokens])
        yield check_logits(next(iter(BlockStream(skeleton).logits([tokens]))), record.probe)


def _check_tensors(module: ModuleType, folder: Path, record: ExportRecord) -> Check:
    """Whether all weights are there and finite, in a file that is no checkpoint by itself."""
    if not module.available():
        return Check("tensors", True, f"not looked into: what reads {record.format} is not installed")
    count = 0
    for name, tensor in module.tensors(folder):
        count += 1
        if not bool(torch.isfinite(tensor).all()):
            return Check("tensors", False, f"{name}: NaN or infinity")
    whole = count == len(record.weights)
    return Check("tensors", whole, f"{count} of {len(record.weights)}, no NaN or infinity")
