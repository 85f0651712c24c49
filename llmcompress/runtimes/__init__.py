"""Which program opens which checkpoint, and whether the weights stay packed there: one table, `runtimes.json`.

A *door* is one layout that a runtime opens, with the terms a checkpoint has to meet, the version that was looked at,
and whether that version was run (`run`) or only its source read (`read`). `exports` says what `llmcompress export`
makes of a checkpoint that a runtime does not open as it is. No torch: `plan` asks before any work begins.
"""

from functools import cache
from importlib import resources
from typing import Literal

from llmcompress.errors import InputError
from llmcompress.plugins import nearest
from llmcompress.spec import PER_ROW, WORD_BITS, InputsWord, Kind, LinearSpec, Noun

Layout = Literal["compressed-tensors", "bitsandbytes", "native", "gptq", "gguf", "plain"]
RuntimeWord = Literal["any", "transformers", "vllm", "sglang", "llamacpp", "bnb", "gptqmodel", "llmcompress"]
TABLE = "runtimes.json"
ROW = 0  # as a group size: one scale for a whole row


class Weight(Noun):
    """One quantized linear: its format and its shape. `transposed` marks GPT-2's Conv1D, `expert` those of mixtures."""

    name: str
    spec: LinearSpec
    rows: int
    columns: int
    transposed: bool = False
    expert: bool = False

    @property
    def group_size(self) -> int:
        """Weights that share a scale; 0 for a whole row."""
        whole = self.spec.kind in PER_ROW or self.spec.group_size == self.columns
        return ROW if whole else self.spec.group_size


class Terms(Noun):
    """What a checkpoint has to be like. What is not said is no condition.

    kinds, bits    of every format; `groups`: sizes of groups, 0 a whole row; `group_multiple` divides every size
    inputs, caches what inputs of linears, and keys and values, may be rounded to; `inputs_kinds`: beside which weights
    experts        whether packed experts are opened, and whether those of a block or of the model share a format
    uniform        one format for all linears; `fused`: these linears of one module share a format
    rows, columns  divide the sides of what is packed, the rows those of fused linears together
    words          rows and columns of codes fill words of 32 bits
    """

    kinds: tuple[Kind, ...] | None = None
    bits: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    group_multiple: int = 1
    inputs: tuple[InputsWord, ...] = ("none",)
    inputs_kinds: tuple[Kind, ...] | None = None
    caches: tuple[Literal["none", "int8", "fp8"], ...] = ("none",)
    softmax: bool = False
    high: bool = False
    rank: bool = False
    transposed: bool = False
    experts: Literal["none", "model", "block", "any"] = "none"
    uniform: bool = False
    fused: tuple[tuple[str, ...], ...] = ()
    rows: int = 1
    columns: int = 1
    words: bool = False
    families: tuple[str, ...] | None = None

    def fault(self, weight: Weight) -> str | None:
        """What is wrong with one linear, None where nothing is."""
        spec = weight.spec
        if self.kinds is not None and spec.kind not in self.kinds:
            return f"{spec.kind}, where it opens {_list(self.kinds)}" if self.kinds else "packed"
        return self._fault_of_format(weight) or self._fault_of_shape(weight)

    def _fault_of_format(self, weight: Weight) -> str | None:
        spec, size = weight.spec, weight.group_size
        inputs = "none" if spec.inputs is None else spec.inputs.label
        faults = {
            "packed experts": weight.expert and self.experts == "none",
            "GPT-2's Conv1D": weight.transposed and not self.transposed,
            f"{spec.bits} bits, where it opens {_list(self.bits or ())}": self.bits and spec.bits not in self.bits,
            "two widths in one linear": spec.high_share and not self.high,
            "a low-rank correction": spec.rank and not self.rank,
            f"inputs rounded to {inputs}": inputs not in self.inputs,
            f"inputs rounded beside {spec.kind} weights": inputs != "none"
            and self.inputs_kinds is not None
            and spec.kind not in self.inputs_kinds,
            f"groups of {size}, where it opens {_list(self.groups or ())}": self.groups and size not in self.groups,
            f"groups of {size}, where it wants multiples of {self.group_multiple}": size % self.group_multiple,
        }
        return next((words for words, true in faults.items() if true), None)

    def _fault_of_shape(self, weight: Weight) -> str | None:
        bits = weight.spec.bits
        if weight.spec.kind not in PER_ROW and weight.columns % self.columns:
            return f"{weight.columns} inputs, where it wants multiples of {self.columns}"
        if self.words and (weight.rows * bits % WORD_BITS or weight.columns * bits % WORD_BITS):
            return f"{weight.rows} x {weight.columns} codes of {bits} bits do not fill words of {WORD_BITS} bits"
        return None


class Door(Noun):
    """A layout that a runtime opens. `needs` names what has to be there besides the runtime itself."""

    layout: Layout
    packed: bool
    needs: str = ""
    checked: Literal["run", "read"]
    source: str
    terms: Terms


class PlanFor(Noun):
    """What a plan for a runtime aims at: layouts, widths, and group sizes, the first being the usual one."""

    layouts: tuple[Layout, ...]
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...] = ()


class Runtime(Noun):
    """A program that opens checkpoints."""

    name: RuntimeWord
    title: str
    version: str
    plan: PlanFor
    doors: tuple[Door, ...]

    @property
    def words(self) -> str:
        """Title and version."""
        return f"{self.title} {self.version}".strip()

    def door(self, layout: str) -> Door | None:
        """How it opens a layout, None where it does not."""
        return next((door for door in self.doors if door.layout == layout), None)


class LayoutTerms(Noun):
    """What a layout that `quantize` writes can hold."""

    layout: Layout
    terms: Terms


class Export(Noun):
    """What `llmcompress export` can write: what it carries over exactly, and what becomes of everything else."""

    format: str
    layout: Layout
    exact: Terms
    otherwise: str


class Table(Noun):
    """All of `runtimes.json`. Layouts are in the order in which `quantize` prefers them."""

    version: Literal[1]
    read_on: str
    layouts: tuple[LayoutTerms, ...]
    exports: tuple[Export, ...]
    runtimes: tuple[Runtime, ...]


@cache
def table() -> Table:
    """The table as shipped."""
    return Table.parse(resources.files(__name__).joinpath(TABLE).read_bytes(), TABLE)


def runtime_names() -> tuple[str, ...]:
    """The words `--runtime` takes."""
    return tuple(runtime.name for runtime in table().runtimes)


def find_runtime(name: str) -> Runtime:
    """One runtime. Raises InputError with the nearest names."""
    found = next((runtime for runtime in table().runtimes if runtime.name == name), None)
    if found is None:
        raise InputError(f"unknown runtime: {name}", nearest(name, runtime_names()))
    return found


def _list(values: tuple[object, ...]) -> str:
    return ", ".join("whole rows" if value == ROW else str(value) for value in values)
