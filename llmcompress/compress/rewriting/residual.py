"""The residual stream of a whole model: who writes it, which norms read it, found by running the model.

The stream entering the first block must be a sum of embeddings (and linears), and what each block adds to it a sum of
its linears' outputs, up to constant factors. That is solved for, not assumed; where norms or anything else write, the
stream cannot be centred or rotated, and the model is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.rewriting.edits import bias_of, fold_gain, matrix, mix_rows, read_gain
from llmcompress.compress.rewriting.sites import NormSite, norm_sites
from llmcompress.compress.rewriting.work import Call
from llmcompress.errors import InputError
from llmcompress.model.skeleton import find_blocks
from llmcompress.model.stream import hidden_of, linear_modules

CLOSE = 1e-9
PRESENT = 1e-6  # a coefficient below it says that a module does not write
PROBE_TOKENS = 256
ELSEWHERE = "leave rotations and the RMSNorm form out for this model"


@dataclass(frozen=True)
class BlockSites:
    """One block: its linears that write the stream, and its norms that feed linears. Names are inside the block."""

    block: nn.Module
    call: Call
    writers: tuple[str, ...]
    sites: tuple[NormSite, ...]


@dataclass(frozen=True)
class Residual:
    """Everything that touches the stream of `width` channels."""

    width: int
    embeddings: tuple[nn.Module, ...]  # nn.Embedding, or linears that write before the first block
    blocks: tuple[BlockSites, ...]
    final_owner: nn.Module
    final_name: str
    head: nn.Module

    @property
    def final(self) -> nn.Module:
        """The norm between the last block and the head."""
        return self.final_owner.get_submodule(self.final_name)


@dataclass
class _Seen:
    """What one run of the model showed."""

    calls: dict[int, tuple[Call, Tensor]]  # block -> its call and what it returned
    outputs: dict[str, Tensor]  # module -> its output, last call
    norms: dict[str, Tensor]
    head_input: Tensor | None = None


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Call each function with the arguments, keyword arguments and output of its module."""
    handles = []
    for module, see in hooks:

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any, see: Callable[..., None] = see) -> None:
            see(args, kwargs, output)

        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observe(model: Any, blocks: nn.ModuleList, call: Call) -> _Seen:
    seen = _Seen({}, {}, {})
    names = {id(module): name for name, module in model.named_modules()}
    hooks: list[tuple[nn.Module, Callable[..., None]]] = []
    for index, block in enumerate(blocks):

        def keep_block(args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            seen.calls[index] = Call(args, dict(kwargs)), hidden_of(output)

        hooks.append((block, keep_block))
    linears = {id(module) for module in linear_modules(model).values()}
    for module in model.modules():
        if not (_is_norm(module) or isinstance(module, nn.Embedding) or id(module) in linears):
            continue
        name = names[id(module)]

        def keep(_: Any, __: Any, output: Any, name: str = name, norm: bool = _is_norm(module)) -> None:
            (seen.norms if norm else seen.outputs)[name] = hidden_of(output)

        hooks.append((module, keep))

    def keep_head(args: Any, _: Any, __: Any) -> None:
        seen.head_input = args[0]

    hooks.append((model.get_output_embeddings(), keep_head))
    with _hooked(hooks):
        call.run(model)
    return seen


def find_residual(model: Any, call: Call) -> Residual:
    """Find who writes and reads the stream. Raises InputError, saying why, where it is not a plain sum of linears.

    The model is in float64 and `call` is one call of it.
    """
    name, blocks = find_blocks(model, int(model.config.get_text_config().num_hidden_layers))
    seen = _observe(model, blocks, call)
    if len(seen.calls) != len(blocks) or seen.head_input is None:
        raise InputError("the model does not run every block once and its head after them", ELSEWHERE)
    inside = name + "."
    outside = {key: value for key, value in seen.outputs.items() if not key.startswith(inside)}
    entering = _entering(seen.calls[0][0])
    width = entering.shape[-1]
    outer_norms = {key: value for key, value in seen.norms.items() if not key.startswith(inside)}
    written = _writers("the first block's input", entering, outside, outer_norms)
    found = []
    for index, block in enumerate(blocks):
        start = f"{name}.{index}."
        linears = {key: value for key, value in seen.outputs.items() if key.startswith(start)}
        norms = {key: value for key, value in seen.norms.items() if key.startswith(start)}
        block_call, output = seen.calls[index]
        added = output.flatten(0, -2) - _entering(block_call).flatten(0, -2)
        writers = tuple(key.removeprefix(start) for key in _writers(f"block {index}", added, linears, norms))
        found.append(BlockSites(block, block_call, writers, norm_sites(block, block_call)))
    owner, leaf = _final_norm(model, outer_norms, seen.head_input)
    embeddings = tuple(model.get_submodule(key) for key in written)
    return Residual(width, embeddings, tuple(found), owner, leaf, model.get_output_embeddings())


def _entering(call: Call) -> Tensor:
    found: Tensor = call.args[0] if call.args else call.kwargs["hidden_states"]
    return found


def _writers(where: str, wanted: Tensor, linears: dict[str, Tensor], norms: dict[str, Tensor]) -> tuple[str, ...]:
    """Names of the linears of which `wanted` is a sum with constant factors. Raises InputError if it is no such sum."""
    width = wanted.shape[-1]
    rows = wanted.flatten(0, -2)
    shaped = [(key, _as_rows(value, wanted)) for key, value in (linears | norms).items() if value.shape[-1] == width]
    candidates = {key: value for key, value in shaped if value is not None}
    if not candidates:
        raise InputError(f"{where} is not written by linears", ELSEWHERE)
    goal = rows[:PROBE_TOKENS].flatten()
    columns = torch.stack([value[:PROBE_TOKENS].flatten() for value in candidates.values()], dim=1)
    sizes = columns.norm(dim=0).clamp_min(1e-300)
    solved = torch.linalg.lstsq((columns / sizes).cpu(), goal[:, None].cpu(), driver="gelsd").solution[:, 0]
    error = float(((columns / sizes).cpu() @ solved - goal.cpu()).norm() / goal.norm().clamp_min(1e-300))
    present = [key for key, part in zip(candidates, solved / goal.norm().cpu(), strict=True) if abs(part) > PRESENT]
    if not error <= CLOSE:
        raise InputError(f"{where} is not a sum of its linears' outputs: something else writes the residual", ELSEWHERE)
    writing = [key for key in present if key in norms]
    if writing:
        raise InputError(f"{where}: the norm {writing[0]} writes the residual (post-norm family)", ELSEWHERE)
    return tuple(present)


def _as_rows(value: Tensor, like: Tensor) -> Tensor | None:
    """A module's output as rows beside those of `like`, repeated over the batch where it has none; None if neither."""
    if value.numel() == like.numel():
        return value.reshape(-1, like.shape[-1])
    if like.ndim == 3 and value.numel() == like[0].numel():
        return value.reshape(1, *like.shape[1:]).expand_as(like).reshape(-1, like.shape[-1])
    return None


def _final_norm(model: nn.Module, norms: dict[str, Tensor], head_input: Tensor) -> tuple[nn.Module, str]:
    for name, output in norms.items():
        if output.shape == head_input.shape and torch.equal(output, head_input):
            owner, _, leaf = name.rpartition(".")
            return model.get_submodule(owner), leaf
    raise InputError("no norm feeds the head directly", ELSEWHERE)


def untie(model: Any) -> None:
    """Give the head a weight of its own where it shares that of the embedding; see `record_untied`."""
    head = model.get_output_embeddings()
    if tied(model):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)


