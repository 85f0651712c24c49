"""What a word that names nothing may be a slip of."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path


def suggest(words: Sequence[str]) -> str:
    """A question with the nearest words; nothing where there are none."""
    return f"did you mean {' or '.join(words)}?" if words else ""


def nearby(path: Path) -> list[str]:
    """Directories that `path` may be a slip of: its first missing part replaced by the names closest to it."""
    missing = path
    while missing.parent != missing and not os.path.isdir(missing.parent):
        missing = missing.parent
    try:
        names = [entry.name for entry in os.scandir(missing.parent) if entry.is_dir()]
    except (OSError, ValueError):
        return []
    close = [missing.parent / name for name in difflib.get_close_matches(missing.name, names, n=3)]
    whole = [folder / path.relative_to(missing) for folder in close]
    return [str(full if os.path.isdir(full) else folder) for full, folder in zip(whole, close, strict=True)]
