"""Where hidden states wait until they are read again: in memory, or in files mapped into it.

A mapped file is not anonymous memory: the system drops its pages when it needs the room and reads them again. The
values are the same either way, so a run whose states went to disk gives the same bytes. A file is removed as soon as
it is mapped: it lives on while its tensor does, and nothing is left of it when a run dies.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.errors import MachineError
from llmcompress.model.heap import LARGE_BYTES

Keep = Callable[[Tensor], Tensor]  # where a tensor waits
TRAY_BYTES = 4 * LARGE_BYTES


class Shelf:
    """Keeps tensors in `folder` (the system's for temporary files where None): those put away, or `everything`."""

    def __init__(self, folder: Path | None = None, *, everything: bool = False) -> None:
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder
        self.everything = everything

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor that is read by the next block: mapped only where everything is."""
        return self.put_away(tensor) if self.everything else tensor

    def put_away(self, tensor: Tensor) -> Tensor:
        """The same values, mapped from a file; do not write into them. What is not on the CPU is given back.

        Raises MachineError where the file cannot be written.
        """
        if tensor.device.type != "cpu" or not tensor.numel():
            return tensor
        flat = tensor.detach().contiguous().flatten()
        try:
            handle, path = tempfile.mkstemp(prefix="shelf.tmp-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(flat.view(torch.uint8).numpy().data)
                mapped = torch.from_file(path, shared=False, size=flat.numel(), dtype=flat.dtype)
            finally:
                os.unlink(path)
        except OSError as error:
            raise MachineError(
                f"cannot keep hidden states in {self.folder.name}: {error.strerror}",
                "free disk space; TMPDIR names the folder of commands that have no state of their own",
            ) from error
        return mapped.view(tensor.shape)


class Tray:
    """Where tensors of one kind wait, in the order they come: small ones side by side in mappings of their own.

    What is kept for long among what is soon let go leaves holes in the heap, which grows then. A mapping goes with the
    last tensor in it. `keep` is asked first, and what it moves elsewhere stays there.
    """

    def __init__(self, keep: Keep) -> None:
        self._keep, self._room, self._used = keep, torch.empty(0), 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same values, not to be written to."""
        kept = self._keep(tensor)
        if kept is not tensor or tensor.device.type != "cpu" or not 0 < tensor.nbytes < LARGE_BYTES:
            return kept
        alike = self._room.shape[1:] == tensor.shape and self._room.dtype == tensor.dtype
        if not alike or self._used == len(self._room):
            self._room, self._used = tensor.new_empty(-(-TRAY_BYTES // tensor.nbytes), *tensor.shape), 0
        place = self._room[self._used]
        self._used += 1
        return place.copy_(tensor)
