"""Which tile sizes a kernel runs with: what was measured on this GPU, what ships with the package, or a rule.

Nothing is measured while a model runs, so equal inputs give equal bits, and a captured graph stays valid.
A table is JSON: device class or name -> what a linear is (`int4`, `int4 4096x4096`) -> most tokens -> five numbers of
the kernel in Triton, or up to four of those in CUDA C++; for more tokens than its tiles hold, five of the kernel in
Triton, three of that for many tokens, or none for strips.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from llmcompress.errors import InputError
from llmcompress.files import cache_folder, commit_json
from llmcompress.kernels.triton.layout import TABLE_PER_ROW, Packing

SHIPPED = Path(__file__).with_name("tuning.json")
BUCKETS = (8, 16, 32, 64, 128)
FEW = (1, 2, 4)  # what is chosen for up to so many, of those in CUDA C++, before what is for the first bucket
MANY = (512, 2048)  # the same beyond what one tile holds; the last one for all that are more
LEAN_TOKENS = 8  # where nothing was measured, the kernel in CUDA C++ takes up to so many
LEAN_ROWS = 8192  # and more warps to a row below so many rows
PROGRAMS_PER_PROCESSOR = 2
MOST_PARTS = 16
SLOTS = (2, 3, 4)
ROWS, WARPS, MOST_STAGES = (16, 32, 64, 128, 256), (1, 2, 4, 8, 16), 8


class Config(NamedTuple):
    """Rows and tokens of a tile, programs that share one (0: as the GPU's size suggests), warps, pipeline stages."""

    rows: int
    tokens: int
    split: int
    warps: int
    stages: int


class Lean(NamedTuple):
    """Of the kernels in CUDA C++: warps that share 16 rows, and blocks of each in shared memory.

    early   whether it begins to read the weight while the kernel before it still runs; compute capability 9.0
    terms   1: inputs as they are; 2: as two signed bytes each, which multiply the codes of integers exactly
    """

    warps: int
    slots: int = 2
    early: int = 0
    terms: int = 1


class Fused(NamedTuple):
    """Of the kernel for many tokens: rows and tokens of a tile, slices of the input in shared memory."""

    rows: int
    tokens: int
    stages: int


class Strips(NamedTuple):
    """Rows are unpacked a strip at a time, and a library multiplies: there is nothing to choose."""


Choice = Config | Lean | Fused | Strips
Table = dict[str, dict[str, Choice]]
FUSED_ROWS, FUSED_TOKENS, FUSED_STAGES = (64, 128, 192, 256), (128, 256), range(4, 9)


def bucket(tokens: int) -> int:
    """The tokens of a tile: the least of the sizes that holds all, or the largest."""
    return next((size for size in BUCKETS if tokens <= size), BUCKETS[-1])


def user_table(name: str) -> Path:
    """Where what was measured on a GPU of this name is kept."""
    return cache_folder("kernels", f"{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json")


def read_table(path: Path) -> Table:
    """What a linear is -> most tokens -> configuration. Raises InputError naming the file when it is damaged."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(key): {str(most): _entry(most, numbers) for most, numbers in row.items()}
            for key, row in document.items()
        }
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: not a table of the kernels", "delete it and run `llmcompress tune` again") from None


def read_own(name: str) -> Table:
    """The user's table of a GPU, empty where there is none. Raises InputError where it is damaged."""
    path = user_table(name)
    return read_table(path) if path.is_file() else {}


def keep(name: str, table: Table, key: str, *, most: int, config: Choice) -> dict[str, dict[str, list[int]]]:
    """Add to the user's table of a GPU what is best for up to `most` tokens, and write it; returns it as JSON."""
    table.setdefault(key, {})[str(most)] = config
    document = {label: {tokens: list(numbers) for tokens, numbers in row.items()} for label, row in table.items()}
    path = user_table(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    commit_json(path, document)
    return document


def _checked(numbers: list[int]) -> Config | Lean:
    if len(numbers) <= len(Lean._fields):
        lean = Lean(*numbers)
        known = lean.warps in WARPS and lean.slots in SLOTS and lean.early in (0, 1) and lean.terms in (1, 2)
        if not known or not all(type(value) is int for value in lean):
            raise ValueError("no such number of warps, slots or terms")
        return lean
    config = Config(*numbers)
    whole = all(type(value) is int for value in config)
    if not whole or config.rows not in ROWS or config.tokens not in BUCKETS or config.warps not in WARPS:
        raise ValueError("no such tile")
    if not (0 <= config.split <= MOST_PARTS and 1 <= config.stages <= MOST_STAGES):
        raise ValueError("no such number of parts or stages")
    return config


def _entry(most: str, numbers: list[int]) -> Choice:
    many = int(most) in MANY and len(numbers) != len(Config._fields)
    return _checked_many(numbers) if many else _checked(numbers)


def _checked_many(numbers: list[int]) -> Fused | Strips:
    if not numbers:
        return Strips()
    fused = Fused(*numbers)
    known = fused.rows in FUSED_ROWS and fused.tokens in FUSED_TOKENS and fused.stages in FUSED_STAGES
    if not known or not all(type(value) is int for value in fused):
        raise ValueError("no such tile")
    return fused


@functools.lru_cache(maxsize=8)
def _tables(name: str, device_class: str) -> tuple[Table, ...]:
    """The user's table of this GPU, where there is one, and the shipped one of its class."""
    try:
        own = read_own(name)
    except FileNotFoundError:  # a user without a home
        own = {}
    return (own, read_shipped().get(device_class, {}))


def read_shipped() -> dict[str, Table]:
    """Device class (`sm_90`) -> what a linear is -> most tokens -> configuration."""
    return {
        device: {key: {most: _entry(most, numbers) for most, numbers in row.items()} for key, row in table.items()}
        for device, table in json.loads(SHIPPED.read_text(encoding="utf-8")).items()
    }


@functools.lru_cache(maxsize=4096)
def choose(packing: Packing, rows: int, tokens: int, device: torch.device, lean: bool = False) -> Config | Lean:
    """The configuration for `tokens` inputs and a weight of `rows`: from the tables, else by `rule`.

    One of the kernel in CUDA C++ only where `lean` says that it can be used.
    """
    if device.type != "cuda":
        return fill(rule(packing, bucket(tokens)), packing, (rows, tokens), 4)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    sizes = [size for size in FEW if tokens <= size]
    for known in _entries(packing, rows, (*sizes, bucket(tokens)), device):
        if isinstance(known, Config):
            return fill(known, packing, (rows, tokens), processors)
        if isinstance(known, Lean) and lean:
            return known
    if lean and tokens <= LEAN_TOKENS:
        return Lean(8 if rows < LEAN_ROWS else 4)
    return fill(rule(packing, bucket(tokens)), packing, (rows, tokens), processors)


@functools.lru_cache(maxsize=4096)
def choose_many(
    packing: Packing, rows: int, tokens: int, device: torch.device, fused: bool = False
) -> Config | Fused | Strips:
    """The way to multiply more than the largest of `BUCKETS`: as a table says, and strips where none does.

    The kernel for many tokens, which nobody has measured on most GPUs, only where `fused` says that it can be used.
    """
    if device.type != "cuda":
        return Strips()
    most = next((size for size in MANY if tokens <= size), MANY[-1])
    for known in _entries(packing, rows, (most,), device):
        if isinstance(known, Config):
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            return fill(known, packing, (rows, tokens), processors)
        if isinstance(known, Strips) or (isinstance(known, Fused) and fused):
            return known
    return Strips()


def _entries(packing: Packing, rows: int, sizes: tuple[int, ...], device: torch.device) -> Iterator[Choice]:
    """What tables say of a weight and up to so many tokens: the user's before the shipped one, its shape before all."""
    found = torch.cuda.get_device_properties(device)
    for table in _tables(found.name, f"sm_{found.major}{found.minor}"):
        for key in (f"{packing.label} {rows}x{packing.columns}", packing.label):
            row = table.get(key, {})
            yield from (row[str(most)] for most in sizes if str(most) in row)


def rule(packing: Packing, most: int) -> Config:
    """Tile sizes where nothing was measured: no spills, and shared memory of any GPU since 2020 (99 KiB)."""
    rows = 128 if most <= 16 and packing.table != TABLE_PER_ROW else 64
    return Config(rows, min(most, 32), 0, 4, 3 if most <= 8 and packing.bits != 3 else 2)


def fill(config: Config, packing: Packing, sizes: tuple[int, int], processors: int) -> Config:
    """With the number of programs for each tile, where it was left to the GPU's size; `sizes` are rows and tokens."""
    if config.split:
        return config
    rows, tokens = sizes
    tiles = -(-rows // config.rows) * -(-tokens // config.tokens)
    split = max(min(PROGRAMS_PER_PROCESSOR * processors // tiles, packing.blocks // 2, MOST_PARTS), 1)
    while packing.blocks % split and split > 1:  # parts of one length need no masks
        split -= 1
    return config._replace(split=split)
