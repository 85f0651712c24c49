"""Turn the MODEL word of the command line into a local directory."""

import difflib
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmcompress.errors import CompressError, InputError, MachineError
from llmcompress.model.aliases import ALIASES

DEMO = "demo"
WANTED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece.*",
    "*.tiktoken",
    "*.jinja",
    "chat_template.json",
    "*processor_config.json",
    "LICEN[CS]E*",
    "NOTICE*",
    "USE_POLICY*",
    "README.md",
)
# Code and pickles are never fetched; `consolidated*` and sub-folders hold the same weights once more, in other layouts.
UNWANTED = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "consolidated*", "*/*.safetensors", "*/*.safetensors.index.json")
REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?!.*\.\.)(?P<revision>\w[\w./+-]*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
PASSWORD = re.compile(r"//[^/@\s]*@")
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*$", re.DOTALL | re.MULTILINE)
LICENSE_LINE = re.compile(r"""^license:[ \t]*["']?([\w.-]+)["']?\s*$""", re.MULTILINE)
CARD_CHARACTERS = 20_000


@dataclass(frozen=True)
class Source:
    """A model on this machine: its directory, what to call it, and the hub commit it came from."""

    path: Path
    name: str
    repository: str | None = None
    revision: str | None = None
    license: str | None = None


def aliases() -> tuple[tuple[str, str], ...]:
    """Short names and the repositories they stand for."""
    return ALIASES


def known_words() -> tuple[str, ...]:
    """Every MODEL word that is neither a directory nor a repository id: `demo` and the short names."""
    return (DEMO, *(alias for alias, _ in ALIASES))


def resolve(model: str) -> Source:
    """Find MODEL: `demo`, a directory, a short name or `org/name`, the last two with an optional `@revision`.

    A directory wins over a short name or repository of the same name. What is on the hub is fetched into
    the hub's own cache, and the commit it was resolved to is recorded.

    Raises InputError for what does not exist (with the nearest names) or may not be had, MachineError
    when the network, the hub or the disk fails.
    """
    if model == DEMO:
        return _demo()
    path = Path(os.path.expanduser(model))
    if model and os.path.isdir(path):  # os.path, not Path: False for every path the system refuses
        folder = Path(os.path.abspath(path))
        return Source(folder, folder.name or "model", license=_license(folder))
    word, mark, revision = model.partition("@")
    if model and word.lower() not in known_words() and os.path.exists(path):
        raise InputError(f"{model}: a file, not a model directory", "give the directory that holds config.json")
    if model.startswith((".", "/", "~")):
        raise InputError(f"no such model directory: {model}", _suggest(_nearby(path)) or "check the path")
    found = REPOSITORY.fullmatch(dict(ALIASES).get(word.lower(), word) + mark + revision)
    if found is None:
        close = [*difflib.get_close_matches(word.lower(), known_words(), n=3), *_nearby(path)]
        usage = "give a directory, org/name[@revision], or a word from `llmcompress list models`"
        raise InputError(f"unknown model: {model}", _suggest(close) or usage)
    return _download(found["id"], found["revision"])


def _suggest(words: list[str]) -> str:
    return f"did you mean {' or '.join(words)}?" if words else ""


def _nearby(path: Path) -> list[str]:
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


def _demo() -> Source:
    folder = Path(str(resources.files("llmcompress") / DEMO))
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise InputError("the demo model is not installed", "install llmcompress from its wheel or a full clone")
    return Source(folder, DEMO, license=_license(folder))


def _license(folder: Path) -> str | None:
    """The licence that the front matter of the model card names, if any."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        with card.open(encoding="utf-8", errors="replace") as stream:
            front = FRONT_MATTER.match(stream.read(CARD_CHARACTERS))
    except OSError:
        return None
    found = LICENSE_LINE.search(front[1]) if front else None
    return found[1] if found else None


def _download(repository: str, revision: str | None) -> Source:
    from huggingface_hub import constants, errors, snapshot_download  # lazy: slow, and not needed for a local model

    failures = (errors.HTTPError, OSError, ValueError, RuntimeError, KeyError)
    offline = constants.is_offline_mode()
    try:
        if not offline and not COMMIT.fullmatch(revision or ""):
            _look_up(repository, revision)
        # Given the branch and not its commit, the client also notes which commit the branch was at: an offline
        # run finds it again. The folder is named after the commit.
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
            local_files_only=offline,
        )
    except failures as error:
        raise _explain(repository, revision, error) from None
    path = Path(folder)
    return Source(path, repository, repository, path.name, _license(path))


def _look_up(repository: str, revision: str | None) -> None:
    """Ask the hub for the revision first: alone, a download falls back on an older snapshot without a word."""
    from huggingface_hub import HfApi, constants  # lazy: as in _download

    found = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    files = [file.rfilename for file in found.siblings or ()]
    weights = [name for name in files if re.fullmatch(r"(?!consolidated)[^/]+\.safetensors", name)]
    if files and not weights:
        raise InputError(
            f"{_called(repository, revision)}: no safetensors weights among its {len(files)} files",
            f"name a revision that has them (a conversion is often at {repository}@refs/pr/NUMBER), or convert them",
        )


def _called(repository: str, revision: str | None) -> str:
    return f"{repository}@{revision}" if revision else repository


def _explain(repository: str, revision: str | None, error: Exception) -> CompressError:
    """What a user can do about a refusal of the hub, or a failure on the way to it."""
    from huggingface_hub import errors  # lazy: as in _download

    asked = _called(repository, revision)
    reason: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError):
        if error.__cause__ is None:
            state = "only partly" if isinstance(error, errors.IncompleteSnapshotError) else "not"
            hint = "unset HF_HUB_OFFLINE and run the same command once with a network"
            return MachineError(f"{asked}: {state} in the hub cache, and HF_HUB_OFFLINE forbids to fetch it", hint)
        reason = error.__cause__
    if isinstance(reason, UnicodeEncodeError) or "Illegal header" in str(reason):  # the text quotes the token
        return InputError("HF_TOKEN holds a character that no token has", "copy the token again, or unset HF_TOKEN")
    if isinstance(reason, errors.HFValidationError):
        return InputError(f"not a repository name: {repository}", "write it as org/name[@revision]")
    if isinstance(reason, errors.HfHubHTTPError):
        return _refusal(repository, revision, reason)
    if isinstance(reason, errors.HTTPError):
        return _unreachable(asked, _words(reason))
    if isinstance(reason, OSError) and reason.errno is not None and not isinstance(reason, ConnectionError):
        hint = "free space, or let HF_HOME name a directory on another disk; what was fetched is kept"
        return MachineError(f"cannot store {asked} in the hub cache: {reason.strerror}", hint)
    return MachineError(f"cannot fetch {asked}: {_words(reason)}", "run the same command again to go on")


def _refusal(repository: str, revision: str | None, error: Any) -> CompressError:
    """What a user can do about a status code of the hub."""
    from huggingface_hub import errors  # lazy: as in _download

    asked = _called(repository, revision)
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        hint = f"accept the licence at https://huggingface.co/{repository} and set HF_TOKEN"
        return InputError(f"{asked}: access is gated", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repository}: no such revision: {revision or 'main'}", "name a branch, a tag or a commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        close = difflib.get_close_matches(repository, [name for _, name in ALIASES], n=2)
        hint = f"{_suggest([*close, *_nearby(Path(repository))])} a private model needs HF_TOKEN".strip()
        return InputError(f"no such model on the hub (or it is private): {repository}", hint)
    if isinstance(error, errors.DisabledRepoError):
        return InputError(f"{asked}: disabled on the hub", "choose another model")
    if status in (401, 403):
        hint = "check HF_TOKEN: it may be mistyped, expired, or not allowed to read this model"
        return InputError(f"{asked}: the hub refuses access (status {status})", hint)
    if status == 429:
        hint = "wait a few minutes and run the same command again; HF_TOKEN raises the limit"
        return MachineError(f"{asked}: too many requests to the hub (status 429)", hint)
    return _unreachable(asked, f"it answers with status {status}")


def _unreachable(asked: str, why: str) -> MachineError:
    from huggingface_hub import constants  # lazy: as in _download

    endpoint = urlsplit(constants.ENDPOINT)  # only its host is named: a URL may hold a password
    where = endpoint.netloc.rpartition("@")[2] or "HF_ENDPOINT"
    hint = "check the network; or set HF_HUB_OFFLINE=1 to use what is cached"
    return MachineError(f"cannot reach the hub at {where} for {asked}: {why}", hint)


def _words(error: BaseException) -> str:
    """One short line, without the password that a URL may hold."""
    return PASSWORD.sub("//", " ".join(str(error).split()))[:160] or type(error).__name__
