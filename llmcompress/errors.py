"""Everything that can go wrong, and the exit code each kind ends with.

    CompressError
    ├── InputError        2   what the user gave is wrong or unsafe; nothing was written
    │   └── Refused       2   the same, with every fault that was found
    ├── MachineError      3   the machine failed (disk, memory, network); finished work is kept
    ├── BusyError         6   another run holds this output
    └── Interrupted  130/143  a signal stopped the run; finished work is kept

Anything else that escapes is a bug and ends with 5. Messages may quote files of strangers: what could move the cursor,
start a line of its own or turn the direction of writing does not get through.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

UNPRINTABLE = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def one_line(text: str) -> str:
    """Text of unknown origin on one line: control characters, line ends, marks of direction, half pairs become `?`."""
    return UNPRINTABLE.sub("?", text)


class CompressError(Exception):
    """An error a user can act on: `what` is wrong and where, and a `hint` with what to try."""

    exit_code = 5

    def __init__(self, what: str, hint: str = "") -> None:
        self.what, self.hint = one_line(what), one_line(hint)
        super().__init__(self.what)


class InputError(CompressError):
    """The user's input is wrong or unsafe."""

    exit_code = 2


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with an input, and what to do about it."""

    what: str
    hint: str


class Refused(InputError):
    """An input with one or more faults: `findings` has all of them, the message a line for each."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        clean = (Finding(one_line(x.what), one_line(x.hint)) for x in findings)
        self.findings = tuple(dict.fromkeys(clean))
        super().__init__("", "; ".join(dict.fromkeys(x.hint for x in self.findings)))
        self.what = "\n".join(x.what for x in self.findings)
        self.args = (self.what,)


class MachineError(CompressError):
    """The machine failed; what was finished is kept and the same command goes on."""

    exit_code = 3


class BusyError(CompressError):
    """Another run holds the output."""

    exit_code = 6


class Stopped(BaseException):
    """Raised where a signal arrives. No Exception, so that nobody who expects those takes it for one of theirs."""

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(signal_number)


class Interrupted(CompressError):
    """A signal asked the run to stop; what was finished is kept."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted; finished blocks are kept", "run the same command again to go on")
        self.exit_code = 128 + signal_number


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or a device; by names, as torch is not imported here."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names or "DefaultCPUAllocator" in str(error)
