"""Crash-safe bookkeeping of a run: what is finished stays finished, and nothing half-written is ever seen.

    OUT                   appears by one rename, complete
    OUT.partial/          data: shards under their final names, later the index and the small files
    .OUT.llmcompress/     state: lock, run.json, scores.json, commit-00007.json, hidden-00007.safetensors

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

from llmcompress.errors import BusyError, InputError, MachineError
from llmcompress.files import commit_json, file_digest, read_json, sync_folder
from llmcompress.types import BlockOutcome, Noun

AT_FDCWD = -100
RENAME_EXCHANGE = 2
KEPT_HIDDEN = 2


class CommitRecord(Noun):
    """What one finished step left on disk."""

    step: int
    shard: str
    shard_digest: str
    hidden_digest: str
    previous: str
    outcome: BlockOutcome | None


def check_output(output: Path, source: Path, force: bool) -> None:
    """Refuse an output that exists, is the input, lies inside it, or has no parent. Raises InputError."""
    real, origin = output.resolve(), source.resolve()
    if real == origin:
        raise InputError(f"output equals the input: {output.name}", "choose another -o")
    if origin in real.parents:
        raise InputError(f"output lies inside the input: {output.name}", "choose another -o")
    if real in origin.parents:
        raise InputError(f"the input lies inside the output: {output.name}", "choose another -o")
    if not real.parent.is_dir():
        raise InputError(f"no such folder for the output: {output.parent}", "create it, or choose another -o")
    if (output.exists() or output.is_symlink()) and not force:
        raise InputError(f"output already exists: {output.name}", "choose another -o, or pass --force to replace it")


class Journal:
    """The state of one run on one output. Use inside `with journal.locked():`."""

    def __init__(self, output: Path) -> None:
        self.output = output.absolute()
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.state = self.output.with_name(f".{self.output.name}.llmcompress")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output against other runs. Raises BusyError when another run holds it."""
        try:
            self.state.mkdir(exist_ok=True)
            lock = FileLock(self.state / "lock", timeout=0, mode=0o666)
            lock.acquire()
        except Timeout:
            raise BusyError(f"another run is writing {self.output.name}", "wait for it, or choose another -o") from None
        except OSError as error:
            where = self.output.parent
            raise MachineError(f"cannot write in {where}: {error.strerror}", "check permissions and the disk") from None
        try:
            if not (self.state / "lock").exists():  # the run that held it finished and removed it under our feet
                raise BusyError(f"another run has just written {self.output.name}", "look at it, or try again")
            yield
        finally:
            lock.release()

    @property
    def run_file(self) -> Path:
        return self.state / "run.json"

    def begin(self, request: dict[str, str]) -> bool:
        """Compare what is asked with what an unfinished run was asked; True when there is one to go on with.

        Raises InputError naming what differs; nothing is changed then.
        """
        if not self.run_file.exists():
            return False
        before = read_json(self.run_file)
        known = before.get("request", {}) if isinstance(before, dict) else {}
        differs = sorted(key for key in known.keys() | request.keys() if known.get(key) != request.get(key))
        if differs:
            raise InputError(
                f"an unfinished run on {self.output.name} was started differently: {', '.join(differs)}",
                "repeat the first command to go on with it, or pass --restart to discard it",
            )
        return True

    def published_request(self) -> dict[str, str] | None:
        """What the output was made from, if a run died after publishing it and before forgetting its state."""
        record = self.output / "llmcompress.json"
        if not (self.run_file.is_file() and record.is_file()):
            return None
        run, made = read_json(self.run_file), read_json(record)
        if not (isinstance(run, dict) and isinstance(made, dict)):
            return None
        last = made.get("healing") or [made]  # what was done to it last
        asked = last[-1].get("request")
        return dict(asked) if run.get("request") == asked else None

    @contextmanager
    def in_one_go(self) -> Iterator[None]:
        """`locked`, for what is not resumed: nothing is left of it when it fails.

        Raises InputError where an unfinished run has work here.
        """
        with self.locked():
            if self.run_file.exists():
                raise InputError(f"an unfinished run on {self.output.name} is kept", "finish it, or choose another -o")
            self.discard()
            try:
                yield
            finally:
                self.clear()  # after `publish` there is nothing left to clear

    def record_request(self, request: dict[str, str], environment: dict[str, str]) -> None:
        """Note what was asked and on what machine, once, at the start of a new run."""
        commit_json(self.run_file, {"request": request, "environment": environment})

    def changed_environment(self, environment: dict[str, str]) -> list[str]:
        """Names of what a result depends on that differ from when the unfinished run began."""
        before = read_json(self.run_file).get("environment", {})
        return sorted(key for key, value in environment.items() if before.get(key) != value)

    def discard(self) -> None:
        """Forget the unfinished run, whatever it left."""
        shutil.rmtree(self.partial, ignore_errors=True)
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
        commit_json(self.record_path(record.step), record.model_dump(mode="json"))
        self.hidden_path(record.step - KEPT_HIDDEN).unlink(missing_ok=True)

    def committed(self) -> list[CommitRecord]:
        """The records of all finished steps whose chain and shards still hold, from step 0 on.

        A damaged shard, or a step whose hidden states are gone, ends the list: it is redone.
        """
        found: list[CommitRecord] = []
        previous = ""
        while self.record_path(len(found)).exists():
            path = self.record_path(len(found))
            try:
                record = CommitRecord.parse(path.read_bytes(), path.name)
            except InputError:
                break
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
        """Remove the state of a finished run, and what `--force` replaced."""
        shutil.rmtree(self.partial, ignore_errors=True)
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
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink()
