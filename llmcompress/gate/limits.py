"""What a model must keep to pass: a profile, a file over it, flags over that."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from llmcompress.errors import InputError
from llmcompress.files import parse_yaml
from llmcompress.plugins import nearest
from llmcompress.types import Noun

ProfileName = Literal["near-lossless", "standard", "aggressive", "none"]
DEFAULT_PROFILE: ProfileName = "standard"
LEAST_ALPHA = 1e-9  # quantiles further out than this are nothing floats can tell from 1


def share(value: object) -> float:
    """`3%`, `0.03` or 0.03 as a number. Raises ValueError for what is not above 0, and for a bare 1 or more."""
    words = str(value).strip()
    percent = words.endswith("%")
    try:
        number = float(words.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        raise ValueError(f"{words} is not a share; write 3% or 0.03") from None
    if not 0 < number < (10 if percent else 1):
        raise ValueError(f"{words} is out of range; write 3% or 0.03")
    return number


Share = Annotated[float, BeforeValidator(share)]
Fraction = Annotated[float, BeforeValidator(share), Field(lt=1)]


class Limits(Noun):
    """The largest damage that passes, and how sure the answer must be. A limit of None is not judged.

    max_kld           nats per token
    max_ppl_increase  of the perplexity, as a share
    max_drop          of the share of right answers in a task, in absolute terms: 0.02 is two points
    max_top1_loss     share of tokens whose likeliest successor is another one
    max_regression    rise of the KL divergence over that of a baseline, as a share
    alpha             chance of a wrong pass, and of a wrong fail
    looks             how often growing samples may be judged, each at `alpha / looks`
    expect            digests the report must have: of model, ref, tokens, tokenizer
    """

    profile: ProfileName = DEFAULT_PROFILE
    max_kld: float | None = Field(default=None, gt=0)
    max_ppl_increase: Share | None = None
    max_drop: Fraction | None = None
    max_top1_loss: Fraction | None = None
    max_regression: Share | None = 0.10
    alpha: float = Field(default=0.05, ge=LEAST_ALPHA, le=0.25)
    looks: int = Field(default=1, ge=1, le=10)
    expect: dict[Literal["model", "ref", "tokens", "tokenizer"], str] = Field(default_factory=dict)


PROFILES: dict[str, dict[str, float]] = {
    "near-lossless": {"max_kld": 0.005, "max_ppl_increase": 0.005, "max_drop": 0.01},
    "standard": {"max_kld": 0.05, "max_ppl_increase": 0.03, "max_drop": 0.02},
    "aggressive": {"max_kld": 0.20, "max_ppl_increase": 0.12, "max_drop": 0.05},
    "none": {},
}


def read_limits(config: Path | None, flags: Mapping[str, Any], looks: int = 1) -> tuple[Limits, bool]:
    """The limits, and whether a drop in tasks was asked for by more than a profile.

    `flags` are fields of `Limits`; what is None was not given. `looks` counts where neither says.
    Raises InputError naming the place.
    """
    asked = _document(config) if config is not None else {}
    given = {key: value for key, value in flags.items() if value is not None}
    where = config.name if config is not None else "options"
    asked |= given
    profile = asked.get("profile", DEFAULT_PROFILE)
    usual: dict[str, Any] = {"looks": looks, **PROFILES.get(profile, {})} if isinstance(profile, str) else {}
    try:
        limits = Limits.model_validate_json(json.dumps(usual | asked, default=str))
    except ValidationError as error:
        raise _refusal(error, where) from None
    return limits, asked.get("max_drop") is not None


def _document(path: Path) -> dict[str, Any]:
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"), path.name)
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror}", "check the path and its permissions") from None
    except UnicodeDecodeError:
        raise InputError(f"{path.name}: not UTF-8 text", "give a YAML file, such as --suggest prints") from None
    if not isinstance(document, dict):
        raise InputError(f"{path.name}: limits are `key: value` lines", "for example max_kld: 0.05")
    return document


def _refusal(error: ValidationError, where: str) -> InputError:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return InputError(f"{where}: {place}: no such key", nearest(place, tuple(Limits.model_fields)))
    hint = "numbers need a dot before an exponent: 1.0e-3" if first["type"] == "float_type" else "see docs/gate.md"
    return InputError(f"{where}: {place}: {first['msg'].removeprefix('Value error, ')}", hint)