def tied(model: Any) -> bool:
    """Whether the head shares the weight of the embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def record_untied(model: Any) -> None:
    """Say so in the config, once a rewrite that unties has held, so that saving writes both weights."""
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = {}


def fold_norms(residual: Residual, *, only_native: bool = False) -> None:
    """Move the gain of every norm that reads the stream into its readers.

    With `only_native` no linear gets a bias it does not have (such a norm keeps its gain), and the final norm keeps its
    own, so that the model's class holds the result.
    """
    for part in residual.blocks:
        for site in part.sites:
            gain = read_gain(part.block.get_submodule(site.norm))
            readers = [part.block.get_submodule(name) for name in site.readers]
            bare = any(bias_of(linear) is None for linear in readers)
            if not (only_native and bare and bool(gain.beta.any())):
                fold_gain(gain, readers)
    if not only_native:
        fold_gain(read_gain(residual.final), [residual.head])


def centre(residual: Residual) -> None:
    """Subtract from whatever writes the stream its mean over channels, so that the stream's mean is always zero."""
    width, parameter = residual.width, next(residual.head.parameters())
    centring = torch.eye(width, dtype=parameter.dtype, device=parameter.device) - 1 / width
    transform_writers(residual, centring)


def transform_writers(residual: Residual, right: Tensor) -> None:
    """Turn every vector written to the stream into `vector @ right`; `right` is `(width, width)`."""
    for module in residual.embeddings:
        if isinstance(module, nn.Embedding):
            module.weight.data.copy_(module.weight.detach() @ right)
        else:
            mix_rows(module, right.T)
    for part in residual.blocks:
        for name in part.writers:
            mix_rows(part.block.get_submodule(name), right.T)


def transform_readers(residual: Residual, right: Tensor) -> None:
    """Let every reader of the stream read `stream @ right`, with `right` orthogonal; norms must have no gain."""
    for linear in readers_of(residual):
        matrix(linear).copy_(matrix(linear) @ right)


def readers_of(residual: Residual) -> list[nn.Module]:
    """The linears that read the stream through a norm, the head included."""
    inside = [part.block.get_submodule(name) for part in residual.blocks for s in part.sites for name in s.readers]
    return [*inside, residual.head]


def replace_norms(residual: Residual) -> None:
    """Put RMSNorms in the place of the LayerNorms that read the stream, with their gain and, after the last, no bias.

    Only equal where the stream is centred and the bias is folded.
    """
    places = [(part.block, site.norm) for part in residual.blocks for site in part.sites]
    for owner, name in [*places, (residual.final_owner, residual.final_name)]:
        gain = read_gain(owner.get_submodule(name))
        if not gain.centred:
            continue
        norm = nn.RMSNorm(len(gain.gamma), eps=gain.epsilon, dtype=gain.gamma.dtype, device=gain.gamma.device)
        norm.weight.data.copy_(gain.gamma)
        norm.requires_grad_(gain.weight.requires_grad)
        parent, _, leaf = name.rpartition(".")
        setattr(owner.get_submodule(parent), leaf, norm)


def centred_norms(residual: Residual) -> list[bool]:
    """Whether each norm that reads the stream subtracts the mean: LayerNorms do, RMSNorms do not."""
    norms = [part.block.get_submodule(site.norm) for part in residual.blocks for site in part.sites]
    return [read_gain(norm).centred for norm in [*norms, residual.final]]
