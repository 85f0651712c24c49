"""`export.json`: what a checkpoint was exported to, and what reading it back showed."""

from pydantic import Field

from llmcompress.compress.output import FileRecord, Origin, Probe
from llmcompress.types import Noun

RECORD_NAME = "export.json"


class ExportedWeight(Noun):
    """One weight: what it was, what it became, and `|difference| / |weight|` as read back from the files."""

    tensor: str
    was: str
    type: str
    error: float


class ExportRecord(Noun):
    """Everything about one export.

    origin             of the checkpoint that was exported
    base               of the model that was compressed, as far as the checkpoint tells
    logit_difference   largest on the probe, between the checkpoint and what was read back
    kld                nats per token on the probe, the same two
    probe_tokens       random tokens the two were run on
    bits_per_weight    of the linears that had codes, everything that belongs to them counted, where tensors tell
    probe              some of the logits of what was read back, where the files are a checkpoint by themselves
    """

    version: int = 1
    llmcompress: str
    origin: Origin
    base: Origin
    format: str
    command: str
    weights: tuple[ExportedWeight, ...]
    notes: tuple[str, ...]
    largest_error: float
    logit_difference: float
    kld: float
    probe_tokens: int
    weight_bytes: int = 0
    bits_per_weight: float | None = None
    file_bits_per_weight: float | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    probe: Probe | None = None
    files: tuple[FileRecord, ...]

    @property
    def lossless(self) -> bool:
        """Whether every weight read back is the one the checkpoint stands for, bit for bit."""
        return self.largest_error == 0
