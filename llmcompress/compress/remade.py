"""What a run settles for itself and keeps in its state: a rewritten checkpoint, and smaller batches."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.joint import decide_dropping, reopen_dropped, write_dropped
from llmcompress.compress.journal import Journal
from llmcompress.compress.kept import seal, sealed, unchanged
from llmcompress.compress.pipeline import Opened, reopen, rewrite_job, score
from llmcompress.compress.rewrite import rewrite
from llmcompress.compress.rewriting.hints import NAME as HINTS
from llmcompress.compress.together import kept, seen_by_all
from llmcompress.errors import InputError
from llmcompress.files import file_digest
from llmcompress.model.crew import Crew
from llmcompress.model.text import Batches
from llmcompress.recipes import Recipe
from llmcompress.types import Dropping, Noun

REWRITTEN, WEIGHTS_NAME, HALVED_NAME = "rewritten", "weights.json", "batches.json"
DROPPED, DROPPING_NAME, SCORES_NAME = "dropped", "dropping.json", "scores.json"
SHARD = ".safetensors"
DAMAGED = "the weights that the unfinished run made for itself are damaged"


class Made(Noun):
    """Digests of the files of a checkpoint in the state of a run but its shards, in the order of their names."""

    files: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Those of a folder."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        paths = [path for path in files if path.suffix != SHARD or path.name == HINTS]
        return cls(files=tuple((path.relative_to(folder).as_posix(), file_digest(path)) for path in paths))


class Weights(Noun):
    """The digest of its shards and its config."""

    found: str


class Halved(Noun):
    """Memory ran out before: batches are of this many sequences."""

    batch_size: int


def once(crew: Crew, journal: Journal, name: str, make: Callable[[Path], object]) -> tuple[Path, bool]:
    """A checkpoint of this name in the state of a run, made where it is not there or damaged; whether it was there."""
    folder, record = journal.state / name, journal.state / f"made-{name}.json"

    def there() -> bool:
        if folder.is_dir() and sealed(record, Made) == Made.of(folder):
            return True
        shutil.rmtree(folder, ignore_errors=True)
        make(folder)
        seal(record, Made.of(folder))
        return False

    found: bool = crew.first(there)
    seen_by_all(crew, folder)
    return folder, found


@contextmanager
def blaming_damage(found: bool) -> Iterator[None]:
    """Where a checkpoint of an earlier run was `found`, one that cannot be opened is damaged. Raises InputError."""
    try:
        yield
    except InputError as error:
        if not found:
            raise
        raise InputError(f"{DAMAGED}: {error.what}", "pass --restart to discard it") from None


def rewritten_once(recipe: Recipe, whole_file: bool, journal: Journal, *, opened: Opened, batches: Batches) -> Opened:
    """The model as the recipe's rewrites leave it: a checkpoint in the state of this run, made once."""

    def make(folder: Path) -> None:
        """Rewrite it."""
        for _ in rewrite(rewrite_job(opened, recipe, batches), folder):
            pass

    folder, found = once(opened.skeleton.crew, journal, REWRITTEN, make)
    with blaming_damage(found):
        return reopen(opened, recipe, folder, whole_file=whole_file)


def dropping_once(
    recipe: Recipe, budget: Budget, journal: Journal, *, opened: Opened, batches: Batches, digest: str
) -> Dropping:
    """Which blocks this run drops, decided once."""
    crew = opened.skeleton.crew

    def decide() -> Dropping:
        scores = score(opened, recipe, batches, digest)
        found = decide_dropping(opened, recipe, batches, scores, budget)
        if not found.dropped and not recipe.rewrite.methods:
            crew.first(partial(seal, journal.state / SCORES_NAME, scores))
        return found

    return kept(crew, journal.state / DROPPING_NAME, Dropping, decide)


def dropped_once(
    recipe: Recipe, budget: Budget, journal: Journal, *, opened: Opened, dropping: Dropping
) -> tuple[Opened, Budget]:
    """The model without dropped blocks, a checkpoint in the state of this run, made once; and its budget."""
    if not dropping.dropped:
        return opened, budget
    write = partial(write_dropped, opened, dropping, seed=recipe.seed)
    folder, found = once(opened.skeleton.crew, journal, DROPPED, write)
    with blaming_damage(found):
        return reopen_dropped(opened, recipe, folder, budget)


def made_digest(journal: Journal, opened: Opened) -> str:
    """The digest of the weights a run made for itself. Raises InputError where they are no longer what they were."""
    crew, path = opened.skeleton.crew, journal.state / WEIGHTS_NAME
    with blaming_damage(crew.first(path.is_file)):
        weights = Weights(found=opened.digest())
    if not crew.first(partial(unchanged, path, weights)):
        raise InputError(DAMAGED, "pass --restart to discard it")
    return weights.found


def halve(journal: Journal, batch_size: int) -> bool:
    """Note that this run, and what goes on with it, takes half the batch; False where it has none to halve, or had."""
    size = batch_size // 2
    if size < 1 or sealed(journal.state / HALVED_NAME, Halved) is not None:
        return False
    seal(journal.state / HALVED_NAME, Halved(batch_size=size))
    return True


def as_halved(crew: Crew, journal: Journal, recipe: Recipe) -> Recipe:
    """The recipe with the batches that were noted, as it is where none were."""
    found = crew.first(lambda: sealed(journal.state / HALVED_NAME, Halved), Halved)
    if found is None:
        return recipe
    part = recipe.calibration.model_copy(update={"batch_size": found.batch_size})
    return recipe.model_copy(update={"calibration": part})
