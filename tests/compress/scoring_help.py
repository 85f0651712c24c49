"""A scoring job on a tiny model, shared by the tests of the scorers."""

from pathlib import Path
from typing import Any

import torch

from llmcompress.compress.quantizers import rtn
from llmcompress.compress.scoring import Measured, ScoreJob, candidates_for, run_scorers
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import Batches
from llmcompress.model.trace import trace
from llmcompress.options import ScorerOptions

PACKAGE = "llmcompress.compress.scorers"


def job_for(folder: Path, tokens: torch.Tensor | None = None, **options: dict[str, Any]) -> ScoreJob:
    """Rounding to 2, 3 and 4 bits in groups of 64; `options` by scorer, e.g. `lim={"mode": "flat"}`."""
    skeleton = Skeleton.open(folder)
    traced = trace(skeleton)
    if tokens is None:
        tokens = torch.randint(96, (6, 24), generator=torch.Generator().manual_seed(0))
    return ScoreJob(
        skeleton=skeleton,
        trace=traced,
        batches=Batches(tokens, "random", "none"),
        candidates=candidates_for(traced, (2, 3, 4), 64),
        scale_dtype=torch.bfloat16,
        quantizer=rtn,
        options=ScorerOptions.model_validate(options),
        batch_size=4,
    )


def scored(folder: Path, name: str, tokens: torch.Tensor | None = None, **options: dict[str, Any]) -> Measured:
    """What one scorer finds."""
    return run_scorers((name,), job_for(folder, tokens, **options))[name]
