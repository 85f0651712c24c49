"""Several processes that work on one model: how they meet, say things to all, and notice that one is gone.

Every process runs the same code. What they divide is text, a batch at a time (`shares.py`), and the rounding of
linears; process 0 alone writes, and what it decides it tells. Nothing that travels is unpickled: tensors are bytes,
nouns JSON.

Processes find each other as torch's do, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and talk through gloo. A
process that dies closes its connections, which ends the others at their next word; for one that hangs, or whose machine
is gone, each has a thread that shows every few seconds that it lives and looks whether the others do.
"""

import gc
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from traceback import clear_frames
from types import TracebackType
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from llmcompress.errors import BusyError, CompressError, InputError, MachineError, out_of_memory
from llmcompress.files import parse_json
from llmcompress.model.checkpoint import DTYPE_NAMES, TORCH_DTYPES
from llmcompress.types import Noun

BEAT_SECONDS = 5.0
POLL_SECONDS = 0.05
LOST_SECONDS = 120.0
MEETING_SECONDS = 1800.0  # for a process to come to its next word
LONGEST = timedelta(days=7)  # of one wait: it is the threads that notice
GONE = "gone"
FAILED = "failed"
KINDS = {kind.exit_code: kind for kind in (InputError, MachineError, BusyError)}
HINT = "the same command goes on, with any number of processes"


class LostError(MachineError):
    """Another process of this run is gone."""


class OutOfMemoryError(MachineError):
    """Another process of this run has no memory left, and waits for all to begin again."""


def lost() -> LostError:
    """What is said where another process is gone and did not say why."""
    return LostError("another process of this run has ended or does not answer; finished blocks are kept", HINT)


class Crew:
    """The processes of a run, seen from one of them; by default there is only one.

    rank    of this process; 0 writes and decides
    size    how many there are
    device  where this process computes
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self.store = rank, size, store
        self.device = torch.device("cpu")
        self._meeting = 0

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Turns what torch raises where a connection breaks into what the process at its other end had to say."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise self._told() from error

    def _told(self) -> CompressError:
        with suppress(RuntimeError):
            time.sleep(1)  # for the words to arrive, which come by another way
            if self.store.check([FAILED]):
                said = parse_json(self.store.get(FAILED), "another process")
                return KINDS.get(said["code"], MachineError)(f"process {said['rank']}: {said['what']}", said["hint"])
            places = self._places()
            if any(self.store.check([key]) for key in places if key != places[self.rank]):
                return OutOfMemoryError("another process of this run has no memory left", HINT)
        return lost()

    def _places(self) -> list[str]:
        """What every process sets where the next meeting is asked for."""
        return [f"meeting/{self._meeting}/{rank}" for rank in range(self.size)]

    def meet_again(self, ended: BaseException) -> None:
        """Begin anew with all, where memory ran out in one of them: whatever was being said is not said to its end.

        What the frames that `ended` came through hold is let go of: memory, and connections the others listen at. They
        learn of it at their next word, which raises OutOfMemoryError, and have to come here, too. Raises what another
        process has ended with.
        """
        following: BaseException | None = ended
        while following is not None:
            clear_frames(following.__traceback__)
            following = following.__cause__ or following.__context__
        gc.collect()
        if self.size == 1:
            return
        places = self._places()
        with self.speaking():
            self.store.set(places[self.rank], "")
            _leave()
            end = time.monotonic() + MEETING_SECONDS
            while not self.store.check(places):
                if self.store.check([FAILED]) or time.monotonic() > end:
                    raise self._told()
                time.sleep(POLL_SECONDS)
            store = PrefixStore(f"group/{self._meeting}", self.store)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=LONGEST)
        self._meeting += 1

    def confess(self, error: CompressError) -> None:
        """Leave word for the others of why this process ends, unless it is that another one has."""
        if self.store is not None and not isinstance(error, LostError):
            with suppress(RuntimeError):
                said = {"rank": self.rank, "what": error.what, "hint": error.hint, "code": error.exit_code}
                self.store.compare_set(FAILED, "", json.dumps(said))

    def first(self, make: Callable[[], Any], kind: type[Noun] | None = None) -> Any:
        """What process 0 makes, on every process: plain JSON values, nouns of one `kind`, or a list of either.

        Where it raises a CompressError all of them do, of the same exit code.
        """
        if self.size == 1:
            return make()
        if self.rank == 0:
            try:
                value = make()
            except CompressError as error:
                self._say({"error": [error.exit_code, error.what, error.hint]})
                raise
            self._say({"value": _plain(value)})
            return value
        said = self._hear()
        if "error" in said:
            code, what, hint = said["error"]
            raise KINDS.get(code, InputError)(what, hint)
        return _formed(said["value"], kind)

    def same(self, word: str, what: str) -> None:
        """Raises InputError, naming `what`, on every process where `word` is not the same on all."""
        if not self.agreed(self.first(lambda: word) == word):
            raise InputError(f"{what}: not the same for every process of this run", "give all of them the same files")

    def agreed(self, here: bool) -> bool:
        """Whether something holds on every process."""
        if self.size == 1:
            return here
        flag = torch.tensor([int(here)])
        with self.speaking():
            dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag.item())

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            self.agreed(True)

    def spread(self, tensors: Mapping[str, Tensor], root: int = 0) -> dict[str, Tensor]:
        """Tensors of process `root`, by name, on every process; what the others give is not looked at."""
        if self.size == 1:
            return dict(tensors)
        table = [(name, form_of(tensor)) for name, tensor in tensors.items()]
        header = self._hear(root) if root != self.rank else self._say(table)
        found: dict[str, Tensor] = {}
        for name, form in header:
            data = raw(tensors[name]) if root == self.rank else Form(*form).room()
            with self.speaking():
                if data.numel():
                    dist.broadcast(data, root)
            found[name] = tensors[name] if root == self.rank else Form(*form).tensor(data, self.device)
        return found

    def _say(self, value: Any) -> Any:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        with self.speaking():
            dist.broadcast(torch.tensor([len(data)]), self.rank)
            dist.broadcast(data, self.rank)
        return value

    def _hear(self, root: int = 0) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        with self.speaking():
            dist.broadcast(length, root)
            data = torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(data, root)
        return json_of(data)

    def deal(self, costs: Sequence[float]) -> list[int]:
        """Who does each piece of work: the dearest first, each to who has the least so far."""
        owners, load = [0] * len(costs), [0.0] * self.size
        for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
            owner = min(range(self.size), key=lambda rank: (load[rank], rank))
            owners[place] = owner
            load[owner] += costs[place]
        return owners


ALONE = Crew()


def _leave() -> None:
    """Close all connections, which ends what others wait for."""
    if dist.is_initialized():
        dist.destroy_process_group()


class Form(NamedTuple):
    """What a tensor is besides its bytes: `dtype` as a safetensors file names it, whether it is on the CPU."""

    dtype: str
    shape: list[int]
    host: bool

    def room(self) -> Tensor:
        """Room for its bytes."""
        return torch.empty(self.shape, dtype=TORCH_DTYPES[self.dtype]).flatten().view(torch.uint8)

    def tensor(self, data: Tensor, device: torch.device) -> Tensor:
        """The tensor that bytes are of, on the CPU or on this process's `device`."""
        found = data.view(TORCH_DTYPES[self.dtype]).view(self.shape)
        return found if self.host else found.to(device)


