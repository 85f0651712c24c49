"""The one number the user gives, read into bits."""

import re
from dataclasses import dataclass
from typing import Literal

from llmcompress.errors import InputError

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
FORMS = "write it as 3.5bits (linears), 3.5bits/file (whole checkpoint), or a size: 4.2GB, 4GiB, 300MB"
PATTERN = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>[a-z]+)(?P<file>/file)?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A limit. `linears`: bits per weight over the quantized linears; `file`: over the whole checkpoint;
    `bytes`: size of the whole checkpoint. The whole checkpoint is the weight shards, headers included."""

    text: str
    kind: Literal["linears", "file", "bytes"]
    amount: float


def parse_budget(text: str) -> Budget:
    """Read a budget. Raises InputError with the forms that are understood."""
    words = text.strip()
    if re.match(r"(kld|ppl)\b", words, re.IGNORECASE):
        raise InputError(f"budget {text!r}: a damage limit needs a search over sizes, which is not offered", FORMS)
    found = PATTERN.fullmatch(words)
    if found is None:
        raise InputError(f"budget {text!r} is not understood", FORMS)
    number, unit = float(found["number"]), found["unit"].lower()
    if unit in ("bit", "bits", "bpw"):
        amount, kind = number, "file" if found["file"] else "linears"
        if not 0 < amount <= 16:
            raise InputError(f"budget {text!r}: bits per weight must lie between 0 and 16", FORMS)
        return Budget(words, "file" if kind == "file" else "linears", amount)
    if unit not in UNITS or found["file"]:
        raise InputError(f"budget {text!r}: unknown unit {found['unit']!r}", FORMS)
    return Budget(words, "bytes", number * UNITS[unit])
