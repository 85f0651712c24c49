"""The parts of the torture by name, and how much of each is done where nothing else is asked."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.torture.changes import changes, flips
from tests.torture.faults import faults
from tests.torture.hostile import EVERY, hostile
from tests.torture.jobs import JOBS, Bench, Job, Tally
from tests.torture.kills import kills, polite, races, whole_kills
from tests.torture.mutations import mutations
from tests.torture.rooms import NoMountError, rooms


@dataclass(frozen=True)
class Settings:
    """What was asked for; `times` is None where each part decides for itself."""

    jobs: list[Job]
    times: int | None
    seed: int
    share: tuple[int, int]
    faults: tuple[str, ...]


def _rooms(bench: Bench, asked: Settings) -> Tally:
    try:
        return rooms(bench, asked.jobs, asked.times or 10)
    except NoMountError as error:
        tally = Tally("a disk too small")
        tally.add(f"skipped: {error}")
        return tally


PARTS: dict[str, Callable[[Bench, Settings], Tally]] = {
    "kills": lambda bench, asked: kills(bench, asked.jobs, asked.times or 130, asked.seed),
    "whole": lambda bench, asked: whole_kills(bench, JOBS["quantize balanced"], asked.times or 10, asked.seed),
    "polite": lambda bench, asked: polite(bench, asked.jobs, asked.times or 65, asked.seed),
    "faults": lambda bench, asked: faults(bench, asked.jobs, asked.faults, asked.share),
    "rooms": _rooms,
    "races": lambda bench, asked: races(bench, asked.jobs, asked.times or 26, asked.seed),
    "changes": lambda bench, asked: changes(bench),
    "flips": lambda bench, asked: flips(bench, asked.times or 40, asked.seed),
    "hostile": lambda bench, asked: hostile(bench.scratch, [*EVERY][: asked.times]),
    "mutations": lambda bench, asked: mutations(bench.scratch, asked.times or 10_000, asked.seed),
}