def form_of(tensor: Tensor) -> Form:
    """The form of a tensor."""
    return Form(DTYPE_NAMES[tensor.dtype], list(tensor.shape), tensor.device.type == "cpu")


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, on the CPU."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def json_of(data: Tensor) -> Any:
    """A JSON document from its bytes."""
    return parse_json(data.numpy().tobytes(), "another process")


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.model_dump(mode="json") if isinstance(value, Noun) else value


def _formed(value: Any, kind: type[Noun] | None) -> Any:
    if isinstance(value, list):
        return [_formed(one, kind) for one in value]
    return value if kind is None or value is None else kind.parse(json.dumps(value), "another process")


class _Pulse(threading.Thread):
    """Shows that this process lives, and ends it through `end` where another has not for `patience` seconds."""

    def __init__(self, crew: Crew, end: Callable[[CompressError], None], patience: float) -> None:
        super().__init__(daemon=True)
        self.crew, self.end, self.patience = crew, end, patience
        self.store, self.over, self.parent = crew.store.clone(), threading.Event(), os.getppid()
        self.seen = {rank: ("", time.monotonic()) for rank in range(crew.size) if rank != crew.rank}

    def run(self) -> None:
        beats = 0
        while not self.over.wait(min(BEAT_SECONDS, self.patience / 4) if beats else 0):
            beats += 1
            try:
                self.store.set(f"beat/{self.crew.rank}", str(beats))
                late = self._late()
            except RuntimeError:  # the process that keeps the store is gone, or has just finished as this one does
                late = not self.over.wait(self.patience / 4)
            if (late or os.getppid() != self.parent) and not self.over.is_set():
                self.end(lost())

    def _late(self) -> bool:
        now = time.monotonic()
        for rank, (known, since) in self.seen.items():
            key = f"beat/{rank}"
            value = self.store.get(key).decode() if self.store.check([key]) else ""
            if value != known:
                self.seen[rank] = (value, now)
            elif value != GONE and now - since > self.patience:
                return True
        return False


class Joined:
    """A context with the crew that the environment names, until all have done their work.

    `end` is called, on a thread, with what to say before this process ends at once: another one does not answer.
    `known` puts what escapes into words for the other processes. Raises MachineError where they do not come within
    `patience` seconds.
    """

    def __init__(
        self,
        end: Callable[[CompressError], None],
        known: Callable[[BaseException], CompressError],
        *,
        patience: float = LOST_SECONDS,
    ) -> None:
        self._end, self._known, self._patience = end, known, patience
        self._crew, self._pulse, self._store = Crew(), cast(_Pulse | None, None), cast(Any, None)

    def __enter__(self) -> Crew:
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=self._patience)))
            self._store = store  # in process 0 it is what all others talk to, for as long as it is kept
            self._crew = Crew(rank, size, store.clone())
            self._pulse = _Pulse(self._crew, self._end, self._patience)
            self._pulse.start()
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=LONGEST)
        except (RuntimeError, ValueError) as error:
            words = str(error).splitlines()[0][:160]
            raise MachineError(f"the processes of this run do not find each other: {words}", HINT) from error
        return self._crew

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._pulse is None:
            return
        if error is None:
            self._crew.wait()
        else:
            self._crew.confess(self._known(error))
        self._pulse.over.set()
        with suppress(RuntimeError):
            self._crew.store.set(f"beat/{self._crew.rank}", GONE)
        self._pulse.join(BEAT_SECONDS)
        with suppress(RuntimeError):
            _leave()
