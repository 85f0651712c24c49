"""What `heal` is asked, and what a resumed run must agree on."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmcompress.compress.heal.lora import LoraOptions
from llmcompress.compress.heal.places import Places
from llmcompress.compress.heal.training import Schedule
from llmcompress.hub.source import Source
from llmcompress.model.text import Batches, TextRequest

LORA, NORMS = "lora", "norms"
RATES = {LORA: 2e-3, NORMS: 5e-3}


@dataclass(frozen=True)
class HealRequest:
    """Everything `heal` was told.

    source    the checkpoint to heal, `against` the original
    method    `lora` or `norms`; where None, norms and scales of a packed checkpoint, adapters for a plain one
    text      its `samples` are all sequences that are read
    held_out  sequences to stop by, and as many to judge by, of those
    """

    source: Source
    against: Source
    output: Path
    text: TextRequest
    device: str
    command: str
    method: str | None = None
    places: Places = field(default_factory=Places)
    lora: LoraOptions = field(default_factory=LoraOptions)
    schedule: Schedule = field(default_factory=Schedule)
    held_out: int = 32
    force: bool = False
    restart: bool = False


def settings_of(request: HealRequest) -> dict[str, int | float | str | None]:
    """What the result depends on besides the models and the text; a limit of time is no part of it."""
    lora = {} if request.method != LORA else asdict(request.lora)
    schedule = {key: value for key, value in asdict(request.schedule).items() if key != "minutes"}
    places = {"at": request.places.at, "blocks": request.places.count}
    return {"method": request.method, **places, **lora, **schedule, "held_out": request.held_out}


def asked_of(request: HealRequest, digests: Sequence[str], batches: Batches) -> dict[str, str]:
    """What this run was asked, as digests: a resumed run must agree on every one."""
    text = json.dumps(settings_of(request), sort_keys=True)
    return {
        "model": digests[0],
        "original": digests[1],
        "calibration tokens": batches.digest,
        "settings": hashlib.sha256(text.encode()).hexdigest(),
        "algorithm": "2",
    }
