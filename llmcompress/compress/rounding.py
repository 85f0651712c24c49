"""What a quantizer returns."""

from dataclasses import dataclass

from llmcompress.compress.grid import Codes


@dataclass(frozen=True)
class Quantized:
    """Codes of one linear, and every fallback taken on the way, as sentences for the report."""

    codes: Codes
    fallbacks: tuple[str, ...] = ()
