"""Push files to a repository of the Hub: what is large first, then everything in one commit."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError, MachineError
from llmcompress.hub.refusals import PASSWORD, TOKENS, explain_push
from llmcompress.hub.source import ADAPTER, MODEL_FILES

RECORDS = (
    "llmcompress.json",
    "export.json",
    "pruning.json",
    "tying.json",
)  # one of them makes a repository one of ours
WEIGHTS = re.compile(r"[^/]+\.(safetensors|safetensors\.index\.json|bin|gguf|pt|pth)")
NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Item:
    """One file of a push: its name in the repository, and where it lies or what it holds."""

    name: str
    content: Path | bytes

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Target:
    """A repository as it is before a push; `head` is its last commit, None where there is no repository yet."""

    repository: str
    head: str | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pushed:
    """What a push came to. `commit` is the one that has the files; it is an older one where nothing had changed."""

    repository: str
    commit: str
    url: str
    public: bool
    files: int
    removed: tuple[str, ...]
    changed: bool


def look_at(repository: str, public: bool) -> Target:
    """Whether a push there would be right, before any work for it; nothing is changed.

    Raises InputError for a bad name, without a token, where the repository holds weights that are not ours or is
    public (private) while a private (public) one is asked for; MachineError offline or where the Hub fails.
    """
    from huggingface_hub import HfApi, constants, errors, get_token  # lazy: slow, and not needed without a push

    if not NAME.fullmatch(repository):
        raise InputError(f"cannot push to {repository}: not a repository name", "write it as org/name")
    if constants.is_offline_mode():
        raise MachineError(f"cannot push to {repository}: HF_HUB_OFFLINE forbids it", "unset HF_HUB_OFFLINE")
    if not get_token():
        hint = f"set HF_TOKEN to one that may write, from {TOKENS}, or run `hf auth login`"
        raise InputError(f"cannot push to {repository}: there is no token", hint)
    failures = (errors.HTTPError, OSError, ValueError, RuntimeError, KeyError)
    try:
        found = HfApi().model_info(repository, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    except errors.GatedRepoError as error:
        raise explain_push(repository, error) from None
    except errors.RepositoryNotFoundError:
        try:
            _check_owner(repository, HfApi().whoami())
        except failures as error:
            raise explain_push(repository, error) from None
        return Target(repository)
    except failures as error:
        raise explain_push(repository, error) from None
    target = Target(repository, found.sha, tuple(sorted(file.rfilename for file in found.siblings or ())))
    _check(target, bool(found.private), public)
    return target


def _check_owner(repository: str, user: Mapping[str, Any]) -> None:
    """Whether a repository that is not there could be made by the one whose token it is."""
    owner, mine = repository.partition("/")[0], [user["name"], *(one["name"] for one in user.get("orgs", ()))]
    if owner.lower() not in {name.lower() for name in mine}:
        what = f"{repository}: {owner} is neither you nor an organization of yours"
        raise InputError(what, f"choose a name under {' or '.join(mine[:5])}")


def _check(target: Target, private: bool, public: bool) -> None:
    repository = target.repository
    weights = [name for name in target.names if WEIGHTS.fullmatch(name)]
    if weights and not set(RECORDS) & set(target.names):
        what = f"{repository} has weights that llmcompress did not write: {weights[0]}"
        raise InputError(what, "push to another name, so that nothing of it is replaced")
    if private and public:
        hint = f"make it public at https://huggingface.co/{repository}/settings, or leave --public out"
        raise InputError(f"{repository} exists and is private", hint)
    if not private and not public:
        raise InputError(f"{repository} exists and is public", "pass --public to push there, or choose another name")


def push(repository: str, items: Sequence[Item], *, public: bool, message: str) -> Iterator[str | Pushed]:
    """Make `items` what the repository holds of ours, in one commit; yields remarks, and what came of it.

    Files are uploaded first, those that the Hub has are not sent again, and until the commit nobody sees any. Files of
    an earlier push that are not among `items` are deleted in that commit; files of others stay. The commit is refused
    where somebody else made one meanwhile. Raises what `look_at` raises, and MachineError where uploading fails.
    """
    from huggingface_hub import (  # lazy: slow, and not needed without a push
        CommitOperationAdd,
        CommitOperationDelete,
        HfApi,
        errors,
    )

    target = look_at(repository, public)
    removed = _left_over(target, {item.name for item in items})
    api = HfApi()
    size = sum(item.size_bytes for item in items)
    where = "public" if public else "private"
    new = " new" if target.head is None else ""
    yield f"pushing {len(items)} files, {size:,} bytes, to the{new} {where} repository {repository}"
    try:
        if target.head is None:
            api.create_repo(repository, private=not public, exist_ok=False)
        added = [
            CommitOperationAdd(i.name, i.content if isinstance(i.content, bytes) else str(i.content)) for i in items
        ]
        done = api.create_commit(
            repository,
            [*added, *map(CommitOperationDelete, removed)],
            commit_message=message,
            parent_commit=target.head,
        )
    except (errors.HTTPError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise explain_push(repository, error) from None
    yield Pushed(repository, done.oid, _page(repository), public, len(items), removed, done.oid != target.head)


def _left_over(target: Target, names: set[str]) -> tuple[str, ...]:
    """Files of a model that an earlier push of another one left; licences, and what is no model's, stay."""
    return tuple(
        name
        for name in target.names
        if name not in names
        and (name in ADAPTER or "/" not in name)
        and any(fnmatchcase(name, pattern) for pattern in (*MODEL_FILES, *ADAPTER, "*.gguf"))
    )


def _page(repository: str) -> str:
    from huggingface_hub import constants  # lazy: slow, and not needed without a push

    return PASSWORD.sub("//", f"{constants.ENDPOINT}/{repository}")
