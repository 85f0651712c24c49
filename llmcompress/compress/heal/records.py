"""What `llmcompress.json` says of a healing, and the figures in it."""

from collections.abc import Sequence
from typing import Self

from llmcompress.compress.statistics import interval, mean
from llmcompress.types import Noun


class Figure(Noun):
    """A mean over sequences, nats per token, with its 95 % interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Of at least two sequences."""
        low, high = interval(values)
        return cls(mean=mean(values), low=low, high=high)


class HealRecord(Noun):
    """One healing.

    healed_digest     of the weights and config that were healed; `against` names the original
    at, blocks        what was asked, and the blocks that were trained
    parameters        numbers that were trained
    steps             that were taken; the numbers kept are those after `best_step`, 0 where none helped
    tokens            of training text, each counted once
    held_out          KL to stop by, at the start and at the best step
    kld, kld_before   KL(original || model) on text that neither trained nor stopped; `change` is that of each sequence
    rise, rise_before how much more the next token costs than with the original, on the same text
    adapter_bytes     of an adapter beside the checkpoint, 0 where there is none
    """

    llmcompress: str
    healed: str
    healed_digest: str
    against: str
    against_digest: str
    request: dict[str, str]
    command: str
    method: str
    at: str
    blocks: tuple[int, ...]
    parameters: int
    settings: dict[str, int | float | str | None]
    steps: int
    best_step: int
    tokens: int
    calibration: str
    calibration_text_digest: str
    held_out_before: float
    held_out: float
    kld_before: Figure
    kld: Figure
    change: Figure
    rise_before: Figure
    rise: Figure
    sequences: int
    adapter_bytes: int = 0

    @property
    def helped(self) -> bool:
        """Whether the output differs from what was healed."""
        return self.best_step > 0

    @property
    def recovered(self) -> float:
        """Share of the lost KL that came back."""
        return 1 - self.kld.mean / self.kld_before.mean if self.kld_before.mean > 0 else 0.0
