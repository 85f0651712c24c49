"""What the decoding kernel in CUDA C++ waits for on an H200, by a model: no GPU needed, and nothing measured.

    python bench/sass_model.py [--formats int4,nf4] [--warps 4,8] [--slots 2,3] [--sources FOLDER] [--waits]

Machine code says after how many cycles and on which loads an instruction waits. One processor of the GPU is played
through with it: four schedulers that issue in order, the warps that registers and shared memory leave room for, one
unit for loads, and a share of the memory's bandwidth. Latencies are guesses (below), so times are for comparing kernels
with each other. `--sources` has the .cu files of another version, `--waits` names the instructions waited at most.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Sequence
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
HALF_RATE = ("LOP3", "SHF", "PRMT", "IADD3", "ISETP", "LEA", "SEL", "VIADD", "VIMNMX", "IMNMX")
OCCUPIED = {"HMMA": 8, **dict.fromkeys(HALF_RATE, 2)}  # cycles that a scheduler's unit is busy
LOADS = {32: 2, 128: 4}  # cycles of the processor's unit for loads, by a lane's bits; the first as nf4 took on an H200
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
    """What a warp does: once before its blocks, for each of them, once after."""

    before: Sequence[Instruction]
    loop: Sequence[Instruction]
    after: Sequence[Instruction]


def route_of(found: list[Instruction], labels: dict[str, int]) -> Route:
    """The shortest loop with matrix instructions; branches in it that pass over loads are not taken."""

    def target(instruction: Instruction) -> int | None:
        name = re.search(r"\.L_x_\d+", instruction.text) if instruction.operation == "BRA" else None
        return labels.get(name[0]) if name else None

    spans = [(to, at) for at, instruction in enumerate(found) if (to := target(instruction)) is not None and to < at]
    with_products = [span for span in spans if any(i.operation.startswith("HMMA") for i in found[slice(*span)])]
    first, last = min(with_products, key=lambda span: span[1] - span[0])
    loop, at = [], first
    while at <= last:
        loop.append(found[at])
        to = target(found[at])
        passes = to is not None and at < to <= last and not any("LDG" in i.operation for i in found[at:to])
        at = to if passes and to is not None else at + 1
    after = found[last + 1 :]
    end = next((at for at, i in enumerate(after) if i.operation.startswith("BAR")), len(after)) + 60
    return Route(found[:first], loop, after[:end])


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, its launch, and what its blocks are."""

    route: Route
    registers: int
    shared: int
    config: Lean
    packing: Packing

    @property
    def resident(self) -> int:
        """Thread blocks on a processor."""
        warps = self.config.warps
        by_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32) // warps
        return max(min(by_registers, SHARED // (self.shared + 1024), WARPS // warps, BLOCKS), 1)

    def steps(self, warp: int) -> Iterator[Instruction]:
        """Of one warp; what would bring blocks beyond the last is left out."""
        blocks = len(range(warp, self.packing.blocks, self.config.warps))
        ahead = self.config.slots - 1 if any("LDGSTS" in i.operation for i in self.route.loop) else 1
        begun = 0
        for instruction in self.route.before:
            begun += instruction.operation == "LDGDEPBAR"
            if begun < blocks or "LDGSTS" not in instruction.operation:
                yield instruction
        for block in range(blocks):
            for instruction in self.route.loop:
                if block + ahead < blocks or not _brings(instruction):
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
        self.blocks = -(-tiles // PROCESSORS)
        self.speed = BANDWIDTH / PROCESSORS / CLOCK * self.blocks / (tiles / PROCESSORS)  # bytes in a cycle
        self.programs = [list(kernel.steps(warp)) for warp in range(kernel.config.warps)]
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
        for number, steps in enumerate(self.programs):
            warp = Warp(steps, block, number, now + 2 * number)
            self.schedulers[(block * len(self.programs) + number) % 4].append(warp)
        self.left[block] = len(self.programs)

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
            if len(waiting) == len(self.programs):
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


def kernel_of(spec: LinearSpec, columns: int, config: Lean, sources: Path) -> Kernel:
    """One token in bfloat16, compiled for compute capability 9.0."""
    packing, nvrtc = packing_of(spec, columns), compiler.library()
    if nvrtc is None:
        raise SystemExit("NVRTC is not installed")
    scale = torch.float32 if packing.table else torch.bfloat16
    made = small.definitions(packing, torch.bfloat16, scale, tiles=1, config=config, whole=True)
    source = b"".join((sources / f"{part}.cu").read_bytes() for part in ("ptx", "codes", "decode"))
    code = compiler.compiled(source, dict(made), "sm_90", nvrtc)
    text, uses = disassembled(code, "-hex")
    route = route_of(*instructions(text))
    ring = config.warps * config.slots * small.slot_bytes(packing, scale, True)
    asynchronous = any("LDGSTS" in instruction.operation for instruction in route.loop)
    return Kernel(route, uses["REG"], uses["SHARED"] + ring * asynchronous, config, packing)


def main() -> None:
    """A line for each format and configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--warps", default="4,8")
    parser.add_argument("--slots", default="2")
    parser.add_argument("--sources", type=Path, default=compiler.FOLDER)
    parser.add_argument("--waits", action="store_true")
    options = parser.parse_args()
    print("microseconds of one token, by the model:", *(f"{rows}x{columns}" for rows, columns in SHAPES))
    for name in options.formats.split(","):
        for warps in map(int, options.warps.split(",")):
            for slots in map(int, options.slots.split(",")):
                times, waits = [], Counter[str]()
                for rows, columns in SHAPES:
                    kernel = kernel_of(FORMATS[name], columns, Lean(warps, slots), options.sources)
                    processor = Processor(kernel, rows)
                    times.append(processor.microseconds())
                    waits = processor.waited
                print(f"{name:<6} {warps:>2} warps, {slots} slots, {kernel.registers:>3} registers, "
                      f"{kernel.resident} resident:", *(f"{time:6.1f}" for time in times), flush=True)  # fmt: skip
                for text, cycles in waits.most_common(8) if options.waits else []:
                    print(f"    {cycles:>9} cycles before {text}")


if __name__ == "__main__":
    main()
