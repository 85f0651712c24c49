"""Everything that can go wrong, and the exit code each kind ends with.

    CompressError
    ├── InputError        2   what the user gave is wrong or unsafe; nothing was written
    ├── MachineError      3   the machine failed (disk, memory, network); finished work is kept
    ├── BusyError         6   another run holds this output
    └── Interrupted  130/143  a signal stopped the run; finished work is kept

Anything else that escapes is a bug and ends with 5.
"""


class CompressError(Exception):
    """An error a user can act on: `what` is wrong and where, and a `hint` with what to try."""

    exit_code = 5

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint


class InputError(CompressError):
    """The user's input is wrong or unsafe."""

    exit_code = 2


class MachineError(CompressError):
    """The machine failed; what was finished is kept and the same command goes on."""

    exit_code = 3


class BusyError(CompressError):
    """Another run holds the output."""

    exit_code = 6


class Interrupted(CompressError):
    """A signal asked the run to stop; what was finished is kept."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("interrupted; finished blocks are kept", "run the same command again to go on")
        self.exit_code = 128 + signal_number
