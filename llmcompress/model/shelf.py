"""Where hidden states wait until they are read again: in memory, or in files mapped into it.

A mapped file is not anonymous memory: the system drops its pages when it needs the room and reads them again. The
values are the same either way, so a run whose states went to disk gives the same bytes. A file is removed as soon as
it is mapped: it lives on while its tensor does, and nothing is left of it when a run dies.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.errors import MachineError


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
