"""Training: the healed model's answers are brought nearer to the original's, KL(original || healed) on text.

The original is run once, a block at a time, and only the hidden states that leave its last block are kept; its final
norm and head turn them into answers when a batch needs them. Everything random comes from the seed and the step.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llmcompress.compress.heal.places import active, number
from llmcompress.compress.heal.state import Measured, Position, Saves
from llmcompress.compress.heal.tuning import Tuning, by_name
from llmcompress.compress.measuring import sequence_dnll, sequence_kld
from llmcompress.compress.statistics import mean
from llmcompress.errors import InputError
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.runtime.adapter import reader_of

DIVERGED = 1e9  # nats: stands for what is not finite, and ends training
LEAST_SHARE = 0.1  # of the rate, at the end
WARM_SHARE = 0.05  # of the steps, at the beginning
LONGEST_GRADIENT = 1.0
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    rate      of Adam at its highest, 0 for the method's own: it rises over the first twentieth of the steps and
              falls as a cosine to a tenth
    every     steps between two looks at held-out text, after each of which the state is saved
    patience  looks without a new best after which training stops
    lisa      blocks trained at a time, drawn anew every `period` steps; all where None
    minutes   when to stop besides; what is healed then depends on the machine
    """

    steps: int = 1000
    batch_size: int = 4
    rate: float = 0.0
    every: int = 50
    patience: int = 5
    lisa: int | None = None
    period: int = 20
    minutes: float | None = None
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """The rate of one step, the first being 0."""
        warm = max(round(self.steps * WARM_SHARE), 1)
        if step < warm:
            return self.rate * (step + 1) / warm
        way = (step - warm) / max(self.steps - warm, 1)
        return self.rate * (LEAST_SHARE + (1 - LEAST_SHARE) * (1 + math.cos(math.pi * way)) / 2)

    def rows(self, step: int, available: int) -> list[int]:
        """Which sequences a step reads: every one once, in a random order, then all again in another."""
        found = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, within = divmod(place, available)
            generator = torch.Generator().manual_seed(number(self.seed, "order", epoch))
            found.append(int(torch.randperm(available, generator=generator)[within]))
        return found


