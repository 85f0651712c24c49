"""`pruning.json`: what was removed from a model, why, and what it measured."""

from pydantic import Field

from llmcompress.compress.output import FileRecord, Origin
from llmcompress.types import Noun, Series

RECORD_NAME = "pruning.json"


class RemovalStep(Noun):
    """The best set of its size, and the next best: KL in nats per token over the sequences it was chosen on.

    removed                  blocks by their numbers, halves of blocks as `3.attn` and `5.mlp`
    upper                    one-sided 95 % bound of the mean
    rival_more, rival_error  how much more the rival measures on the same sequences, and the standard error of that
    """

    removed: tuple[int | str, ...]
    kld: float
    standard_error: float
    upper: float
    rival: tuple[int | str, ...] = ()
    rival_more: float = 0.0
    rival_error: float = 0.0


class PruneRecord(Noun):
    """Everything about one pruned model. Blocks are numbered as in the original, from 0.

    importance  of each block; where halves were searched, of the attention and the MLP of each block in turn
    single      KL of removing each block, or each half, alone, where it was measured
    removed     blocks that are gone
    halves      of other blocks, stored as zeros and skipped by `llmcompress.load`: `3.attn`, `5.mlp`
    kld         of the final set on text that the choice did not see, with its standard error and 95 % upper bound
    files       beside this one, as they were written
    """

    version: int = 1
    llmcompress: str
    origin: Origin
    command: str
    by: str
    importance: tuple[float, ...]
    series: tuple[Series, ...] = ()
    single: dict[int, float] = Field(default_factory=dict)
    single_halves: dict[str, float] = Field(default_factory=dict)
    steps: tuple[RemovalStep, ...]
    removed: tuple[int, ...]
    halves: tuple[str, ...] = ()
    blocks: int
    kld: float
    standard_error: float
    upper: float
    sequences: int
    calibration: str
    calibration_digest: str
    seed: int
    environment: dict[str, str] = Field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
