"""Words of config.json that the installed transformers does not know, read from its source: its import takes seconds.

Where it was imported already, other code may have taught it more words, and where its source looks unfamiliar nothing
can be said; both are left to the library.
"""

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmcompress.errors import Finding
from llmcompress.plugins import nearest
from llmcompress.preflight.layouts import LAYOUTS

TYPES = ("models/auto/auto_mappings.py", "models/auto/configuration_auto.py")
# without rotations, with older names of them, with one for each kind of block
OTHER_ROTATIONS = ("gpt2", "opt", "bloom", "phi3", "gemma3_text")


def check_words(config: Mapping[str, Any]) -> Iterator[Finding]:
    """A type, an activation or a rotation of config.json that the installed transformers has not."""
    spec = None if "transformers" in sys.modules else importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return
    root, kind = Path(spec.origin).parent, config.get("model_type")
    types = known_types(root) if kind not in LAYOUTS else frozenset()
    if types and isinstance(kind, str) and kind not in types:
        yield Finding(f"config.json: no causal language model of type {kind!r}", nearest(kind, tuple(sorted(types))))
    layout = LAYOUTS.get(str(kind))
    if layout is None:
        return
    activation = config.get(layout.activation)
    activations = known_activations(root) if isinstance(activation, str) else frozenset()
    if activations and activation not in activations:
        what = f"config.json: {layout.activation} is {activation}, no activation that transformers knows"
        yield Finding(what, nearest(str(activation), tuple(sorted(activations))))
    rotation = None if kind in OTHER_ROTATIONS else _rotation(config)
    rotations = known_rotations(root) if rotation is not None else frozenset()
    if rotations and rotation not in rotations:
        what = f"config.json: rope_type is {str(rotation)[:40]!r}, no rotation that transformers knows"
        yield Finding(what, nearest(str(rotation), tuple(sorted(rotations))))


def known_types(root: Path) -> frozenset[str]:
    """Types of models that the transformers at `root` knows, and other names; empty where it looks unfamiliar."""
    found = frozenset(key for name in TYPES for table in _tables(root / name) for key in table)
    return found if {"llama", "gpt-sw3"} <= found else frozenset()


def known_activations(root: Path) -> frozenset[str]:
    """Names of activations that it knows; empty where it looks unfamiliar."""
    return next((table for table in _tables(root / "activations.py") if {"gelu", "silu"} <= table), frozenset())


def known_rotations(root: Path) -> frozenset[str]:
    """Kinds of rotations that its classes know; empty where it looks unfamiliar."""
    tables = _tables(root / "modeling_rope_utils.py")
    return next((table | {"default"} for table in tables if {"linear", "yarn"} <= table), frozenset())


def _tables(path: Path) -> Iterator[frozenset[str]]:
    """The keys of every table in a file, `{"key": ...}` or `[("key", ...), ...]`; nothing where it cannot be read."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return
    for node in ast.walk(tree):
        keys: list[ast.expr | None] = list(node.keys) if isinstance(node, ast.Dict) else []
        if isinstance(node, ast.List):
            keys = [pair.elts[0] for pair in node.elts if isinstance(pair, ast.Tuple) and len(pair.elts) == 2]
        yield frozenset(key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def _rotation(config: Mapping[str, Any]) -> str | None:
    """The kind of rotation of all blocks, where config.json says it in one place."""
    sections = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key) is not None]
    section = sections[0] if len(sections) == 1 else None
    kind = section.get("rope_type", section.get("type")) if isinstance(section, dict) else None
    return kind if isinstance(kind, str) else None
