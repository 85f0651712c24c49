"""Whether a model's own hidden states can be calculated with: what is measured beyond that is noise."""

from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.types import BlockTrace

LARGEST = 1e18  # of a hidden state: the norm that reads it squares it, in float32
OVERFLOWS = "the model overflows: evaluate the original, or give it text it was made for with --calibration"


def usable(states: Tensor) -> bool:
    """Whether hidden states are finite and small enough for a norm."""
    return not states.numel() or float(states.detach().abs().amax()) < LARGEST


def checked(info: BlockTrace, leaving: Tensor) -> Tensor:
    """The hidden states that leave a block of the model as it is. Raises InputError where they are not usable."""
    if not usable(leaving):
        raise overflow(info)
    return leaving


def overflow(info: BlockTrace) -> InputError:
    """What to say of a block."""
    what = "what leaves it is NaN, infinite or beyond what a norm can read, on calibration text"
    return InputError(f"{info.name}: {what}", OVERFLOWS)
