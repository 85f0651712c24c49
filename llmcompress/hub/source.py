"""Turn the MODEL word of the command line into a local directory."""

import difflib
import os
import re
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path

from llmcompress.errors import InputError, one_line
from llmcompress.files import check_name
from llmcompress.hub.aliases import ALIASES
from llmcompress.hub.card import Inherited, inherited
from llmcompress.hub.nearest import nearby, suggest
from llmcompress.hub.refusals import called, explain

DEMO = "demo"
MODEL_FILES = (
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
    *(
        "llmcompress.json",
        "export.json",
        "pruning.json",
        "tying.json",
        "rewriting.json",
    ),  # what ours say of themselves,
    *("scores.json", "report.json", "report.html", "bits.svg"),  # and what they list
)
WANTED = (*MODEL_FILES, "LICEN[CS]E*", "NOTICE*", "USE_POLICY*", "README.md")
ADAPTER = ("adapter/adapter_config.json", "adapter/adapter_model.safetensors")  # beside weights of ours alone
# Code and pickles are never fetched; `consolidated*` and sub-folders hold the same weights once more, in other layouts.
UNWANTED = ("*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "consolidated*", "*/*.safetensors", "*/*.safetensors.index.json")
REPOSITORY = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?!.*\.\.)(?P<revision>\w[\w./+-]*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Source:
    """A model on this machine: its directory, what to call it, and the hub commit it came from."""

    path: Path
    name: str
    repository: str | None = None
    revision: str | None = None
    license: str | None = None
    card: Inherited = field(default=Inherited(), compare=False)


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
        check_name(folder)
        return _source(folder, one_line(folder.name) or "model")
    word, mark, revision = model.partition("@")
    if model and word.lower() not in known_words() and os.path.exists(path):
        raise InputError(f"{model}: a file, not a model directory", "give the directory that holds config.json")
    if model.startswith((".", "/", "~")):
        raise InputError(f"no such model directory: {model}", suggest(nearby(path)) or "check the path")
    found = REPOSITORY.fullmatch(dict(ALIASES).get(word.lower(), word) + mark + revision)
    if found is None:
        close = [*difflib.get_close_matches(word.lower(), known_words(), n=3), *nearby(path)]
        usage = "give a directory, org/name[@revision], or a word from `llmcompress list models`"
        raise InputError(f"unknown model: {model}", suggest(close) or usage)
    return _download(found["id"], found["revision"])


def _demo() -> Source:
    folder = Path(str(resources.files("llmcompress") / DEMO))
    if not all((folder / name).is_file() for name in ("config.json", "model.safetensors")):
        raise InputError("the demo model is not installed", "install llmcompress from its wheel or a full clone")
    return _source(folder, DEMO)


def _source(folder: Path, name: str, repository: str | None = None, revision: str | None = None) -> Source:
    """A source with what its card says."""
    card = inherited(folder)
    return Source(folder, name, repository, revision, card.license, card)


def _download(repository: str, revision: str | None) -> Source:
    from huggingface_hub import constants, errors, snapshot_download  # lazy: slow, and not needed for a local model

    failures = (errors.HTTPError, OSError, ValueError, RuntimeError, KeyError)
    offline = constants.is_offline_mode()
    try:
        if not offline and not COMMIT.fullmatch(revision or ""):
            _look_up(repository, revision)
        # Given the branch and not its commit, the client also notes which commit the branch was at: an offline
        # run finds it again. The folder is named after the commit.
        fetch = partial(snapshot_download, repository, local_files_only=offline)
        path = Path(fetch(revision=revision, allow_patterns=list(WANTED), ignore_patterns=list(UNWANTED)))
        if (path / "llmcompress.json").is_file() and not offline:
            fetch(revision=path.name, allow_patterns=list(ADAPTER))
    except failures as error:
        raise explain(repository, revision, error) from None
    return _source(path, repository, repository, path.name)


def _look_up(repository: str, revision: str | None) -> None:
    """Ask the hub for the revision first: alone, a download falls back on an older snapshot without a word."""
    from huggingface_hub import HfApi, constants  # lazy: as in _download

    found = HfApi().model_info(repository, revision=revision, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    files = [file.rfilename for file in found.siblings or ()]
    weights = [name for name in files if re.fullmatch(r"(?!consolidated)[^/]+\.safetensors", name)]
    if files and not weights:
        raise InputError(
            f"{called(repository, revision)}: no safetensors weights among its {len(files)} files",
            f"name a revision that has them (a conversion is often at {repository}@refs/pr/NUMBER), or convert them",
        )
