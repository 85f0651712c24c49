"""How many bits per weight an export takes, counted in its files."""

from dataclasses import dataclass
from pathlib import Path

from llmcompress.compress.export.checkpoint import Checkpoint
from llmcompress.preflight import check_source
from llmcompress.runtime.packed import PackedReader

WEIGHTS = ("*.safetensors", "*.gguf")


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weight files, and bits per weight of them all; of the linears that had codes, None where unknown."""

    weight_bytes: int
    file_bits_per_weight: float
    bits_per_weight: float | None


def sizes_of(checkpoint: Checkpoint, folder: Path) -> Sizes:
    """Count the files of an export of `checkpoint`; a linear's bits where tensors are named after it."""
    size = sum(path.stat().st_size for pattern in WEIGHTS for path in folder.glob(pattern))
    reader, tensors = checkpoint.skeleton.reader, checkpoint.skeleton.files.tensors
    weights: dict[str, int] = {}
    packed: set[str] = set()
    if isinstance(reader, PackedReader):
        for stem in reader.stems():
            rows, columns = reader.size_of(stem)
            weights[stem] = rows * columns
            packed.update(reader.parts(stem))
    others = sum(entry.elements for name, entry in tensors.items() if name not in packed)
    total = sum(weights.values()) + others
    return Sizes(size, 8 * size / total, _linears(folder, weights))


def _linears(folder: Path, weights: dict[str, int]) -> float | None:
    if not weights or not any(folder.glob("*.safetensors")):
        return None
    found = dict.fromkeys(weights, 0)
    for name, entry in check_source(folder, packed=True).tensors.items():
        stem = name.rpartition(".")[0]
        while stem and stem not in found:
            stem = stem.rpartition(".")[0]
        if stem and not name.endswith(".bias"):
            found[stem] += entry.stop - entry.start
    return 8 * sum(found.values()) / sum(weights.values()) if all(found.values()) else None
