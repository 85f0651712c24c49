"""Crash-safe bookkeeping of a run: what is finished stays finished, and nothing half-written is ever seen.

    OUT                   appears by one rename, complete
    OUT.partial/          data: shards under their final names, later the index and the small files
    .OUT.llmcompress/     state: lock, run.json, run.log, scores.json, commit-00007.json, hidden-00007.safetensors

A step is committed by its record, which is written last and carries the digests of the step's files
and of the record before it. Everything without a record is garbage that a rerun overwrites.
"""

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from llmcompress.compress.kept import seal, sealed
from llmcompress.compress.runlog import NAME as LOG_NAME
from llmcompress.compress.runlog import RunLog
from llmcompress.errors import BusyError, InputError, MachineError
from llmcompress.files import check_name, commit_json, file_digest, read_json, sync_folder
from llmcompress.types import BlockOutcome, Noun

AT_FDCWD = -100
RENAME_EXCHANGE = 2
KEPT_HIDDEN = 2
FOLDERS = ("adapter", "additional_chat_templates")  # that an output of ours may have
BESIDE = ("report.json", "report.html", ".gitattributes")  # that come into an output later
RECORDS = ("llmcompress.json", "pruning.json", "tying.json", "rewriting.json", "export.json")  # one is in every output


class CommitRecord(Noun):
    """What one finished step left on disk."""

    step: int
    shard: str
    shard_digest: str
    hidden_digest: str
    previous: str
    outcome: BlockOutcome | None


def check_output(output: Path, source: Path, force: bool) -> None:
    """Refuse an output that exists, is the input, lies inside it, or has no parent. Raises InputError.

    With `force` one that we wrote may exist, with nothing of others in it, or an empty folder: what is replaced is
    deleted.
    """
    check_name(output)
    name = output.name or str(output)
    real, origin = output.resolve(), source.resolve()
    if real == origin:
        raise InputError(f"output equals the input: {name}", "choose another -o")
    if origin in real.parents:
        raise InputError(f"output lies inside the input: {name}", "choose another -o")
    if real in origin.parents:
        raise InputError(f"the input lies inside the output: {name}", "choose another -o")
    if not real.parent.is_dir():
        raise InputError(f"no such folder for the output: {output.parent}", "create it, or choose another -o")
    if not output.exists() and not output.is_symlink():
        return
    if not _replaceable(output):
        raise InputError(
            f"output already exists: {name}, and llmcompress did not write it",
            "choose another -o; --force replaces only what llmcompress wrote",
        )
    if force and (stranger := _stranger(output)) is not None:
        raise InputError(
            f"output already exists: {name}, and llmcompress did not write {stranger} in it",
            "choose another -o, or move that away: what --force replaces is deleted",
        )
    if not force:
        Journal(output).sweep()
        raise InputError(f"output already exists: {name}", "choose another -o, or pass --force to replace it")


def _replaceable(output: Path) -> bool:
    """Whether it is a folder with a record of ours, or with nothing in it."""
    return output.is_dir() and (any((output / name).is_file() for name in RECORDS) or not any(output.iterdir()))


def _stranger(output: Path) -> str | None:
    """Something in an output that no record of ours lists. A link's own target is not deleted with it."""
    if output.is_symlink():
        return None
    listed: set[str] | None = None
    for path in [output / name for name in RECORDS if (output / name).is_file()]:
        try:
            files = read_json(path)["files"]
            listed = {str(file["name"]) for file in files} | (listed or set())
        except (InputError, KeyError, TypeError):  # damaged, or of a kind that lists none
            continue
    for path in sorted(output.iterdir()):
        known = {*FOLDERS, *(name.partition("/")[0] for name in listed or ())}
        if path.is_dir() and not path.is_symlink():
            if path.name not in known:
                return f"{path.name}/"
        elif listed is not None and path.name not in {*listed, *RECORDS, *BESIDE}:
            return path.name
    return None


