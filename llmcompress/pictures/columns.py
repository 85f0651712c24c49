"""The columns of everything drawn block by block: kinds of linears, `q_proj` and so on, and which are fused."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from llmcompress.types import ModelTrace


@dataclass(frozen=True)
class Columns:
    """Kinds of linears in call order, the kind of each linear by name, and the kinds that share a format.

    The head, where the model has one of its own, is a kind by itself that is in `kind_of` alone.
    """

    kinds: tuple[str, ...]
    kind_of: Mapping[str, str]
    units: tuple[tuple[str, ...], ...]


def columns_of(trace: ModelTrace) -> Columns:
    """What the linears of a model are called inside their blocks, as short as stays unambiguous."""
    inner = {x.name: x.name.removeprefix(block.name + ".") for block in trace.blocks for x in block.linears}
    paths = dict.fromkeys(inner.values())
    last = Counter(path.rpartition(".")[2] for path in paths)
    short = {path: tail if last[tail := path.rpartition(".")[2]] == 1 else path for path in paths}
    kind_of = {name: short[path] for name, path in inner.items()}
    units: list[tuple[str, ...]] = []
    seen: set[str] = set()
    for block in trace.blocks:
        members: dict[str, list[str]] = {}
        for linear in block.linears:
            members.setdefault(linear.unit, []).append(kind_of[linear.name])
        for kinds in members.values():
            fresh = tuple(kind for kind in dict.fromkeys(kinds) if kind not in seen)
            seen.update(fresh)
            units += [fresh] if fresh else []
    if trace.head is not None:
        kind_of[trace.head.name] = trace.head.name
    return Columns(tuple(kind for unit in units for kind in unit), kind_of, tuple(units))
