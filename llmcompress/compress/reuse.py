"""Scores from a file in place of scoring anew, where they belong to the same model, text and settings."""

from dataclasses import dataclass

from llmcompress.compress.pipeline import score_batches, settings_digest
from llmcompress.compress.scoring import SCORERS
from llmcompress.errors import InputError
from llmcompress.model.text import Batches
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.types import ScoreFile, Scores

FACTS = {
    "model": ("model_digest", "another model (weights or configuration differ)"),
    "calibration text": (
        "calibration_digest",
        "other calibration text (source, samples, length, seed or tokenizer differ)",
    ),
    "settings": ("settings_digest", "other settings (widths, group size, quantizer or options of the scorer differ)"),
}
HINTS = {
    "model": "give the model the scores were made from",
    "calibration text": "give the --calibration, --seed and --set calibration.* the scores were made with",
    "settings": "give the --recipe and --set the scores were made with",
}


@dataclass(frozen=True)
class Expected:
    """Digests that scores made now would carry; no calibration digest for a scorer that reads no text."""

    model_digest: str
    calibration_digest: str | None
    settings_digest: str


def reuse(file: ScoreFile, scorer: str, expected: Expected) -> Scores:
    """The scores of one scorer out of a score file, when they are what scoring now would give.

    Raises InputError when the file has none of this scorer, or those it has were made from another model, on other
    text or with other settings: it says which, and what to do.
    """
    found = [scores for scores in file.scores if scores.scorer == scorer]
    if not found:
        there = ", ".join(dict.fromkeys(scores.scorer for scores in file.scores)) or "nothing"
        hint = f"make them with `llmcompress score --scorer {scorer}`, or name a scorer that is there"
        raise InputError(f"the score file has no scores of {scorer}; it has {there}", hint)
    differing = [_differing(scores, expected) for scores in found]
    if [] in differing:
        return found[differing.index([])]
    nearest = min(differing, key=len)
    what = ", and ".join(FACTS[name][1] for name in nearest)
    remedy = ", ".join(HINTS[name] for name in nearest)
    raise InputError(
        f"the scores of {scorer} in the score file were made with {what}",
        f"{remedy}; or score again without --scores",
    )


def _differing(scores: Scores, expected: Expected) -> list[str]:
    """Which of the three digests are not those expected, by name."""
    wanted = {name: getattr(expected, field) for name, (field, _) in FACTS.items()}
    had = {name: getattr(scores, field) for name, (field, _) in FACTS.items()}
    return [name for name in FACTS if wanted[name] is not None and had[name] != wanted[name]]


def expected(recipe: Recipe, batches: Batches, model_digest: str) -> Expected:
    """What scores by the recipe's scorer would carry; `batches` is the whole calibration text."""
    reads = bool(find(SCORERS, recipe.scorer).NEEDS_DATA)
    text = score_batches(recipe, batches).digest if reads else None
    return Expected(model_digest, text, settings_digest(recipe, recipe.scorer, None))
