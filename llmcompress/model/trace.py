"""Ask a model what it does: linears, which of them read the same tensor, which norm feeds them.

One short forward of each kind of block with every module watched. Linears that receive the very
same tensor object form a shared-input group; those of one group under one parent module form a
fused unit (`{q, k, v}`, `{gate, up}`), which serving runtimes store together. The head, which makes
the logits, is a linear outside the blocks and a unit of its own. The experts of a block
are one unit as well, whatever they read. What routes tokens to them is no linear here.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.experts import Experts, router_weights
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream, hidden_of, linear_modules
from llmcompress.types import BlockTrace, ChildEnd, LinearInfo, ModelTrace, NormFeed, StreamWriter

PROBE_TOKENS = 8
CLOSE = 1e-4  # relative difference of two tensors taken for the same, in float32


@dataclass
class Watched:
    """What one forward of a block showed; tensors are held so that their identities stay unique."""

    entering: Tensor
    inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    outputs: list[tuple[str, Tensor]] = field(default_factory=list)
    norms: list[tuple[str, Tensor]] = field(default_factory=list)
    norm_inputs: list[tuple[str, Tensor]] = field(default_factory=list)
    children: list[tuple[str, Any]] = field(default_factory=list)
    leaving: Tensor = field(default_factory=lambda: torch.empty(0))


def watch(block: nn.Module, run: Callable[[], Tensor], entering: Tensor | None = None) -> Watched:
    """Run a block, on `entering`, and keep what its parts were given and gave back, in call order."""
    seen = Watched(torch.empty(0) if entering is None else entering)
    handles = []
    for name, module in linear_modules(block).items():

        def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            seen.inputs.append((name, args[0]))

        def wrote(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            seen.outputs.append((name, output))

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(wrote))
    for name, module in block.named_modules():
        if "norm" in type(module).__name__.lower():

            def after(_: nn.Module, args: tuple[Any, ...], output: Any, name: str = name) -> None:
                seen.norms.append((name, hidden_of(output)))
                seen.norm_inputs.append((name, args[0]))

            handles.append(module.register_forward_hook(after))
    for name, module in block.named_children():
        keep = lambda _, __, output, name=name: seen.children.append((name, output))  # noqa: E731
        handles.append(module.register_forward_hook(keep))
    try:
        seen.leaving = run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _signature(block: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


@dataclass(frozen=True)
class _Pattern:
    """Structure shared by all blocks of one signature, with names relative to the block."""

    linears: tuple[tuple[str, int], ...]  # name, shared-input group, in call order
    norms: tuple[tuple[int, str], ...]
    writers: tuple[StreamWriter, ...]
    ends: tuple[ChildEnd, ...]


def _pattern(seen: Watched) -> _Pattern:
    groups: dict[int, int] = {}
    linears = []
    for name, tensor in seen.inputs:
        linears.append((name, groups.setdefault(id(tensor), len(groups))))
    norms = []
    for name, tensor in seen.norms:
        if id(tensor) in groups:
            norms.append((groups[id(tensor)], name))
    return _Pattern(tuple(linears), tuple(norms), _writers(seen), _ends(seen))


def _ends(seen: Watched) -> tuple[ChildEnd, ...]:
    found = []
    for child, returned in seen.children:
        several = returned if isinstance(returned, tuple) else (returned,)
        if any(other is not None for other in several[1:]):
            continue
        for name, output in seen.outputs:
            if output is several[0] and name.startswith(child + "."):
                beside = len(several) - 1 if isinstance(returned, tuple) else 0
                found.append(ChildEnd(child=child, linear=name, beside=beside))
    return tuple(found)


def _writers(seen: Watched) -> tuple[StreamWriter, ...]:
    """Linears whose output is the difference of two points of the stream, alone or added to one another.

    Points are what enters the block, what its norms read, and what leaves it. A linear whose output goes through
    anything else first (a norm, a scale) is not found.
    """
    like = seen.entering
    outputs = [(name, output) for name, output in seen.outputs if output.shape == like.shape]
    points = [("", like), *((n, x) for n, x in seen.norm_inputs if x.shape == like.shape and x is not like)]
    ends = [*(x for _, x in points[1:]), seen.leaving]
    alone: list[StreamWriter] = []
    beside: list[StreamWriter] = []
    names = [name for name, _ in outputs]
    for place, (norm, start) in enumerate(points):
        for end in ends[place:]:
            difference = end - start
            alone += [StreamWriter(linear=n, norm=norm) for n, output in outputs if _close(difference, output)]
            if len(outputs) > 1 and _close(difference, sum(output for _, output in outputs)):
                beside += [StreamWriter(linear=n, norm=norm, after=tuple(names[:i])) for i, n in enumerate(names)]
    first: dict[str, StreamWriter] = {}
    for writer in (*alone, *beside):
        first.setdefault(writer.linear, writer)
    return tuple(first[name] for name in names if name in first)


def _close(left: Tensor, right: Any) -> bool:
    return bool((left - right).norm() <= CLOSE * left.norm().clamp_min(1e-30))


def _linear_infos(skeleton: Skeleton, index: int, pattern: _Pattern) -> Iterable[LinearInfo]:
    block = skeleton.blocks[index]
    modules, routers = linear_modules(block), router_weights(block)
    experts = {name + ".": name for name, module in block.named_modules() if isinstance(module, Experts)}
    file_name = {module: name for name, module in skeleton.names.module_of.items()}
    prefix = skeleton.block_name(index)
    for name, group in pattern.linears:
        tensor = file_name.get(f"{prefix}.{name}.weight")
        if tensor is None or tensor in skeleton.names.converted:
            continue  # merged from several tensors of the file: left as it is, and counted as untraced
        if f"{name}.weight" in routers:
            continue
        module = modules[name]
        transposed = not isinstance(module, nn.Linear)
        weight: Tensor = module.weight  # type: ignore[assignment]
        rows, columns = (weight.shape[1], weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1])
        parent = name.rpartition(".")[0]
        unit = f"{prefix}.{parent}#{group}" if parent else f"{prefix}#{group}"
        home = next((start for start in experts if name.startswith(start)), None)
        yield LinearInfo(
            name=f"{prefix}.{name}",
            tensor=tensor,
            rows=rows,
            columns=columns,
            transposed=transposed,
            unit=unit if home is None else f"{prefix}.{experts[home]}",
            shared_input=group,
            expert=None if home is None else int(name.removeprefix(home).partition(".")[0]),
        )


def _routers(skeleton: Skeleton, index: int) -> tuple[str, ...]:
    wanted = {f"{skeleton.block_name(index)}.{name}" for name in router_weights(skeleton.blocks[index])}
    return tuple(name for name, module in skeleton.names.module_of.items() if module in wanted)


def trace(skeleton: Skeleton) -> ModelTrace:
    """Trace every block of a model; blocks of the same structure are traced once.

    Raises InputError where the skeleton does.
    """
    stream = BlockStream(skeleton)
    vocabulary = int(skeleton.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=generator)
    hidden, calls = stream.start([tokens])
    skeleton.free_rest()
    patterns: dict[tuple[tuple[str, tuple[int, ...]], ...], _Pattern] = {}
    blocks = []
    for index in range(len(skeleton.blocks)):
        kind = _signature(skeleton.blocks[index])
        if kind not in patterns:
            block = skeleton.load_block(index)

            def run(index: int = index) -> Tensor:
                return stream.run_block(index, hidden[0], calls[0][index])

            with torch.no_grad():
                patterns[kind] = _pattern(watch(block, run, hidden[0]))
        skeleton.free(skeleton.blocks[index])
        infos = tuple(_linear_infos(skeleton, index, patterns[kind]))
        norms = tuple(NormFeed(shared_input=g, norm=n) for g, n in patterns[kind].norms)
        name = skeleton.block_name(index)
        known = {info.name.removeprefix(name + ".") for info in infos}
        writers = tuple(writer for writer in patterns[kind].writers if {writer.linear, *writer.after} <= known)
        ends = tuple(end for end in patterns[kind].ends if end.linear in known)
        blocks.append(
            BlockTrace(
                index=index,
                name=name,
                linears=infos,
                norms=norms,
                writers=writers,
                ends=ends,
                routers=_routers(skeleton, index),
            )
        )
    head = _head(skeleton, stream, tokens, hidden[0])
    skeleton.free_rest()
    return _model_trace(skeleton, tuple(blocks), head)


def _head(skeleton: Skeleton, stream: BlockStream, tokens: Tensor, hidden: Tensor) -> LinearInfo | None:
    """The linear that makes the logits, if the model runs it and it has a weight of its own, one plain tensor."""
    module = skeleton.model.get_output_embeddings()
    name = next((name for name, found in skeleton.model.named_modules() if found is module), "")
    weight = f"{name}.weight"
    tied = skeleton.tied()
    if not isinstance(module, nn.Linear) or name.startswith(skeleton.blocks_name + "."):
        return None
    if weight in tied or weight in tied.values():
        return None
    if skeleton.names.module_of.get(weight) != weight or weight in skeleton.names.converted:
        return None  # under another name in the file: readers of packed tensors would not find it
    read: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        stream.leave(tokens, hidden)
    finally:
        handle.remove()
    rows, columns = module.weight.shape
    if len(read) != 1 or read[0].shape[-1] != columns:
        return None
    return LinearInfo(name=name, tensor=weight, rows=rows, columns=columns, unit=name, shared_input=0)


def _model_trace(skeleton: Skeleton, blocks: tuple[BlockTrace, ...], head: LinearInfo | None) -> ModelTrace:
    traced = {linear.tensor for block in blocks for linear in block.linears}
    weights = sum(linear.weights for block in blocks for linear in block.linears)
    routers = {id(p) for block in skeleton.blocks for p in router_weights(block).values()}
    inside = sum(p.numel() for p in skeleton.blocks.parameters() if p.ndim >= 2 and id(p) not in routers)
    other = sum(e.stop - e.start for name, e in skeleton.files.tensors.items() if name not in traced)
    return ModelTrace(
        model_type=str(skeleton.config.model_type),
        blocks=blocks,
        head=head,
        parameters=skeleton.parameters,
        other_bytes=other,
        untraced_share=1 - weights / inside if inside else 0.0,
    )
