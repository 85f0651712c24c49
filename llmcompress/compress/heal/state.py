"""What training has reached, kept in the state folder of a run: killed at any moment, it goes on from the last save.

    heal-00012.safetensors   numbers as trained, the best so far, the optimizer's moments
    heal-00012.json          written last: step, figures, and the digest of the file above

Two saves are kept. Random numbers depend on the seed and the step alone, so there is no random state.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from llmcompress.compress.kept import seal, sealed
from llmcompress.compress.shards import write_shard
from llmcompress.files import file_digest
from llmcompress.model.checkpoint import DTYPE_NAMES
from llmcompress.types import Noun

KEPT = 2


class Measured(Noun):
    """KL on held-out text after some steps, nats per token, mean over sequences."""

    step: int
    kld: float


class Position(Noun):
    """Where training stands. `history` has a figure for every save, the first before any step."""

    step: int
    history: tuple[Measured, ...]
    seconds: float
    tensors: str = ""  # sha256 of the file of tensors

    @property
    def best(self) -> Measured:
        """The lowest figure, the earliest of equals."""
        return min(self.history, key=lambda found: (found.kld, found.step))

    @property
    def waited(self) -> int:
        """How many figures there were since the best."""
        return len(self.history) - 1 - self.history.index(self.best)


class Saves:
    """The saves of one run in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _paths(self, number: int) -> tuple[Path, Path]:
        stem = self._folder / f"heal-{number:05d}"
        return stem.with_suffix(".json"), stem.with_suffix(".safetensors")

    def save(self, position: Position, tensors: Mapping[str, Tensor]) -> None:
        """Keep a position, durably; older ones than the last two go."""
        number = len(position.history)
        record, file = self._paths(number)
        layout = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
        digest = write_shard(file, layout, tensors)
        seal(record, position.model_copy(update={"tensors": digest}))
        for path in self._paths(number - KEPT):
            path.unlink(missing_ok=True)

    def latest(self) -> tuple[Position, dict[str, Tensor]] | None:
        """The last save that holds, or None."""
        for record in sorted(self._folder.glob("heal-*.json"), reverse=True):
            file = record.with_suffix(".safetensors")
            position = sealed(record, Position)
            if position is not None and file.is_file() and file_digest(file) == position.tensors:
                return position, load_file(file)
        return None
