"""What becomes of candidates once their widths are known: what a runtime takes, ratios of columns, mixed inputs."""

from llmcompress.compress.candidates import Candidates
from llmcompress.compress.online import with_mixed_inputs
from llmcompress.compress.ratios import check_scorer, with_ratios
from llmcompress.recipes import Recipe
from llmcompress.runtimes.aim import fitting
from llmcompress.types import ModelTrace


def settled(trace: ModelTrace, candidates: Candidates, recipe: Recipe) -> Candidates:
    """The formats that the recipe's program chooses from. Raises InputError where it cannot have what it asks for."""
    found = fitting(recipe.plan.runtime, trace, candidates)
    if recipe.plan.program == "ratio":
        check_scorer(recipe.scorer)
        found = with_ratios(trace, found)
    return with_mixed_inputs(trace, found) if recipe.quantize.online_hadamard else found