class Original:
    """The answers of the original model to some sequences, `(sequences, tokens)`."""

    def __init__(self, folder: Path, tokens: Tensor, *, batch_size: int, device: str) -> None:
        self.tokens = tokens
        self._skeleton = Skeleton.open(folder, device, decode=reader_of(folder))
        self._stream = BlockStream(self._skeleton)
        self._hidden = torch.cat(self._leaving(torch.split(tokens, batch_size)))
        self._skeleton.load_exit()

    @torch.no_grad()
    def _leaving(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Hidden states that leave the last block, on the CPU."""
        hidden, calls = self._stream.start(batches)
        self._skeleton.free_rest()
        for index in range(len(self._skeleton.blocks)):
            block = self._skeleton.load_block(index)
            for place, call in enumerate(calls):
                hidden[place] = self._stream.run_block(index, hidden[place], call[index])
            self._skeleton.free(block)
        return [states.cpu() for states in hidden]

    def answers(self, rows: Sequence[int]) -> Tensor:
        """Log-probabilities `(rows, tokens, vocabulary)` of the next token."""
        hidden = self._hidden[list(rows)].to(self._skeleton.device)
        return torch.log_softmax(self._stream.leave(self.tokens[list(rows)], hidden), -1)


@dataclass(frozen=True)
class Data:
    """The text and the original's answers: rows to train on, to stop by, and to judge by."""

    original: Original
    training: tuple[int, ...]
    held_out: tuple[int, ...]
    judging: tuple[int, ...]


@torch.no_grad()
def distances(
    answers: Iterable[Tensor], original: Original, rows: Sequence[int], batch_size: int
) -> tuple[Tensor, Tensor]:
    """KL(original || model) and rise of the loss of each sequence, float64 `(rows,)`, nats per token.

    answers  the model's logits `(batch, tokens, vocabulary)` for the rows, batch by batch
    """
    klds, rises = [], []
    for logits, place in zip(answers, range(0, len(rows), batch_size), strict=True):
        some = rows[place : place + batch_size]
        p, q = original.answers(some), torch.log_softmax(logits.float(), -1)
        klds.append(sequence_kld(p, q).cpu())
        rises.append(sequence_dnll(p, q, original.tokens[list(some)]).cpu())
    return torch.cat(klds), torch.cat(rises)


class Trainer:
    """Trains a tuning of a loaded model; `run` goes on from the last save and leaves the best numbers in the model."""

    def __init__(self, skeleton: Skeleton, tuning: Tuning, data: Data, schedule: Schedule) -> None:
        self._model, self._device = skeleton.model, skeleton.device
        self._tuning, self._data, self._schedule = tuning, data, schedule
        self._blocks = tuple(index for index in tuning.trained if index >= 0)
        self._numbers = by_name(tuning.trained, self._blocks)
        self._best: dict[str, Tensor] = {}
        self._optimizer = self._begun(0)

    def run(self, saves: Saves) -> Iterator[Position]:
        """Yield where training stands, at the start and after every look at held-out text."""
        schedule, found = self._schedule, saves.latest()
        if found is None:
            position = self._look(Position(step=0, history=(), seconds=0.0))
            saves.save(position, self._state())
        else:
            position = found[0]
            self._restore(position.step, found[1])
        began = time.monotonic() - position.seconds
        yield position
        while self._goes_on(position):
            for step in range(position.step, min(position.step + schedule.every, schedule.steps)):
                self._step(step)
            done = min(position.step + schedule.every, schedule.steps)
            seconds = time.monotonic() - began
            position = self._look(position.model_copy(update={"step": done, "seconds": seconds}))
            saves.save(position, self._state())
            yield position
        self._put(self._best)

    def _logits(self, tokens: Tensor) -> Tensor:
        found: Tensor = self._model(input_ids=tokens.to(self._device), use_cache=False).logits
        return found

    def _goes_on(self, position: Position) -> bool:
        schedule = self._schedule
        late = schedule.minutes is not None and position.seconds >= 60 * schedule.minutes
        lost = position.history[-1].kld >= DIVERGED
        return position.step < schedule.steps and position.waited < schedule.patience and not (late or lost)

    def _look(self, position: Position) -> Position:
        """The position with one more figure; the numbers are remembered where it is the lowest."""
        original, rows = self._data.original, self._data.held_out
        batches = torch.split(original.tokens[list(rows)], self._schedule.batch_size)
        with torch.no_grad(), self._tuning.as_stored():
            answers = map(self._logits, batches)
            klds, _ = distances(answers, original, rows, self._schedule.batch_size)
        kld = mean(klds.tolist())
        if not math.isfinite(kld):
            if not position.history:
                raise InputError("the model to heal gives logits that are not finite", "make it again")
            kld = DIVERGED
        found = position.model_copy(update={"history": (*position.history, Measured(step=position.step, kld=kld))})
        if found.best.step == position.step:
            self._best = {name: parameter.detach().clone() for name, parameter in self._numbers.items()}
        return found

    def _trained_at(self, step: int) -> dict[str, nn.Parameter]:
        schedule = self._schedule
        chosen = active(self._blocks, step // schedule.period, schedule.lisa, schedule.seed)
        return by_name(self._tuning.trained, chosen)

    def _begun(self, step: int) -> torch.optim.AdamW:
        """A new optimizer for the blocks of this period; those of the others, and their moments, are let go."""
        chosen = self._trained_at(step)
        for name, parameter in self._numbers.items():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None
        return torch.optim.AdamW(chosen.values(), betas=BETAS, weight_decay=0.0)

    def _starts_at(self, step: int) -> int:
        """The step at which the optimizer of this one began."""
        schedule = self._schedule
        whole = schedule.lisa is None or schedule.lisa >= len(self._blocks)
        return 0 if whole else step - step % schedule.period

    def _step(self, step: int) -> None:
        schedule, data = self._schedule, self._data
        if self._starts_at(step) == step:
            self._optimizer = self._begun(step)
        for group in self._optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        rows = [data.training[place] for place in schedule.rows(step, len(data.training))]
        p = data.original.answers(rows)
        q = torch.log_softmax(self._logits(data.original.tokens[rows]).float(), -1)
        loss = (p.exp() * (p - q)).sum(-1).mean()
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._trained_at(step).values(), LONGEST_GRADIENT)
        self._optimizer.step()

    def _state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, and the best numbers."""
        found = {f"now.{name}": parameter.detach() for name, parameter in self._numbers.items()}
        found |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, parameter in self._numbers.items():
            for part, tensor in self._optimizer.state.get(parameter, {}).items():
                found[f"{part}.{name}"] = tensor
        return found

    def _restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        def parts(of: str) -> dict[str, Tensor]:
            return {name.removeprefix(of): tensor for name, tensor in state.items() if name.startswith(of)}

        self._put(parts("now."))
        self._best = parts("best.")
        if step and self._starts_at(step) != step:
            self._optimizer = self._begun(self._starts_at(step))
            for part in ("step", "exp_avg", "exp_avg_sq"):
                for name, tensor in parts(f"{part}.").items():
                    parameter = self._numbers[name]
                    moved = tensor if part == "step" else tensor.to(parameter.device)
                    self._optimizer.state[parameter][part] = moved

    def _put(self, numbers: Mapping[str, Tensor]) -> None:
        for name, parameter in self._numbers.items():
            parameter.data = numbers[name].clone().to(parameter.device)
