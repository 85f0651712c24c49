"""The one number the user gives, read into bits, or into the damage that may be done."""

import re
from dataclasses import dataclass
from typing import Literal

from llmcompress.errors import InputError

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
FORMS = (
    "write it as 3.5bits (linears), 3.5bits/file (whole checkpoint), a size: 4.2GB, 4GiB, 300MB, "
    "or a limit of damage, in quotes: 'kld<=0.05' (nats per token), 'ppl<=+2%'"
)
PATTERN = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>[a-z]+)(?P<file>/file)?", re.IGNORECASE | re.ASCII)
LIMIT = re.compile(
    r"(?P<measure>kld|ppl)\s*<=\s*(?P<plus>\+?)\s*(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(?P<percent>%?)",
    re.IGNORECASE | re.ASCII,
)
MOST_KLD = 10.0  # nats per token: a uniform guess over 22,000 tokens is that far from certainty
MOST_PPL_RISE = 10.0  # elevenfold perplexity
LEAST_LIMIT = 1e-6  # below it, float32 arithmetic is all that is measured
MOST_BYTES = 1e18


@dataclass(frozen=True)
class Budget:
    """A limit. `linears`: bits per weight over the quantized linears; `file`: over the whole checkpoint;
    `bytes`: size of the whole checkpoint. The whole checkpoint is the weight shards, headers included.

    `kld`: mean KL divergence, nats per token; `ppl`: relative rise of the perplexity, 0.02 for 2 %. These two are
    damage, known only by measuring, and the smallest model within them has to be searched for.
    """

    text: str
    kind: Literal["linears", "file", "bytes", "kld", "ppl"]
    amount: float

    @property
    def whole_file(self) -> bool:
        """Whether every byte of the checkpoint counts, so that its head may be quantized as well."""
        return self.kind in ("file", "bytes")

    @property
    def measured(self) -> bool:
        """Whether this is a limit of damage: no size can be computed from it without the model."""
        return self.kind in ("kld", "ppl")


def parse_budget(text: str) -> Budget:
    """Read a budget. Raises InputError with the forms that are understood."""
    words = text.strip()
    if re.match(r"(kld|ppl)\b", words, re.IGNORECASE):
        return _limit(text, words)
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
    if number * UNITS[unit] > MOST_BYTES:
        raise InputError(f"budget {text!r}: no checkpoint is that large", FORMS)
    return Budget(words, "bytes", number * UNITS[unit])


def parse_size(text: str, option: str) -> int:
    """Bytes of a size such as 2GB or 1.5GiB. Raises InputError naming the option."""
    found = PATTERN.fullmatch(text.strip())
    if found is None or found["file"] or found["unit"].lower() not in UNITS:
        raise InputError(f"{option} {text!r} is not understood", "write it as 2GB, 1.5GiB or 800MB")
    return int(min(float(found["number"]) * UNITS[found["unit"].lower()], MOST_BYTES))


def _limit(text: str, words: str) -> Budget:
    """Read `kld<=X` or `ppl<=+X%`."""
    found = LIMIT.fullmatch(words)
    if found is None:
        raise InputError(f"budget {text!r} is not understood", FORMS)
    number, measure = float(found["number"]), found["measure"].lower()
    if measure == "kld":
        if found["percent"] or found["plus"]:
            raise InputError(f"budget {text!r}: a KL divergence is a number of nats per token, not a rise", FORMS)
        if not LEAST_LIMIT <= number <= MOST_KLD:
            raise InputError(f"budget {text!r}: the limit must lie between {LEAST_LIMIT:g} and {MOST_KLD:g}", FORMS)
        return Budget(words, "kld", number)
    if not found["percent"]:
        raise InputError(f"budget {text!r}: say by how many per cent the perplexity may rise", FORMS)
    if not LEAST_LIMIT <= number / 100 <= MOST_PPL_RISE:
        least, most = f"{LEAST_LIMIT * 100:g} %", f"{MOST_PPL_RISE * 100:g} %"
        raise InputError(f"budget {text!r}: the rise must lie between {least} and {most}", FORMS)
    return Budget(words, "ppl", number / 100)
