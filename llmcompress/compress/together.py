"""What process 0 of a run does for all: locks, looks, keeps, publishes; the others hear what came of it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from llmcompress.compress.journal import Journal, check_output
from llmcompress.compress.kept import seal, sealed
from llmcompress.compress.output import RECORD_NAME, RunRecord
from llmcompress.compress.verify import Check, require, verify
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import folder_bytes
from llmcompress.model.crew import Crew
from llmcompress.types import Noun, Plan

Kept = TypeVar("Kept", bound=Noun)


def published_before(journal: Journal, source: Path, force: bool) -> dict[str, str] | None:
    """What the output was made from where a run has died just after publishing it.

    Raises InputError where the output is there for another reason, or may not be.
    """
    found = None if force else journal.published_request()
    check_output(journal.output, source, force or found is not None)
    return found


def verified_before(crew: Crew, journal: Journal, device: str) -> tuple[Plan, tuple[Check, ...]]:
    """The plan of an output that was published before, verified again; only process 0 can tell by what."""
    checks: list[Check] = []

    def look() -> Plan:
        record = RunRecord.parse((journal.output / RECORD_NAME).read_bytes(), RECORD_NAME)
        checks.extend(require(verify(journal.output, device)))
        journal.clear()
        return record.plan

    return crew.first(look, Plan), tuple(checks)


def begun(
    journal: Journal, asked: dict[str, str], environment: dict[str, str], *, restart: bool
) -> tuple[bool, list[str]]:
    """Whether an unfinished run is gone on with, and what is different here from where it began.

    Raises InputError where it was asked something else.
    """
    if restart:
        journal.discard()
    if journal.begin(asked):
        return True, journal.changed_environment(environment)
    journal.record_request(asked, environment)
    return False, []


def publish(journal: Journal, force: bool) -> int:
    """Make the output appear; returns its bytes."""
    size = folder_bytes(journal.partial)
    journal.publish(force)
    return size


def kept(crew: Crew, path: Path, kind: type[Kept], make: Callable[[], Kept]) -> Kept:
    """What the state of this run holds, or what its processes make together and process 0 then seals there."""
    found: Kept | None = crew.first(lambda: sealed(path, kind), kind)
    if found is not None:
        return found
    made = make()

    def keep() -> Kept:
        seal(path, made)
        return made

    result: Kept = crew.first(keep, kind)
    return result


def seen_by_all(crew: Crew, folder: Path) -> None:
    """Raises InputError where a checkpoint in the state of this run is not seen by every process."""
    if not crew.agreed(folder.is_dir()):
        raise InputError(
            f"{folder.name} of the run's state is not seen by every process",
            "give -o on a file system that all machines of the run share",
        )
