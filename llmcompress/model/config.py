"""The transformers config of a model directory, without the classes of models: their import takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch  # noqa: F401 - where it is missing, this is said first
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from llmcompress.errors import InputError
from llmcompress.plugins import nearest
from llmcompress.preflight import SourceFiles

SENSELESS = (ValueError, TypeError, ArithmeticError, AttributeError, LookupError, AssertionError)


def quiet_transformers() -> None:
    """Silence transformers' own progress bars and chatter: the command line has its own."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def explained() -> Iterator[None]:
    """Turns what transformers raises for a config.json that makes no sense into InputError."""
    try:
        yield
    except (*SENSELESS, StrictDataclassError) as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        hint = "compare it with the config.json of the published model"
        raise InputError(f"config.json: no model can be made of it: {words}", hint) from None


def read_config(files: SourceFiles, known: tuple[str, ...] = tuple(CONFIG_MAPPING_NAMES)) -> Any:
    """The transformers config of a source, of a type that is `known`, without any quantization section.

    Raises InputError for another type, or for settings that make no sense.
    """
    quiet_transformers()
    model_type = str(files.config.get("model_type"))
    if model_type not in known:
        raise InputError(f"config.json: no causal language model of type {model_type!r}", nearest(model_type, known))
    plain = {key: value for key, value in files.config.items() if key != "quantization_config"}
    plain.pop("model_type")
    with explained():
        return AutoConfig.for_model(model_type, **plain)
