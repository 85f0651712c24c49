"""How config.json names linears in a compressed-tensors section: singly, or the experts of some blocks by a pattern.

Runtimes that keep experts fused look for a pattern that speaks of experts, or for names of their own under it; both
find this one. Only patterns of this very form are read: those of strangers are not run.
"""

import re
from collections.abc import Iterable

FORM = re.compile(r"re:\.\*\\\.\((\d+(?:\|\d+)*)\)\\\.\[\\w\.\]\+\\\.experts\\\.\\d\+\\\.\\w\+\$")
EXPERT = re.compile(r"(?:.*\.)?(\d+)\.[\w.]+\.experts\.\d+\.\w+")


def experts_target(blocks: Iterable[int]) -> str:
    """The pattern that matches every linear of every expert of these blocks, and nothing else."""
    return rf"re:.*\.({'|'.join(map(str, blocks))})\.[\w.]+\.experts\.\d+\.\w+$"


def blocks_of(target: str) -> tuple[int, ...]:
    """The blocks such a pattern speaks of; none for any other target."""
    found = FORM.fullmatch(target)
    return tuple(map(int, found[1].split("|"))) if found else ()


def block_of_expert(stem: str) -> int | None:
    """The block of a linear, by name, where it is an expert's."""
    found = EXPERT.fullmatch(stem)
    return int(found[1]) if found else None
