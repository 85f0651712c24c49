"""What an unfinished run knows about itself, each record with its own digest: a damaged one counts as not there."""

import json
from pathlib import Path
from typing import TypeVar

from llmcompress.errors import InputError
from llmcompress.files import commit_json, read_json
from llmcompress.types import Noun

Record = TypeVar("Record", bound=Noun)


def seal(path: Path, value: Noun) -> None:
    """Write a record durably, with the digest of what it says. Raises MachineError."""
    commit_json(path, {"sha256": value.digest(), "value": value.model_dump(mode="json")})


def sealed(path: Path, kind: type[Record]) -> Record | None:
    """A record as it was sealed; None where there is none, or a bit of it is not what it was."""
    if not path.is_file():
        return None
    try:
        document = read_json(path)
        if not isinstance(document, dict) or document.keys() != {"sha256", "value"}:
            return None
        value = kind.parse(json.dumps(document["value"]), path.name)
    except InputError:
        return None
    return value if value.digest() == document["sha256"] else None


def unchanged(path: Path, value: Record) -> bool:
    """Whether a record says what it said when it was first sealed; where it never was, it is now."""
    before = sealed(path, type(value))
    if before is None:
        seal(path, value)
    return before is None or before == value
