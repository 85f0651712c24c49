"""Model cards: README.md with front matter in YAML, as the Hub reads it. Ours, and those of strangers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import InputError
from llmcompress.files import parse_yaml

CARD_NAME = "README.md"
PICTURE_NAME = "bits.svg"
CARD_CHARACTERS = 20_000
# What a card of ours says in place of figures until there are some; `pages.card` puts them there.
UNMEASURED = """## What it cost

Not measured yet: `llmcompress eval` does.
"""
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
LICENSE_LINE = re.compile(r"""^license:[ \t]*["']?([\w.-]+)["']?\s*$""", re.MULTILINE)
NAME = re.compile(r"[\w .,+()/-]{1,80}", re.ASCII)
LINK = re.compile(r"https?://[\w.~:/?#@!$&()*+,;=%-]{1,200}|[\w.-]{1,80}", re.ASCII)
LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,8})?|code|multilingual")
BASE = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True)
class Inherited:
    """What the card of a model says that holds for whatever is made of it."""

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    base_model: str | None = None


def inherited(folder: Path) -> Inherited:
    """What the front matter of a directory's model card names; nothing where there is no card that can be read.

    A card is a stranger's: words that are not what the Hub takes for a licence, a language or a model are left out.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        return Inherited()
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            front = FRONT_MATTER.match(stream.read(CARD_CHARACTERS))
    except OSError:
        return Inherited()
    if front is None:
        return Inherited()
    line = LICENSE_LINE.search(front[1])
    try:
        found = parse_yaml(front[1], CARD_NAME)
    except InputError:
        found = {}
    found = found if isinstance(found, dict) else {}
    return Inherited(
        license=line[1] if line else None,
        license_name=_one(found, "license_name", NAME),
        license_link=_one(found, "license_link", LINK),
        language=_several(found, "language", LANGUAGE),
        base_model=next(iter(_several(found, "base_model", BASE)), None),
    )


def _several(found: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> tuple[str, ...]:
    values = found.get(key)
    values = values if isinstance(values, list) else [values]
    return tuple(v for v in values if isinstance(v, str) and pattern.fullmatch(v))[:20]


def _one(found: Mapping[str, Any], key: str, pattern: re.Pattern[str]) -> str | None:
    return next(iter(_several(found, key, pattern)), None)


def with_front(front: Mapping[str, Any], body: str) -> str:
    """A whole card."""
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=True, allow_unicode=True)}---\n\n{body.lstrip()}"


def parts(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card. Raises InputError where the front matter is no YAML of keys and values."""
    front = FRONT_MATTER.match(card)
    if front is None:
        return {}, card
    found = parse_yaml(front[1], CARD_NAME)
    if not isinstance(found, dict):
        raise InputError(
            f"{CARD_NAME}: its front matter is not a mapping", "the file was edited by hand: make it again"
        )
    return found, card[front.end() :].lstrip()


def plain(text: str) -> str:
    """Text of unknown origin, safe in markdown: no control characters, no markup."""
    return re.sub(r"[^\w .,:/@+-]", "_", text)
