"""The columns of everything drawn block by block: kinds of linears, `q_proj` and so on, and which are fused."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmcompress.types import BlockTrace, LinearInfo, ModelTrace

INSIDE = re.compile(r"(.+?\.(\d+))\.(.+)")  # of a block: its name, its number, the linear
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")  # the experts, the number of one, its projection


@dataclass(frozen=True)
class Columns:
    """Kinds of linears in call order, the kind of each linear by name, and the kinds that share a format.

    The head, where the model has one of its own, is a kind by itself that is in `kind_of` alone.
    """

    kinds: tuple[str, ...]
    kind_of: Mapping[str, str]
    units: tuple[tuple[str, ...], ...]


def _inner(block: BlockTrace, linear: LinearInfo) -> str:
    """A linear's name inside its block, the same for all experts."""
    name = linear.name.removeprefix(block.name + ".")
    return name if linear.expert is None else f"{name.rsplit('.', 2)[0]}.*.{name.rpartition('.')[2]}"


def columns_of(trace: ModelTrace) -> Columns:
    """What the linears of a model are called inside their blocks, as short as stays unambiguous.

    All experts of a block are one kind for each projection.
    """
    inner = {x.name: _inner(block, x) for block in trace.blocks for x in block.linears}
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


def named_trace(names: Iterable[str]) -> ModelTrace:
    """As much of a trace as names of linears tell: blocks by the first number in them, one name outside as the head.

    Linears of one parent pass for one unit; shapes and sizes are 0.
    """
    blocks: dict[int, tuple[str, list[LinearInfo]]] = {}
    outside = []
    for name in names:
        found = INSIDE.fullmatch(name)
        routed = EXPERT.fullmatch(name)
        unit, expert = (routed[1], int(routed[2])) if routed else (name.rpartition(".")[0], None)
        info = LinearInfo(name=name, tensor=name, rows=0, columns=0, unit=unit, shared_input=0, expert=expert)
        if found is None:
            outside.append(info)
        else:
            blocks.setdefault(int(found[2]), (found[1], []))[1].append(info)
    traced = tuple(
        BlockTrace(index=index, name=name, linears=tuple(linears), norms=())
        for index, (name, linears) in sorted(blocks.items())
    )
    head = outside[0] if len(outside) == 1 else None
    return ModelTrace(model_type="", blocks=traced, head=head, parameters=0, other_bytes=0, untraced_share=0.0)
