"""What Python, torch and click raise, in words that a user can act on."""

import errno
import signal
from collections.abc import Iterator
from pathlib import Path

import click

from llmcompress.errors import CompressError, InputError, Interrupted, MachineError, Stopped, out_of_memory

SHOWN = 40  # letters of a name that is too long

INSTALLED_WITH = {"torch": ("PyTorch", "torch")} | {
    name: (name, name) for name in ("accelerate", "huggingface_hub", "numpy", "safetensors", "scipy", "transformers")
}


def understood(error: BaseException) -> BaseException:
    """What a user can act on in place of what Python and torch raise; the rest as it is."""
    for cause in _chain(error):  # libraries wrap what is raised in what they call back
        if isinstance(cause, Stopped):
            return Interrupted(cause.signal_number)
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return Interrupted(signal.SIGINT)
    if out_of_memory(error):
        hint = "--max-memory SIZE takes less; else --set calibration.batch_size=1, or fewer processes (--nproc)"
        return MachineError("out of memory; finished blocks are kept", hint)
    if _device_failed(error):
        hint = "run the same command again to go on, on another device if it fails again (--device)"
        return MachineError(f"the device failed: {str(error).splitlines()[0][:160]}", hint)
    if isinstance(error, ModuleNotFoundError) and error.name in INSTALLED_WITH:
        title, package = INSTALLED_WITH[error.name]
        return MachineError(f"{title} is not installed", f"pip install {package}")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        name = Path(str(error.filename or "")).name
        return InputError(f"{name[:SHOWN]}...: a name too long for this disk", "choose a shorter one")
    if isinstance(error, OSError):
        return MachineError(str(error), "check the disk and its permissions; finished work is kept")
    return error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from or while something was done about."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__


def _device_failed(error: BaseException) -> bool:
    """Whether it is what torch raises where a GPU is lost or a kernel fails; by its name, as torch is not imported."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "AcceleratorError" in names or (isinstance(error, RuntimeError) and str(error).startswith("CUDA error"))


def exit_code(error: BaseException) -> int:
    """The code that a program ended by an error exits with."""
    if isinstance(error, click.ClickException):
        return 2
    error = understood(error)
    return error.exit_code if isinstance(error, CompressError) else 5
