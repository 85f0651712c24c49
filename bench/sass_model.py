"""What the decoding kernels in CUDA C++ wait for on an H200, by a model: no GPU needed, and nothing measured.

    python bench/sass_model.py [--formats int4,nf4] [--warps 4,8] [--slots 2,3] [--terms 1,2] [--tokens 1]
        [--sources FOLDER] [--waits]

Machine code says after how many cycles and on which loads an instruction waits. One processor of the GPU is played
through with it: four schedulers that issue in order, the warps that registers and shared memory leave room for, one
unit for loads, and a share of the memory's bandwidth. Latencies are guesses (below), so times are for comparing kernels
with each other. `--terms 2` is the kernel that makes two bytes of each input. `--sources` has the .cu files of another
version, `--waits` names the instructions waited at most.
"""

import argparse
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from gpu_formats import FORMATS
from sass import disassembled

from llmcompress.kernels.nvrtc import compiler, small
from llmcompress.kernels.triton.layout import Packing, packing_of
from llmcompress.kernels.triton.tuning import Lean
from llmcompress.spec import LinearSpec

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (28672, 8192))
PROCESSORS, CLOCK, BANDWIDTH, NODE = 132, 1.755e9, 4.07e12, 1.13e-6  # the last two: measured, a copy and a graph's node
REGISTERS, SHARED, WARPS, BLOCKS = 1 << 16, 227 << 10, 64, 32  # that a processor holds
FIRST_CACHE, SECOND_CACHE, MEMORY, SHARED_LOAD = 38, 280, 850, 30  # cycles until a value is there
HALF_RATE = ("LOP3", "SHF", "PRMT", "IADD3", "ISETP", "LEA", "SEL", "VIADD", "VIMNMX", "IMNMX", "I2FP", "IDP")
OCCUPIED = {"HMMA": 8, "IMMA": 8, **dict.fromkeys(HALF_RATE, 2)}  # cycles that a scheduler's unit is busy
LOADS = {32: 2, 128: 4}  # cycles of the processor's unit for loads, by a lane's bits; the first as nf4 took on an H200
COLUMNS_AT_ONCE = 512  # of which a warp makes bytes
NEVER = float("inf")


@dataclass(frozen=True)
class Instruction:
    """`sets` is the scoreboard that a load takes, `waits` those that must be free before it is issued."""

    text: str
    operation: str
    predicated: bool
    stall: int
    sets: int | None
    waits: tuple[int, ...]


