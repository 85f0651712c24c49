"""Which settings of which peer run in which cell.

Where a peer has several settings that could be its best, all of them run: the best one counts. Uniform cells have an
integer width; a fractional one is the mix cell, an average over the linears.
"""

from dataclasses import dataclass, field
from typing import Any

REVISION = 2  # raise it when a runner changes what it would find: cached results of older ones are not used


@dataclass(frozen=True)
class Variant:
    """One way to use a peer. `gptq` marks the GPTQ family; empty `widths` or `groups` mean every one."""

    peer: str
    name: str
    settings: dict[str, Any]
    gptq: bool = False
    widths: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    mix: bool = False
    note: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        return f"{self.peer} {self.name}"

    def fits(self, bits: float, group_size: int) -> bool:
        """Whether this can be asked for in a cell."""
        if self.mix or bits != int(bits):
            return self.mix and bits != int(bits)
        return (not self.widths or int(bits) in self.widths) and (not self.groups or group_size in self.groups)


def _gptqmodel() -> list[Variant]:
    """By default it orders by activation within and among groups; `act`: the classical order; `mse` searches scales."""
    parts: dict[str, dict[str, Any]] = {
        "gptq": {"sym": True},
        "gptaq": {"sym": True, "gptaq": 0.25},
        "foem": {"sym": True, "foem": {"beta": 0.2}},
        "mse": {"mse": 2.4},
        "act": {"desc_act": True},
        "asym": {"sym": False},
    }
    names = ("gptq", "gptq mse", "gptq act mse", "gptq asym mse", "gptaq", "gptaq mse", "gptaq act mse",
             "gptaq asym mse", "foem mse")  # fmt: skip
    found = []
    for name in names:
        settings = {key: value for word in name.split() for key, value in parts[word].items()}
        found.append(Variant("gptqmodel", name, settings, gptq=True))
    return found


def _llmcompressor() -> list[Variant]:
    found = []
    for search, more in (("", {}), (" mse", {"observer": "memoryless_mse"})):
        for sides, symmetric in (("", True), (" asym", False)):
            settings = {"method": "gptq", "symmetric": symmetric, **more}
            found.append(Variant("llmcompressor", "gptq" + sides + search, settings, gptq=True))
    for sides, symmetric in (("", True), (" asym", False)):
        found.append(Variant("llmcompressor", "awq" + sides, {"method": "awq", "symmetric": symmetric}))
    return found


def _auto_round() -> list[Variant]:
    """Symmetric is its default; its makers advise asymmetric codes for 2 bits only."""
    found = [
        Variant("auto_round", "rtn", {"iters": 0, "sym": True}),
        Variant("auto_round", "rtn asym", {"iters": 0, "sym": False}),
        Variant("auto_round", "signround", {"iters": 200, "sym": True}),
        Variant("auto_round", "signround asym", {"iters": 200, "sym": False}, widths=(2,)),
    ]
    for options in ([2, 3, 4, 8], [3, 4]):
        name = f"autoscheme {'/'.join(map(str, options))}"
        settings = {"iters": 200, "sym": True, "options": options}
        found.append(Variant("auto_round", name, settings, mix=True))
    return found


VARIANTS: tuple[Variant, ...] = (
    Variant("hqq", "hqq", {"axis": 1}),
    Variant("hqq", "hqq axis 0", {"axis": 0}),
    Variant("torchao", "intx", {"scales": "affine"}),
    Variant("torchao", "intx hqq", {"scales": "hqq_scale_only"}),
    Variant("quanto", "max", {"scales": "max"}, widths=(2, 4), groups=(128,), note="group size by itself"),
    Variant("quanto", "hqq", {"scales": "hqq"}, widths=(2, 4), groups=(128,), note="group size by itself"),
    Variant("bitsandbytes", "nf4", {"bnb_4bit_use_double_quant": False}, widths=(4,), groups=(64,)),
    Variant("bitsandbytes", "nf4 double", {"bnb_4bit_use_double_quant": True}, widths=(4,), groups=(64,)),
    *_llmcompressor(),
    *_gptqmodel(),
    *_auto_round(),
)
PEERS = tuple(dict.fromkeys(variant.peer for variant in VARIANTS))