class Journal:
    """The state of one run on one output. Use inside `with journal.locked():`."""

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.state = self.output.with_name(f".{self.output.name}.llmcompress")
        self._log = RunLog(self.state / LOG_NAME)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output against other runs. Raises BusyError when another run holds it, and InputError where a folder
        that no run left has the name of its data.

        Nothing is left of a run that fails before its request is recorded.
        """
        lock = FileLock(self.state / "lock", timeout=0, mode=0o666)
        fresh = not self.state.is_dir()
        try:
            self.state.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout:
            raise BusyError(f"another run is writing {self.output.name}", "wait for it, or choose another -o") from None
        except FileNotFoundError:  # the run that held it finished and removed it under our feet
            raise BusyError(f"another run has just written {self.output.name}", "look at it, or try again") from None
        except OSError as error:
            where = self.output.parent
            raise MachineError(f"cannot write in {where}: {error.strerror}", "check permissions and the disk") from None
        stranger = fresh and self._taken()
        try:
            if stranger:
                raise InputError(f"{self.partial.name} is not of an unfinished run", "move it, or choose another -o")
            if not (self.state / "lock").exists():
                raise BusyError(f"another run has just written {self.output.name}", "look at it, or try again")
            with self._log:
                yield
        finally:
            if stranger:
                shutil.rmtree(self.state, ignore_errors=True)
            elif not self.run_file.exists():
                self.clear()
            lock.release()

    def _taken(self) -> bool:
        """Whether something lies where the data of a run go, which is foreign where there was no state of one."""
        if self.partial.is_dir() and not self.partial.is_symlink():
            return any(self.partial.iterdir())
        return self.partial.exists() or self.partial.is_symlink()

    def sweep(self) -> None:
        """Remove what a run left that died when its output was published already, unless another run is at work."""
        if not self.state.is_dir() or self.run_file.exists():
            return
        try:
            with self.locked():
                pass  # the end of it clears
        except (BusyError, MachineError):
            return

    @property
    def run_file(self) -> Path:
        return self.state / "run.json"

    def begin(self, request: dict[str, str]) -> bool:
        """Compare what is asked with what an unfinished run was asked; True when there is one to go on with.

        Raises InputError naming what differs; nothing is changed then. What has no request on record is discarded.
        """
        if not self.run_file.exists():
            self.discard()
            self._log.start()
            return False
        known = self._recorded()["request"]
        differs = sorted(key for key in known.keys() | request.keys() if known.get(key) != request.get(key))
        if differs:
            raise InputError(
                f"an unfinished run on {self.output.name} was started differently: {', '.join(differs)}",
                "repeat the first command to go on with it, or pass --restart to discard it",
            )
        self._log.start()
        return True

    def _recorded(self) -> dict[str, dict[str, str]]:
        """What was asked and on what machine. Raises InputError where the record is damaged."""
        try:
            found = read_json(self.run_file)
        except InputError:
            found = None
        if not isinstance(found, dict) or not all(isinstance(found.get(x), dict) for x in ("request", "environment")):
            what = f"the record of the unfinished run on {self.output.name} is damaged"
            raise InputError(what, "pass --restart to discard the run")
        return found

    def published_request(self) -> dict[str, str] | None:
        """What the output was made from, if a run died after publishing it and before forgetting its state."""
        record = self.output / "llmcompress.json"
        if not (self.run_file.is_file() and record.is_file()):
            return None
        try:
            run, made = self._recorded(), read_json(record)
        except InputError:
            return None
        if not isinstance(made, dict):
            return None
        last = made.get("healing") or [made]  # what was done to it last
        asked = last[-1].get("request")
        return dict(asked) if run["request"] == asked else None

    @contextmanager
    def in_one_go(self) -> Iterator[None]:
        """`locked`, for what is not resumed: nothing is left of it when it fails.

        Raises InputError where an unfinished run has work here.
        """
        with self.locked():
            if self.run_file.exists():
                raise InputError(f"an unfinished run on {self.output.name} is kept", "finish it, or choose another -o")
            self.discard()
            yield

    def record_request(self, request: dict[str, str], environment: dict[str, str]) -> None:
        """Note what was asked and on what machine, once, at the start of a new run."""
        commit_json(self.run_file, {"request": request, "environment": environment})

    def changed_environment(self, environment: dict[str, str]) -> list[str]:
        """Names of what a result depends on that differ from when the unfinished run began."""
        before = self._recorded()["environment"]
        return sorted(key for key, value in environment.items() if before.get(key) != value)

    def discard(self) -> None:
        """Forget the unfinished run, whatever it left; its request first, so that nobody goes on with half of it."""
        self.run_file.unlink(missing_ok=True)
        _drop(self.partial)
        for path in self.state.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()

    def prepare(self) -> None:
        """Make the data folder and drop temporary files of runs that died."""
        self.partial.mkdir(exist_ok=True)
        for folder in (self.partial, self.state):
            for path in folder.glob("*.tmp-*"):
                path.unlink(missing_ok=True)

    def record_path(self, step: int) -> Path:
        return self.state / f"commit-{step:05d}.json"

    def hidden_path(self, step: int) -> Path:
        """Where the hidden states after a step are kept."""
        return self.state / f"hidden-{step:05d}.safetensors"

    def commit(self, record: CommitRecord) -> None:
        """Make a step final. Its shard and hidden states must already be on disk."""
        seal(self.record_path(record.step), record)
        self.hidden_path(record.step - KEPT_HIDDEN).unlink(missing_ok=True)

    def committed(self) -> list[CommitRecord]:
        """The records of all finished steps whose chain and shards still hold, from step 0 on.

        A damaged shard, or a step whose hidden states are gone, ends the list: it is redone.
        """
        found: list[CommitRecord] = []
        previous = ""
        while (record := sealed(self.record_path(len(found)), CommitRecord)) is not None:
            shard = self.partial / record.shard
            if record.previous != previous or not shard.is_file() or file_digest(shard) != record.shard_digest:
                break
            found.append(record)
            previous = record.digest()
        while found and not self._hidden_holds(found[-1]):
            found.pop()
        return found

    def _hidden_holds(self, record: CommitRecord) -> bool:
        if not record.hidden_digest:
            return True
        path = self.hidden_path(record.step)
        return path.is_file() and file_digest(path) == record.hidden_digest

    def publish(self, force: bool) -> None:
        """Make the data folder the output, by one rename; then forget the state.

        With `force` an existing output is exchanged in one step and removed afterwards.
        """
        sync_folder(self.partial)
        try:
            if force and self.output.exists():
                _exchange(self.partial, self.output)
            else:
                os.rename(self.partial, self.output)
            sync_folder(self.output.parent)
        except OSError as error:
            raise MachineError(f"cannot publish {self.output.name}: {error.strerror}", "run it again") from error
        self.clear()

    def clear(self) -> None:
        """Remove the state of a finished run, and what `--force` replaced; last what says that it is finished."""
        _drop(self.partial)
        for path in self.state.iterdir() if self.state.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path not in (self.run_file, self.state / "lock"):
                path.unlink(missing_ok=True)
        shutil.rmtree(self.state, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Swap two directory entries atomically; where the system cannot, move the old one aside first."""
    library = ctypes.CDLL(None, use_errno=True)
    swap = getattr(library, "renameat2", None)
    if swap is not None:
        if swap(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(old), RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
        if number not in (errno.ENOSYS, errno.EINVAL):
            raise OSError(number, os.strerror(number))
    aside = new.with_name(new.name + ".old")
    os.rename(old, aside)
    os.rename(new, old)
    _drop(aside)


def _drop(path: Path) -> None:
    """Remove a folder or a link; of a link nothing that it leads to."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
