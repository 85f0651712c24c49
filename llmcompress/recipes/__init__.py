"""What a user may ask for: the recipe schema, and the ready-made recipes beside this file."""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from llmcompress.errors import InputError
from llmcompress.files import LARGEST_NUMBER, parse_yaml, read_small
from llmcompress.options import RewriteOptions, ScorerOptions
from llmcompress.plugins import nearest
from llmcompress.runtimes import Runtime, RuntimeWord, find_runtime
from llmcompress.types import Noun, QuantizerOptions

LARGEST_BYTES = 1 << 20
SUFFIX = ".yaml"
DEFAULT = "balanced"
NAME_TABLES = ("plan.pin", "plan.candidates")  # their keys are names of linears


class CalibrationPart(Noun):
    """The text that is run through the model, and how much of it scoring uses."""

    source: str = "builtin"
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=512, ge=8)
    score_samples: int = Field(default=32, ge=1)
    batch_size: int = Field(default=8, ge=1)


class PlanPart(Noun):
    """The formats a linear may get, and how one is chosen for each.

    `program` spends the budget; `ratio` is for `twotier` with one width: it chooses the share of wide columns of each
    unit. `trials` carries a few other allocations out and takes the best; `exchange` is the most rounds of measured
    exchange afterwards.

    `pin` fixes the width of the linears a name stands for, `candidates` lists the widths they may have. A
    name is a linear's full name, its last component, or a pattern (`*`, `?`, `[...]`) on the full name.
    `voids` also tries to drop whole blocks for bits elsewhere, and does it where that measures better.
    `head_bits` are the widths of the output head where the budget counts the whole file; empty leaves it alone.
    `experts`: all experts of a `model` share one format, which is what plain transformers reads, or those of a `block`.
    `runtime` is the program the result is for: widths and groups are then those that it takes, and so are formats.
    """

    runtime: RuntimeWord = "any"
    bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    group_size: int = Field(default=128, ge=32)
    trials: bool = True
    program: Literal["integer", "quadratic", "order", "ratio"] = "integer"
    exchange: int = Field(default=0, ge=0)
    voids: bool = False
    pin: dict[str, int] = Field(default_factory=dict)
    candidates: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    head_bits: tuple[int, ...] = (4, 6, 8)
    experts: Literal["model", "block"] = "model"


class Recipe(Noun):
    """Everything a run can be told, with defaults; unknown keys are refused."""

    name: str = DEFAULT
    description: str = ""
    scorer: str = "fisher"
    quantizer: str = "gptq"
    calibration: CalibrationPart = CalibrationPart()
    rewrite: RewriteOptions = RewriteOptions()
    plan: PlanPart = PlanPart()
    score: ScorerOptions = ScorerOptions()
    quantize: QuantizerOptions = QuantizerOptions()
    seed: int = Field(default=0, ge=0)


def recipe_names() -> tuple[str, ...]:
    """Names of the ready-made recipes."""
    folder = resources.files(__name__)
    return tuple(sorted(p.name.removesuffix(SUFFIX) for p in folder.iterdir() if p.name.endswith(SUFFIX)))


def recipe_text(word: str) -> tuple[str, str]:
    """The YAML of a ready-made recipe or of a file, and what to call it in messages. Raises InputError."""
    if word in recipe_names():
        return (resources.files(__name__) / f"{word}{SUFFIX}").read_text(encoding="utf-8"), word
    path = Path(word)
    if not path.suffix and not path.exists():
        raise InputError(f"unknown recipe: {word}", nearest(word, recipe_names()))
    try:
        return read_small(path, LARGEST_BYTES).decode(), path.name
    except UnicodeDecodeError:
        raise InputError(f"recipe {word}: not UTF-8 text", "save it as UTF-8") from None
    except InputError as error:
        raise InputError(f"recipe {error.what}", "give a file, or one of: " + ", ".join(recipe_names())) from None