def instructions(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Those of nvdisasm's text with encodings, and the places of labels."""
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    line = ""
    for row in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", row):
            labels[label[1]] = len(found)
        elif first := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);\s*/\* 0x[0-9a-f]{16} \*/", row):
            line = first[1].strip()
        elif line and (second := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/", row)):
            found.append(_decoded(line, int(second[1], 16) >> 41))
            line = ""
    return found, labels


def _decoded(text: str, control: int) -> Instruction:
    """`control`: 4 bits of stall, 1 of yield, 3 and 3 of the scoreboards set, 6 of those waited for."""
    bare = re.sub(r"^@!?U?P\w+\s+", "", text)
    sets, waits = control >> 5 & 7, tuple(board for board in range(6) if control >> 11 & 1 << board)
    return Instruction(text, bare.split()[0], bare != text, max(control & 15, 1), sets if sets < 6 else None, waits)


@dataclass(frozen=True)
class Route:
    """What a warp does: at first, to make bytes of inputs, before the blocks of 16 rows, for each block, after them.

    making   one turn of that loop, a few units of inputs: stretches, each for one of the units or for all
    """

    first: Sequence[Instruction]
    making: Sequence[tuple[int | None, Sequence[Instruction]]]
    before: Sequence[Instruction]
    loop: Sequence[Instruction]
    after: Sequence[Instruction]


def route_of(found: list[Instruction], labels: dict[str, int]) -> Route:
    """The shortest loop with matrix instructions; branches in it that pass over loads are not taken."""

    def target(instruction: Instruction) -> int | None:
        name = re.search(r"\.L_x_\d+", instruction.text) if instruction.operation == "BRA" else None
        return labels.get(name[0]) if name else None

    spans = [(to, at) for at, instruction in enumerate(found) if (to := target(instruction)) is not None and to < at]
    with_products = [span for span in spans if any("MMA" in i.operation for i in found[slice(*span)])]
    first, last = min(with_products, key=lambda span: span[1] - span[0])
    loop, at = [], first
    while at <= last:
        loop.append(found[at])
        to = target(found[at])
        passes = to is not None and at < to <= last and not any("LDG" in i.operation for i in found[at:to])
        at = to if passes and to is not None else at + 1
    after = found[last + 1 :]
    end = next((at for at, i in enumerate(after) if i.operation.startswith("BAR")), len(after)) + 60
    rows = max((to for to, at in spans if to < first and at > last), default=first)
    making = next(((to, at) for to, at in spans if at < rows and _shuffles(found[to:at])), (rows, rows))
    return Route(found[: making[0]], _stretches(found, making, target), found[making[1] : first], loop, after[:end])


def _shuffles(span: Sequence[Instruction]) -> bool:
    return any(instruction.operation.startswith("SHFL") for instruction in span)


def _stretches(
    found: list[Instruction], span: tuple[int, int], target: Callable[[Instruction], int | None]
) -> list[tuple[int | None, list[Instruction]]]:
    """Of a loop that first loads every unit and then does its work, all of it under branches that may pass it over."""
    parts: list[tuple[bool, list[Instruction]]] = []
    at = begin = span[0]
    while at < span[1]:
        to, at = target(found[at]) or 0, at + 1
        if at < to <= span[1] and any(i.operation.startswith(("SHFL", "LDG")) for i in found[at:to]):
            parts += [(False, found[begin:at]), (True, found[at:to])]
            at = begin = to
    numbers, units = itertools.count(), max(sum(own for own, _ in parts) // 2, 1)
    return [(next(numbers) % units if own else None, part) for own, part in [*parts, (False, found[begin : span[1]])]]


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, its launch, and what its blocks are."""

    route: Route
    registers: int
    shared: int
    config: Lean
    packing: Packing
    tokens: int

    @property
    def resident(self) -> int:
        """Thread blocks on a processor."""
        warps = self.config.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32) // warps
        return max(min(by_registers, SHARED // (self.shared + 1024), WARPS // warps, BLOCKS), 1)

    def steps(self, warp: int, tiles: int) -> Iterator[Instruction]:
        """Of one warp and so many times 16 rows; what would bring blocks beyond the last is left out."""
        blocks = len(range(warp, self.packing.blocks, self.config.warps))
        ahead = self.config.slots - 1 if any("LDGSTS" in i.operation for i in self.route.loop) else 1
        begun = 0
        for instruction in self.route.first:
            begun += instruction.operation == "LDGDEPBAR"
            if begun < blocks * tiles or "LDGSTS" not in instruction.operation:
                yield instruction
        block = self.packing.planar.block if self.packing.planar else 0
        units = -(-blocks * block // COLUMNS_AT_ONCE) * self.tokens
        together = max((unit + 1 for unit, _ in self.route.making if unit is not None), default=0)
        for first in range(0, units, max(together, 1)):
            for unit, part in self.route.making:
                yield from part if unit is None or first + unit < units else ()
        for tile in range(tiles):
            yield from self.route.before
            for block in range(tile * blocks, (tile + 1) * blocks):
                for instruction in self.route.loop:
                    if block + ahead < blocks * tiles or not _brings(instruction):
                        yield instruction
            yield from self.route.after


def _brings(instruction: Instruction) -> bool:
    return "LDGSTS" in instruction.operation or ".NA" in instruction.operation


@dataclass
class Warp:
    """`groups`: when each group of copies is there."""

    steps: list[Instruction]
    block: int
    number: int
    ready: float
    at: int = 0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    groups: list[float] = field(default_factory=list)
    group: float = 0
    inputs: int = 0


class Processor:
    """The busiest of the GPU: it has its rows' thread blocks, and so much of the bandwidth as they need on average."""

    def __init__(self, kernel: Kernel, rows: int) -> None:
        self.kernel, tiles = kernel, -(-rows // small.ROWS)
        most = -(-tiles // PROCESSORS)
        self.blocks = min(most, kernel.resident) if kernel.config.terms == 2 else most
        self.speed = BANDWIDTH / PROCESSORS / CLOCK * most / (tiles / PROCESSORS)  # bytes in a cycle
        counts = [len(range(block, most, self.blocks)) for block in range(self.blocks)]  # of tiles
        warps = range(kernel.config.warps)
        programs = {tiles: [list(kernel.steps(warp, tiles)) for warp in warps] for tiles in set(counts)}
        self.programs = [programs[tiles] for tiles in counts]
        self.schedulers: list[list[Warp]] = [[] for _ in range(4)]
        self.units = [dict.fromkeys(OCCUPIED, 0.0) for _ in range(4)]
        self.loads = self.memory = self.end = 0.0
        self.begun = 0
        self.seen: dict[tuple[int, int], float] = {}
        self.barriers: dict[int, list[Warp]] = {}
        self.left: Counter[int] = Counter()
        self.waited: Counter[str] = Counter()

    def microseconds(self) -> float:
        """Of the whole kernel, as a node of a graph."""
        now = 0.0
        for _ in range(min(self.kernel.resident, self.blocks)):
            self._begin(now)
        while any(self.schedulers):
            issued = [self._issue(number, now) for number in range(4)]
            soonest = min((warp.ready for warps in self.schedulers for warp in warps), default=now)
            now = now + 1 if any(issued) else max(now + 1, float(int(soonest) + (soonest % 1 > 0)))
        return (self.end / CLOCK + NODE) * 1e6

    def _begin(self, now: float) -> None:
        block, self.begun = self.begun, self.begun + 1
        for number, steps in enumerate(self.programs[block]):
            warp = Warp(steps, block, number, now + 2 * number)
            self.schedulers[(block * self.kernel.config.warps + number) % 4].append(warp)
        self.left[block] = self.kernel.config.warps

    def _issue(self, scheduler: int, now: float) -> bool:
        """The oldest warp that can go on does its next instruction."""
        for warp in self.schedulers[scheduler]:
            if warp.ready > now:
                continue
            step = warp.steps[warp.at]
            free = max([now, *(warp.boards[board] for board in step.waits)])
            if step.operation.startswith("DEPBAR"):
                left = int(step.text.rpartition("0x")[2], 16)
                free = max([free, *warp.groups[: len(warp.groups) - left]])
            unit = next((name for name in OCCUPIED if step.operation.startswith(name)), None)
            free = max(free, self.units[scheduler][unit]) if unit else free
            if free > now:
                self.waited[step.text] += int(free - now)
                warp.ready = free
                continue
            if unit:
                self.units[scheduler][unit] = now + OCCUPIED[unit]
            self._do(warp, step, now)
            if warp.at == len(warp.steps):
                self.schedulers[scheduler].remove(warp)
                self._ended(warp, now)
            return True
        return False

    def _do(self, warp: Warp, step: Instruction, now: float) -> None:
        there = self._there(warp, step, now)
        if step.operation.startswith("LDGSTS"):
            warp.group = max(warp.group, there)
        if step.operation == "LDGDEPBAR":
            warp.groups.append(warp.group)
            warp.group = 0
        elif step.sets is not None:
            warp.boards[step.sets] = max(warp.boards[step.sets], there)
        warp.ready, warp.at = now + step.stall, warp.at + 1
        if step.operation.startswith("BAR"):
            waiting = self.barriers.setdefault(warp.block, [])
            waiting.append(warp)
            warp.ready = NEVER
            if len(waiting) == self.kernel.config.warps:
                for other in self.barriers.pop(warp.block):
                    other.ready = now + 20

    def _there(self, warp: Warp, step: Instruction, now: float) -> float:
        """When what an instruction loads is there."""
        name = step.operation
        if name.startswith("LDS") and not name.startswith("LDSM"):
            self.loads = max(self.loads, now) + LOADS[128 if ".128" in name else 32]
            return self.loads + SHARED_LOAD
        if not name.startswith("LDG") or name == "LDGDEPBAR":
            return now + SHARED_LOAD
        scales = (
            (step.predicated and "LDGSTS" in name) or ".U16" in name or ".U8" in name or name.endswith("E.CONSTANT")
        )
        if scales or _brings(step):
            size = (64 if "LDGSTS" in name else 16) if scales else 512
            self.loads = max(self.loads, now) + (1 if scales else 8)
            self.memory = max(self.memory, now) + size / self.speed
            return max(self.loads + MEMORY, self.memory + 0.6 * MEMORY)
        self.loads = max(self.loads, now) + LOADS[128]
        warp.inputs += 1
        first = self.seen.setdefault((warp.number, warp.inputs), self.loads + SECOND_CACHE)
        return max(first, self.loads + FIRST_CACHE)

    def _ended(self, warp: Warp, now: float) -> None:
        self.left[warp.block] -= 1
        self.end = max(self.end, now)
        if not self.left[warp.block] and self.begun < self.blocks:
            self._begin(now + 300)


def kernel_of(spec: LinearSpec, columns: int, config: Lean, *, tokens: int, sources: Path) -> Kernel:
    """Of inputs in bfloat16, compiled for compute capability 9.0."""
    packing, nvrtc = packing_of(spec, columns), compiler.library()
    if nvrtc is None:
        raise SystemExit("NVRTC is not installed")
    scale = torch.float32 if packing.table else torch.bfloat16
    made = small.definitions(packing, torch.bfloat16, scale, tokens=tokens, config=config, whole=True)
    source = compiler.source_of(("decode", "twoterm")[config.terms - 1], sources)
    code = compiler.compiled(source, dict(made), "sm_90", nvrtc)
    text, uses = disassembled(code, "-hex")
    route = route_of(*instructions(text))
    ring = small.shared_bytes(packing, scale, tokens=tokens, config=config, whole=True)
    asynchronous = any("LDGSTS" in instruction.operation for instruction in route.loop)
    return Kernel(route, uses["REG"], uses["SHARED"] + ring * asynchronous, config, packing, tokens)


def main() -> None:
    """A line for each format and configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--warps", default="4,8")
    parser.add_argument("--slots", default="2")
    parser.add_argument("--terms", default="1")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--sources", type=Path, default=compiler.FOLDER)
    parser.add_argument("--waits", action="store_true")
    options = parser.parse_args()
    print(f"microseconds of {options.tokens} tokens, by the model:", *(f"{rows}x{columns}" for rows, columns in SHAPES))
    choices = [[int(number) for number in given.split(",")] for given in (options.warps, options.slots, options.terms)]
    for name, warps, slots, terms in itertools.product(options.formats.split(","), *choices):
        times, waits = [], Counter[str]()
        for rows, columns in SHAPES:
            config = Lean(warps, slots, terms=terms)
            kernel = kernel_of(FORMATS[name], columns, config, tokens=options.tokens, sources=options.sources)
            processor = Processor(kernel, rows)
            times.append(processor.microseconds())
            waits = processor.waited
        print(f"{name:<6} {warps:>2} warps, {slots} slots, {terms} terms, {kernel.registers:>3} registers, "
              f"{kernel.resident} resident:", *(f"{time:6.1f}" for time in times), flush=True)  # fmt: skip
        for text, cycles in waits.most_common(8) if options.waits else []:
            print(f"    {cycles:>9} cycles before {text}")


if __name__ == "__main__":
    main()
