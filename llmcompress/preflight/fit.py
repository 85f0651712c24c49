"""Whether the tensors are those of the model that config.json describes, told from the headers of well-known families.

Only what is certain is said; the skeleton, which knows the class, has the last word.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from llmcompress.errors import Finding
from llmcompress.preflight.header import TensorEntry
from llmcompress.preflight.layouts import LAYOUTS, Layout, Shapes, Sizes, whole
from llmcompress.preflight.weights import AGAIN, HARMLESS_INTEGERS, MIXED

LAYERS = ("num_hidden_layers", "n_layer")
# with these a family's blocks are not all alike, or have parts that the table does not
IRREGULAR = ("per_layer_config", "add_cross_attention", "mlp_only_layers", "quantization_config")
LEGACY = (".gamma", ".beta", ".weight_g", ".weight_v")  # names that transformers renames in any model
MOST_MISSING = 1000

Wanted = tuple[str, tuple[int | None, ...]]  # a tensor's relative name, and its sizes as far as they are known


def check_fit(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """What is missing, misshapen or of another model, of a family whose layout is known; nothing for others."""
    layout = LAYOUTS.get(str(config.get("model_type")))
    count = whole(config, *LAYERS)
    experts = whole(config, *layout.expert_count) if layout else None
    step = config.get("decoder_sparse_step", 1)
    odd = any(config.get(key) for key in IRREGULAR) or type(step) is not int or step != 1
    if layout is None or count is None or odd or (layout.expert_count and not experts):
        return
    names = {relative(layout, name): name for name in tensors}
    if len(names) < len(tensors):
        return
    sizes = layout.sizes(config)
    left, missing = dict(names), []
    for name, shape in islice(_wanted(layout, sizes, names, count, experts or 0), len(names) + MOST_MISSING):
        found = left.pop(name, None)
        if found is None:
            missing.append((name, shape))
        else:
            yield from _check_shape(tensors[found], shape)
    for name in layout.heads:
        if name in left:
            yield from _check_shape(tensors[left.pop(name)], _resolved(layout.head, sizes))
    if not any(name in names for name in layout.heads) and config.get("tie_word_embeddings", layout.tied) is False:
        missing.append((layout.heads[0], _resolved(layout.head, sizes)))
    foreign = [name for name in left.values() if not HARMLESS_INTEGERS.search(name)]
    if missing and not foreign:  # else what is missing may be there by another name
        yield _missing(missing, _base_of(layout, tensors), layout)
    if foreign and not missing and not any(part in name for name in foreign for part in LEGACY):
        kind = config["model_type"]
        yield Finding(f"{len(foreign)} tensor(s) do not belong to a {kind} model: {foreign[0][:120]}", MIXED)


def relative(layout: Layout, name: str) -> str:
    """The name of a tensor without what all names of its family may begin with."""
    base = next((base for base in layout.bases if name.startswith(base)), "")
    return name.removeprefix(base)


def _base_of(layout: Layout, tensors: Mapping[str, TensorEntry]) -> str:
    return next((base for base in layout.bases for name in tensors if name.startswith(base)), "")


def _wanted(layout: Layout, sizes: Sizes, names: Mapping[str, str], count: int, experts: int) -> Iterator[Wanted]:
    """Every tensor there has to be, but for the head; what may be left out, where a part of it is there."""
    outside = [layout.outside, *(group for group in layout.outside_may if any(name in names for name in group))]
    yield from _each("", outside, sizes)
    shared = [layout.block, *(group for group in layout.block_may if _in_a_block(layout, group, names, count))]
    for number in range(count):
        stem = f"{layout.blocks}.{number}."
        yield from _each(stem, shared, sizes)
        for expert in range(experts):
            for name, words in layout.experts.items():
                yield stem + name.format(expert), _resolved(words, sizes)


def _in_a_block(layout: Layout, group: Shapes, names: Mapping[str, str], count: int) -> bool:
    blocks = range(min(count, len(names)))
    return any(f"{layout.blocks}.{number}.{name}" in names for number in blocks for name in group)


def _each(stem: str, parts: list[Shapes], sizes: Sizes) -> Iterator[Wanted]:
    for part in parts:
        for name, words in part.items():
            yield stem + name, _resolved(words, sizes)


def _resolved(words: tuple[str, ...], sizes: Sizes) -> tuple[int | None, ...]:
    return tuple(sizes[word] for word in words)


def _check_shape(entry: TensorEntry, shape: tuple[int | None, ...]) -> Iterator[Finding]:
    fits = len(entry.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, entry.shape, strict=True)
    )
    if not fits:
        where = f"{entry.path.name}: tensor {entry.name[:120]!r} is {entry.shape}"
        yield Finding(f"{where}, {_shown(shape)} in a model of this config.json", MIXED)


def _missing(missing: list[Wanted], base: str, layout: Layout) -> Finding:
    name, shape = missing[0]
    count = str(len(missing)) if len(missing) < MOST_MISSING else f"{MOST_MISSING} or more"
    full = name if name in layout.heads else base + name
    return Finding(
        f"{count} tensor(s) are missing from the checkpoint: {full}, {_shown(shape)} in a model of this config.json",
        f"transformers would fill them with random numbers; {AGAIN}",
    )


def _shown(shape: tuple[int | None, ...]) -> str:
    """A shape as Python shows it, with `?` for what config.json does not tell."""
    return str(tuple("?" if size is None else size for size in shape)).replace("'", "")
