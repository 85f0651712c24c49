"""`llmcompress inspect`, `list` and `env`."""

import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from llmcompress import __version__
from llmcompress.cli.options import following, speaking
from llmcompress.cli.runtimes import contained, document_of, tell_runtimes
from llmcompress.cli.say import Speaker, megabytes

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "optimum",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "compressed-tensors",
    "numpy",
    "scipy",
    "pydantic",
    "triton",
)


@click.command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@following
@speaking
def inspect_command(path: Path, speaker: Speaker) -> None:
    """Show what is in a checkpoint: formats, widths, bytes, both bits per weight. Opens headers only."""
    from llmcompress.preflight import check_source

    files = check_source(path, packed=True)
    document = _contents(files)
    opened_by = contained(files)
    document["runtimes"] = document_of(opened_by)
    speaker.table(f"{files.config['model_type']}, {len(files.shards)} shard(s)", *_rows(document))
    lines = [
        f"weights     {document['weights']:,} in {len(files.tensors)} tensors, {megabytes(document['shard_bytes'])}",
        f"checkpoint  {document['file_bits_per_weight']:.4f} bits per weight",
    ]
    if document["bits_per_weight"] is not None:
        lines.append(f"linears     {document['bits_per_weight']:.4f} bits per weight over the quantized ones")
    if document["tied"]:
        groups = ", ".join("+".join(map(str, group)) for group in document["tied"])
        lines.append(
            f"tied        blocks {groups} share their weights, with corrections of rank {document['tied_rank']}"
        )
    speaker.result(document, lines)
    tell_runtimes(opened_by, speaker)


def _contents(files: Any) -> dict[str, Any]:
    """Sum weights and bytes by format, from headers, config.json and the few bytes that tell a linear's size."""
    formats: dict[str, list[int]] = {}
    packed, packed_weights = _packed(files, formats)
    known, groups, rank = _tied(files, formats)
    for name, entry in files.tensors.items():
        if name not in packed and name not in known:
            _add(formats, entry.dtype, entry.elements, entry.stop - entry.start)
    packed_bits = sum(8 * (files.tensors[name].stop - files.tensors[name].start) for name in packed)
    total = sum(row[0] for row in formats.values())
    shard_bytes = sum((files.folder / name).stat().st_size for name in files.shards)
    return {
        "model_type": files.config["model_type"],
        "formats": [{"format": k, "weights": w, "bytes": b} for k, (w, b) in sorted(formats.items())],
        "weights": total,
        "shard_bytes": shard_bytes,
        "bits_per_weight": packed_bits / packed_weights if packed_weights else None,
        "file_bits_per_weight": shard_bytes * 8 / max(total, 1),
        "tied": groups,
        "tied_rank": rank,
    }


def _tied(files: Any, formats: dict[str, list[int]]) -> tuple[set[str], list[list[int]], int]:
    """Add what blocks share to `formats`, and their corrections; returns these tensors, the groups, and the rank."""
    if "quantization_config" not in files.config:
        return set(), [], 0
    from llmcompress.kernels.stored import DOWN, UP
    from llmcompress.runtime.tying import TieRecord

    record = TieRecord.of(files.config)
    if record is None:
        return set(), [], 0
    known: set[str] = set()
    for stem in record.stems:
        if stem in record.shared:
            known.add(f"{stem}.weight")
            _add(formats, "shared", files.tensors[f"{record.shared[stem]}.weight"].elements, 0)
        for name in (stem + part for part in (UP, DOWN) if stem + part in files.tensors):
            known.add(name)
            _add(formats, "corrections", 0, files.tensors[name].stop - files.tensors[name].start)
    return known, [list(group) for group in record.groups], record.rank


def _add(formats: dict[str, list[int]], label: str, weights: int, size: int) -> None:
    row = formats.setdefault(label, [0, 0])
    row[0] += weights
    row[1] += size


def _packed(files: Any, formats: dict[str, list[int]]) -> tuple[set[str], int]:
    """Add the packed linears to `formats`; returns the names of their tensors and the number of their weights."""
    from llmcompress.model.checkpoint import CheckpointReader
    from llmcompress.runtime.packed import PackedReader

    if "quantization_config" not in files.config:
        return set(), 0
    reader = PackedReader(CheckpointReader(files.tensors), files.config)
    packed: set[str] = set()
    total = 0
    for stem in reader.stems():
        rows, columns = reader.size_of(stem)
        label, names = reader.spec_of(stem).label, reader.parts(stem)
        for name in names:
            entry = files.tensors[name]
            codes = name.endswith((".weight_packed", ".weight_packed_high", ".weight"))
            _add(formats, label if codes else "scales and shapes", 0, entry.stop - entry.start)
        formats[label][0] += rows * columns
        total += rows * columns
        packed.update(names)
    return packed, total


def _rows(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [[f["format"], f"{f['weights']:,}", f"{f['bytes']:,}"] for f in document["formats"]]
    return ["format", "weights", "bytes"], rows


def _plugins(package: str) -> list[tuple[str, str]]:
    from llmcompress.plugins import available, summary

    return [(name, summary(package, name)) for name in available(package)]


def _recipes() -> list[tuple[str, str]]:
    from llmcompress.recipes import load_recipe, recipe_names

    return [(name, load_recipe(name).description) for name in recipe_names()]


def _models() -> list[tuple[str, str]]:
    from llmcompress.hub.aliases import ALIASES

    return [("demo", "the small model that ships with the package"), *ALIASES]


LISTS: dict[str, Callable[[], list[tuple[str, str]]]] = {
    "scorers": lambda: _plugins("llmcompress.compress.scorers"),
    "quantizers": lambda: _plugins("llmcompress.compress.quantizers"),
    "formats": lambda: _plugins("llmcompress.compress.exporters"),
    "exports": lambda: _plugins("llmcompress.compress.export.formats"),
    "recipes": _recipes,
    "models": _models,
}


@click.command("list")
@click.argument("what", type=click.Choice(list(LISTS)))
@speaking
def list_command(what: str, speaker: Speaker) -> None:
    """List what there is."""
    found = LISTS[what]()
    width = max(len(name) for name, _ in found)
    document = [{"name": name, "about": about} for name, about in found]
    speaker.result(document, [f"{name:<{width}}  {about}" for name, about in found])


@click.command("env")
@speaking
def env_command(speaker: Speaker) -> None:
    """Print versions for a bug report. No paths, names or secrets."""
    found = {"llmcompress": __version__, "python": platform.python_version(), "machine": platform.machine()}
    found["system"] = platform.system()
    found["cores"] = str(os.cpu_count())
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    speaker.result(found, [f"{name:<18} {value}" for name, value in found.items()])
