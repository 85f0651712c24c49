"""Read what a compiler made, without a GPU: registers, spills, shared memory, the loop."""

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
UNALIGNED = ("M", "first", "last")  # sizes that need not be multiples of 16


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs, and the instructions of its largest loop, or of all of it where it has none."""

    registers: int
    stack: int
    shared: int
    loop: tuple[str, ...]

    @property
    def operations(self) -> Counter[str]:
        """How often each operation with its qualifiers occurs in the loop."""
        return Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in self.loop)

    def count(self, stem: str) -> int:
        """Instructions of the loop whose operation begins with `stem`."""
        return sum(number for name, number in self.operations.items() if name.startswith(stem))


def compiled(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], target: tuple[int, int, int]
) -> Compiled:
    """`kernel` for arguments of `types` (`*bf16`, `i32`) and constants; `target` is (80 or 90, warps, stages)."""
    capability, warps, stages = target
    names = list(inspect.signature(kernel.fn).parameters)
    divisible = [n for n, t in types.items() if t.startswith("*") or (t == "i32" and n not in UNALIGNED)]
    source = ASTSource(
        fn=kernel,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
    )
    made = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}
    )
    return read(made.asm["cubin"], made.metadata.shared)


def read(cubin: bytes, shared: int) -> Compiled:
    """Machine code that needs so many bytes of shared memory."""
    text, uses = disassembled(cubin)
    return Compiled(uses["REG"], uses["STACK"], shared, _loop(text))


def disassembled(cubin: bytes, *options: str) -> tuple[str, dict[str, int]]:
    """What nvdisasm prints, and what the kernel uses: REG of a thread, STACK and SHARED in bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _tool("nvdisasm", "-c", *options, file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    return text, {word: int(re.findall(rf"{word}:(\d+)", usage)[-1]) for word in ("REG", "STACK", "SHARED")}


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _loop(text: str) -> tuple[str, ...]:
    """The longest stretch between a label and a branch back to it."""
    lines, spans = _spans(text)
    first, last = max(spans, key=lambda span: span[1] - span[0], default=(0, len(lines) - 1))
    return tuple(lines[first : last + 1])


def loop_with(text: str, operation: str) -> tuple[str, ...]:
    """The shortest of nvdisasm's loops that has the operation."""
    lines, spans = _spans(text)
    having = [span for span in spans if any(operation in line for line in lines[span[0] : span[1]])]
    first, last = min(having, key=lambda span: span[1] - span[0])
    return tuple(lines[first : last + 1])


def _spans(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Instructions, and from where to where loops go, both included."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            lines.append(found[1].strip())
    spans = []
    for end, line in enumerate(lines):
        if (branch := re.search(r"\bBRA\b.*(\.L_x_\d+)", line)) and labels.get(branch[1], end) < end:
            spans.append((labels[branch[1]], end))
    return lines, spans
