"""Low-rank adapters of peft on top of packed linears."""

import warnings
from typing import Any

from llmcompress.errors import InputError
from llmcompress.runtime.modules import PackedLinear


def lora(config: Any) -> Any:
    """A `peft.LoraConfig` that also finds packed linears: `get_peft_model(load(path), lora(LoraConfig(...)))`.

    Returns the same config. The codes are never changed: adapters train and are saved beside them, and cannot be
    merged. Raises InputError where peft is not installed. peft calls the hook that this uses experimental
    (`LoraConfig._register_custom_module`), so peft is held to one minor version.
    """
    try:
        from peft.tuners.lora import Linear  # lazy: an extra, and seconds to import
    except ImportError:
        raise InputError("adapters need peft, which is not installed", "pip install 'llmcompress[heal]'") from None

    class PackedLora(Linear):  # type: ignore[misc]
        """peft's adapter of a linear, on one whose weight is in codes."""

        def __init__(self, base_layer: Any, adapter_name: str, **rest: Any) -> None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unsupported layer type")  # which it was made for
                super().__init__(base_layer, adapter_name, **rest)

        def merge(self, safe_merge: bool = False, adapter_names: Any = None) -> None:
            """Raises InputError: codes hold no other weight."""
            raise InputError(
                "an adapter cannot be merged into packed codes",
                "save it beside them, or load(path, dense=True) and merge it there",
            )

    config._register_custom_module({PackedLinear: PackedLora})
    return config