def load_recipe(word: str, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe and apply `key=value` changes to it.

    Raises InputError naming the key and the place; keys are dotted, e.g. `plan.group_size=64`.
    """
    text, where = recipe_text(word)
    document = parse_yaml(text, where)
    if not isinstance(document, dict):
        raise InputError(f"{where}: a recipe is a list of `key: value` lines", "see `llmcompress list recipes`")
    for change in changes:
        _apply_change(document, change)
    return _validated(document, where)


def _apply_change(document: dict[str, Any], change: str) -> None:
    key, equals, value = change.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {change}: write it as key=value", "for example --set plan.group_size=64")
    *path, leaf = _parts(key.strip())
    place = document
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise InputError(f"--set {change}: {part} has no parts", "for example --set plan.group_size=64")
    place[leaf] = parse_yaml(value, f"--set {change}")


def _parts(key: str) -> list[str]:
    """The places a dotted key leads through; what follows a table of names is one name, dots and all."""
    for table in NAME_TABLES:
        if key.startswith(table + ".") and key != table + ".":
            return [*table.split("."), key.removeprefix(table + ".")]
    return key.split(".")


def _keys(model: type[Noun] = Recipe, prefix: str = "") -> tuple[str, ...]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, Noun):
            names += _keys(part, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return tuple(names)


def _beyond(value: Any, place: str = "") -> Iterator[str]:
    """Places of whole numbers that are larger than anything counted."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from _beyond(part, f"{place}.{key}" if place else str(key))
    if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        yield place


def _validated(document: dict[str, Any], where: str) -> Recipe:
    for place in _beyond(document):
        raise InputError(f"{where}: {place}: more than {LARGEST_NUMBER}", "give a smaller number")
    try:
        recipe = Recipe.model_validate_json(json.dumps(document, default=str))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        hint = nearest(place, _keys()) if first["type"] == "extra_forbidden" else "see `llmcompress list recipes`"
        what = "no such key" if first["type"] == "extra_forbidden" else first["msg"]
        raise InputError(f"{where}: {place}: {what}", hint) from None
    check_widths(recipe.plan, where)
    if recipe.plan.runtime == "any":
        return recipe
    return recipe.model_copy(update={"plan": _for_runtime(recipe.plan, find_runtime(recipe.plan.runtime), where)})


def _for_runtime(part: PlanPart, runtime: Runtime, where: str) -> PlanPart:
    """The part with the widths and the group size that a runtime takes. Raises InputError where one list has none."""
    wanted = runtime.plan

    def kept(key: str, widths: tuple[int, ...]) -> tuple[int, ...]:
        found = tuple(width for width in widths if width in wanted.bits)
        if not found:
            allowed = ", ".join(map(str, wanted.bits))
            what = f"{where}: plan.{key}: {list(widths)}: {runtime.words} takes {allowed} bits"
            raise InputError(what, f"choose among them, or plan for another runtime than {runtime.name}")
        return found

    for name, width in part.pin.items():
        kept(f"pin.{name}", (width,))
    sizes = wanted.group_sizes or (part.group_size,)
    changes = {
        "bits": kept("bits", part.bits),
        "candidates": {name: kept(f"candidates.{name}", widths) for name, widths in part.candidates.items()},
        "head_bits": tuple(width for width in part.head_bits if width in wanted.bits),
        "group_size": max((size for size in sizes if size <= part.group_size), default=min(sizes)),
    }
    return part.model_copy(update=changes)


def check_widths(part: PlanPart, where: str) -> None:
    """Raises InputError naming the key whose list of widths is empty, or holds one outside 2 to 8."""
    lists = {"bits": part.bits, **{f"candidates.{name}": widths for name, widths in part.candidates.items()}}
    lists |= {f"pin.{name}": (width,) for name, width in part.pin.items()}
    if part.head_bits:
        lists["head_bits"] = part.head_bits
    for key, widths in lists.items():
        wrong = [width for width in widths if not 2 <= width <= 8]
        if wrong or not widths:
            hint = "give widths from 2 to 8, e.g. [2, 3, 4, 5, 6, 8]"
            raise InputError(f"{where}: plan.{key}: {wrong or 'empty'}", hint)
