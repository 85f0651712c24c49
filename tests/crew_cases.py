"""What each process of a crew does in a test: run by `Forker.run(..., ranks=n, call="tests.crew_cases:NAME")`."""

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llmcompress.cli import main
from llmcompress.cli.crew import rank
from llmcompress.compress import rounds
from llmcompress.errors import CompressError, InputError, MachineError, out_of_memory
from llmcompress.model.crew import ALONE, Crew, Joined, OutOfMemoryError
from llmcompress.model.shares import OrderedSums, Share
from llmcompress.types import LinearSpec

NUMBERS = (1e8, 1.0, -1e8, 0.3, 3e7, -3e7, 0.7)  # in float32 their sum depends on the order
BATCHES = len(NUMBERS)


def ending(error: CompressError) -> None:
    """What a thread does that sees that another process does not answer."""
    os._exit(error.exit_code)


def worded(error: BaseException) -> CompressError:
    """Errors of these cases are in words already."""
    return error if isinstance(error, CompressError) else MachineError(str(error))


def term(place: int) -> torch.Tensor:
    """What one batch has."""
    return torch.tensor([NUMBERS[place], 0.1 * place + 0.7])


def sums(share: Share) -> dict[str, torch.Tensor]:
    """Sums of what batches have; some of them lack one name, and all come twice."""
    found = OrderedSums(share)
    for turn in range(2):
        for place in share.places:
            found.put("all", term(place) + turn)
            if place % 3:
                found.put("some", term(place).to(torch.float64))
            found.close_batch()
    return found.take()


def in_order() -> torch.Tensor:
    """The sum of `sums`, written down."""
    total = torch.zeros(2)
    for turn in range(2):
        for place in range(BATCHES):
            total = total + (term(place) + turn)
    return total


def work() -> int:
    """Everything that processes say to each other, each against what one process has."""
    with Joined(ending, worded) as crew:
        share, every = Share(BATCHES, crew), list(map(term, range(BATCHES)))
        together, one = sums(share), sums(Share(BATCHES))
        assert together.keys() == one.keys()
        assert all(torch.equal(together[name], one[name]) for name in one)
        assert torch.equal(one["all"], in_order())
        assert not torch.equal(sum(every, torch.zeros(2)), sum(reversed(every), torch.zeros(2)))
        shared, gathered = share.all(share.of(every)), list(share.gathered(share.of(every)))
        assert all(map(torch.equal, shared, every))
        assert len(gathered) == (BATCHES if crew.rank == 0 else 0)
        assert all(map(torch.equal, gathered, every))
        few = Share(1, crew)
        assert torch.equal(few.all(few.of(every[:1]))[0], every[0])
        spread(crew)
        verdicts(crew)
    return 0


def spread(crew: Crew) -> None:
    """Tensors of every kind, from the last process."""
    root = crew.size - 1
    sent = {
        "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3).T,
        "none": torch.empty(0, 4),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(1e-300, dtype=torch.float64),
    }
    heard = crew.spread(sent if crew.rank == root else {}, root)
    assert heard.keys() == sent.keys()
    assert all(torch.equal(heard[name], sent[name]) and heard[name].dtype == sent[name].dtype for name in sent)


def verdicts(crew: Crew) -> None:
    """Process 0 decides, and where it fails all do."""
    spec = LinearSpec(bits=3, group_size=64)
    assert crew.first(lambda: [spec, spec] if crew.rank == 0 else 1 / 0, LinearSpec) == [spec, spec]
    assert crew.first(lambda: None) is None
    with pytest.raises(InputError, match="no") as caught:
        crew.first(refuse)
    assert caught.value.hint == "yes"
    assert crew.agreed(True)
    assert not crew.agreed(crew.rank != 1)
    with pytest.raises(InputError, match="text"):
        crew.same(str(crew.rank), "text")
    assert crew.deal([5, 3, 3, 1])[:2] == [0, 1]
    assert Crew(0, 2).deal([1, 1, 4, 2]) == [1, 1, 0, 1]


def refuse() -> None:
    """What an input error is like."""
    raise InputError("no", "yes")


def fail() -> None:
    """The last process fails."""
    with Joined(ending, worded) as crew:
        if crew.rank == crew.size - 1:
            raise InputError("disk of strangers", "try another")
        crew.wait()


def failing() -> int:
    """The others hear why."""
    with pytest.raises(InputError, match="disk of strangers"):
        fail()
    return 2


def scarce() -> int:
    """Memory runs out in one process, in the midst of a sum of the others, and in all; then they meet again."""
    with Joined(ending, worded) as crew:
        for turn, poor in enumerate(({crew.size - 1}, {0}, set(range(crew.size)))):
            share = Share(BATCHES, crew)
            with pytest.raises(MemoryError) if crew.rank in poor else pytest.raises(OutOfMemoryError) as caught:
                if crew.rank in poor:
                    raise MemoryError
                sums(share)
            assert out_of_memory(caught.value)
            crew.meet_again(caught.value)
            assert crew.first(lambda turn=turn: turn) == turn
            assert torch.equal(sums(share)["all"], in_order())
            crew.wait()
            dist.barrier()  # nobody begins the next turn while another is in this one
        ALONE.meet_again(MemoryError())
    return 0


def ruined() -> int:
    """Memory runs out in the first process, and the last fails on its way there."""
    with pytest.raises(InputError, match="disk of strangers"):
        miss()
    return 2


def miss() -> None:
    """All but the last process wait to meet again."""
    with Joined(ending, worded) as crew:
        if crew.rank == crew.size - 1:
            raise InputError("disk of strangers", "try another")
        crew.meet_again(MemoryError())


def short_of_memory() -> int:
    """The program, where memory runs out in the second block, in process SCARCE_RANK."""
    genuine, calls = rounds.BlockRounds.rounded, []

    def rounded(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and rank() == int(os.environ["SCARCE_RANK"]):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return genuine(*args, **more)

    rounds.BlockRounds.rounded = rounded  # type: ignore[method-assign]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def stopped() -> int:
    """The last process stops without ending, and the others notice."""
    with Joined(ending, worded, patience=2.0) as crew:
        crew.wait()
        if crew.rank == crew.size - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(60)
        crew.wait()
    return 0
