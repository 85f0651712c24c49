"""Turn the MODEL word of the command line into a local directory."""

import difflib
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from llmcompress.errors import CompressError, InputError, MachineError
from llmcompress.model.aliases import ALIASES
from llmcompress.plugins import nearest

DEMO = "demo"
WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
LICENSE_LINE = re.compile(r"^license:\s*([\w.-]+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A model on this machine: its directory, what to call it, and the hub commit it came from."""

    path: Path
    name: str
    repository: str | None = None
    revision: str | None = None
    license: str | None = None


def resolve(model: str) -> Source:
    """Find MODEL: `demo`, a directory, an alias, or `org/name[@revision]`, downloaded where needed.

    Raises InputError for what does not exist (with the nearest names) or may not be had, MachineError
    when the network fails.
    """
    if model == DEMO:
        return _demo()
    path = Path(model).expanduser()
    if path.is_dir():
        return Source(path.resolve(), path.resolve().name, license=_license(path))
    if path.exists():
        raise InputError(f"{model}: a file, not a model directory", "give the directory that holds config.json")
    if model.startswith((".", "/", "~")):
        raise InputError(f"no such model directory: {model}", _nearest_folder(path))
    repository = dict(ALIASES).get(model.lower(), model)
    found = REPOSITORY.fullmatch(repository)
    if found is None:
        words = (DEMO, *(alias for alias, _ in ALIASES))
        raise InputError(f"unknown model: {model}", nearest(model.lower(), words) + _beside(path))
    return _download(found["id"], found["revision"])


def _beside(path: Path) -> str:
    return f" Or is it {_nearest_folder(path).removeprefix('did you mean ')}" if _siblings(path) else ""


def _siblings(path: Path) -> list[str]:
    parent = path.parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    return difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)


def _nearest_folder(path: Path) -> str:
    close = _siblings(path)
    return f"did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else "check the path"


def _demo() -> Source:
    folder = Path(str(resources.files("llmcompress") / DEMO))
    if not (folder / "config.json").is_file():
        raise InputError("the demo model is not installed", "install llmcompress from its wheel or a full clone")
    return Source(folder, DEMO, license=_license(folder))


def _license(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = LICENSE_LINE.search(card.read_text(encoding="utf-8", errors="replace")[:20_000])
    return found[1] if found else None


def _download(repository: str, revision: str | None) -> Source:
    import huggingface_hub  # lazy: slow to import, and not needed for local models

    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        commit = revision
        if not offline:
            commit = huggingface_hub.HfApi().model_info(repository, revision=revision).sha
        folder = huggingface_hub.snapshot_download(
            repository, revision=commit, allow_patterns=list(WANTED), local_files_only=offline
        )
    except (huggingface_hub.errors.HfHubHTTPError, huggingface_hub.errors.LocalEntryNotFoundError) as error:
        raise _hub_error(repository, revision, error) from None
    except (OSError, ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())[:160]
        raise MachineError(f"{repository}: {words}", "check the network, or set HF_HUB_OFFLINE=1") from None
    path = Path(folder)
    return Source(path, repository, repository, path.name, _license(path))


def _hub_error(repository: str, revision: str | None, error: Exception) -> CompressError:
    """What a user can do about a refusal of the hub."""
    import huggingface_hub  # lazy: as above

    errors: Any = huggingface_hub.errors
    if isinstance(error, errors.GatedRepoError):
        page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{repository}"
        return InputError(f"{repository}: access is gated", f"accept the licence at {page} and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repository}: no revision {revision!r}", "name a branch, a tag or a commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        words = tuple(name for _, name in ALIASES)
        close = difflib.get_close_matches(repository, words, n=2, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return InputError(f"no such model on the hub: {repository}", hint + "a private model needs HF_TOKEN")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return MachineError(f"{repository}: not in the cache and the hub is out of reach", "go online once to fetch it")
    return MachineError(f"{repository}: the hub does not answer", "try again later, or set HF_HUB_OFFLINE=1")


def aliases() -> tuple[tuple[str, str], ...]:
    """Short names and the repositories they stand for."""
    return ALIASES
