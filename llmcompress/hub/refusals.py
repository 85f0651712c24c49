"""What a user can do about a refusal of the Hub, or a failure on the way to it."""

import difflib
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmcompress.errors import CompressError, InputError, MachineError
from llmcompress.hub.aliases import ALIASES
from llmcompress.hub.nearest import nearby, suggest

PASSWORD = re.compile(r"//[^/@\s]*@")
TOKENS = "https://huggingface.co/settings/tokens"
VALID = f"HF_TOKEN must be a valid token that may write: {TOKENS}"
FULL = re.compile(r"quota|storage|payment|billing|exceed", re.IGNORECASE)
NO_HOME = "determine home directory"  # as Python says it
CACHED = "or set HF_HUB_OFFLINE=1 to use what is cached"
GO_ON = "what was uploaded stays there; run the same command again to go on"


def explain(repository: str, revision: str | None, error: Exception) -> CompressError:
    """Of a download."""
    from huggingface_hub import errors  # lazy: slow, and not needed for a local model

    asked = called(repository, revision)
    reason: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError):
        if error.__cause__ is None:
            state = "only partly" if isinstance(error, errors.IncompleteSnapshotError) else "not"
            hint = "unset HF_HUB_OFFLINE and run the same command once with a network"
            return MachineError(f"{asked}: {state} in the hub cache, and HF_HUB_OFFLINE forbids to fetch it", hint)
        reason = error.__cause__
    if _odd_token(reason):
        return _odd_token_error()
    if isinstance(reason, errors.HFValidationError):
        return InputError(f"not a repository name: {repository}", "write it as org/name[@revision]")
    if isinstance(reason, errors.HfHubHTTPError):
        return _refusal(repository, revision, reason)
    if isinstance(reason, errors.HTTPError):
        return _unreachable(asked, _words(reason), CACHED)
    if isinstance(reason, OSError) and reason.errno is not None and not isinstance(reason, ConnectionError):
        hint = "free space, or let HF_HOME name a directory on another disk; what was fetched is kept"
        return MachineError(f"cannot store {asked} in the hub cache: {reason.strerror}", hint)
    hint = "let HF_HOME name a directory" if NO_HOME in str(reason) else "run the same command again to go on"
    return MachineError(f"cannot fetch {asked}: {_words(reason)}", hint)


def _refusal(repository: str, revision: str | None, error: Any) -> CompressError:
    """What a user can do about a status code of the hub."""
    from huggingface_hub import errors  # lazy: slow, and not needed for a local model

    asked = called(repository, revision)
    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        hint = f"accept the licence at https://huggingface.co/{repository} and set HF_TOKEN"
        return InputError(f"{asked}: access is gated", hint)
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repository}: no such revision: {revision or 'main'}", "name a branch, a tag or a commit")
    if isinstance(error, errors.RepositoryNotFoundError):
        close = difflib.get_close_matches(repository, [name for _, name in ALIASES], n=2)
        hint = f"{suggest([*close, *nearby(Path(repository))])} a private model needs HF_TOKEN".strip()
        return InputError(f"no such model on the hub (or it is private): {repository}", hint)
    if isinstance(error, errors.DisabledRepoError):
        return InputError(f"{asked}: disabled on the hub", "choose another model")
    if status in (401, 403):
        hint = "check HF_TOKEN: it may be mistyped, expired, or not allowed to read this model"
        return InputError(f"{asked}: the hub refuses access (status {status})", hint)
    if status == 429:
        hint = "wait a few minutes and run the same command again; HF_TOKEN raises the limit"
        return MachineError(f"{asked}: too many requests to the hub (status 429)", hint)
    return _unreachable(asked, f"it answers with status {status}", CACHED)


def called(repository: str, revision: str | None) -> str:
    """A repository as it is asked for."""
    return f"{repository}@{revision}" if revision else repository


def explain_push(repository: str, error: BaseException) -> CompressError:
    """Of an upload."""
    from huggingface_hub import errors  # lazy: slow, and not needed for a local model

    reason = error
    while not isinstance(reason, errors.HTTPError | OSError) and reason.__cause__ is not None:
        reason = reason.__cause__  # the client wraps what an upload of several files raises
    if _odd_token(reason):
        return _odd_token_error()
    if isinstance(reason, errors.HFValidationError):
        return InputError(f"not a repository name: {repository}", "write it as org/name")
    if isinstance(reason, errors.HfHubHTTPError):
        return _push_refusal(repository, reason)
    if isinstance(reason, errors.HTTPError | ConnectionError):
        return _unreachable(repository, _words(reason), GO_ON)
    if isinstance(reason, PermissionError) and reason.errno is None:  # of the client for large files
        return InputError(f"{repository}: the hub refuses the token: {_words(reason)}", VALID)
    if isinstance(reason, OSError) and reason.errno is not None:
        return MachineError(f"cannot read what is to be pushed to {repository}: {reason.strerror}", GO_ON)
    return MachineError(f"cannot push to {repository}: {_words(reason)}", GO_ON)


def _push_refusal(repository: str, error: Any) -> CompressError:
    """What a user can do about a status code of the Hub, while writing."""
    from huggingface_hub import errors  # lazy: slow, and not needed for a local model

    status, said = error.response.status_code, _words(error.server_message or "no reason given")
    owner = repository.partition("/")[0]
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{repository}: access is gated, it is not yours to push to", f"choose a name under {owner}")
    if status in (402, 413) or (status == 403 and FULL.search(said)):
        hint = "delete what is not needed there, or see https://huggingface.co/settings/billing; then run it again"
        return MachineError(f"{repository}: the hub has no room for this (status {status}): {said}", hint)
    if status == 403:
        hint = f"choose a name under your own account, or a token that may write to {owner}: {TOKENS}"
        return InputError(f"{repository}: not allowed to write there (status 403): {said}", hint)
    if status == 401:
        return InputError(f"{repository}: the hub refuses the token (status 401)", VALID)
    if status == 404:
        return InputError(f"{repository}: no such repository, and it could not be made", f"does {owner} exist?")
    if status in (409, 412):
        return MachineError(f"{repository}: somebody else changed it meanwhile", "look at it, and run it again")
    if status == 429:
        hint = f"wait a few minutes; {GO_ON}"
        return MachineError(f"{repository}: too many requests to the hub (status 429)", hint)
    if status < 500:
        return MachineError(f"{repository}: the hub refuses this (status {status}): {said}", GO_ON)
    return _unreachable(repository, f"it answers with status {status}", GO_ON)


def _odd_token(reason: BaseException) -> bool:
    return isinstance(reason, UnicodeEncodeError) or "Illegal header" in str(reason)


def _odd_token_error() -> InputError:
    """Without the text of what was raised, which quotes the token."""
    return InputError("HF_TOKEN holds a character that no token has", "copy the token again, or unset HF_TOKEN")


def _unreachable(asked: str, why: str, hint: str) -> MachineError:
    from huggingface_hub import constants  # lazy: slow, and not needed for a local model

    endpoint = urlsplit(constants.ENDPOINT)  # only its host is named: a URL may hold a password
    where = endpoint.netloc.rpartition("@")[2] or "HF_ENDPOINT"
    return MachineError(f"cannot reach the hub at {where} for {asked}: {why}", f"check the network; {hint}")


def _words(error: object) -> str:
    """One short line, without the password that a URL may hold."""
    return PASSWORD.sub("//", " ".join(str(error).split()))[:160] or type(error).__name__
