"""A rewrite and its check: what every reparameterization is given, and what it returns.

Each file of `compress/reparam` has a constant `SCOPE` and one function,

    rewrite(subject: Subject, options: ReparamOptions) -> Rewritten

`SCOPE == "block"`: `subject.module` is one loaded block and `subject.calls` are the calls the model would make to
it on calibration text, so that it can be used as soon as a block's weights are there. `SCOPE == "model"`: it is a
loaded transformers model, and the calls are of the whole model (`input_ids=...`). Either is edited in place, at its
own dtype when all is done. Every edit is made in float64 and undone if the output moves by more than `TOLERANCE`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.rewriting.clipping import ActivationQuantizer
from llmcompress.compress.rewriting.exact import as_double, exact, in_float64, relative_difference
from llmcompress.errors import InputError
from llmcompress.model.stream import hidden_of
from llmcompress.types import Fallback

TOLERANCE = 1e-8
Rounding = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Call:
    """One call of a module: everything it is given, hidden states or tokens included."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def run(self, module: nn.Module) -> Tensor:
        """What the module makes of it: the logits of a model, the hidden states of a block."""
        output = module(*self.args, **self.kwargs)
        logits = getattr(output, "logits", None)
        return hidden_of(output) if logits is None else logits

    def doubled(self) -> "Call":
        """The same call in float64."""
        return Call(as_double(self.args), as_double(dict(self.kwargs)))


@dataclass(frozen=True)
class Subject:
    """What is rewritten, and the calibration calls it is observed on.

    unseen    calls with tokens that calibration text lacks: static ranges are to hold them, nothing else looks at them

    probe     the call that sites are found and every edit is checked with: short, but of several tokens; where it is
              not given, the first of `calls`
    rounding  (name of a linear inside the module, its weight (rows, columns)) -> the weight a reader of the file would
              see; for methods that search for what survives rounding
    """

    module: nn.Module
    calls: Sequence[Call]
    probe: Call | None = None
    rounding: Rounding | None = None
    unseen: Sequence[Call] = ()

    @property
    def first(self) -> Call:
        """The call sites are found with. Raises InputError when there is none."""
        if self.probe is None and not self.calls:
            raise InputError("a reparameterization needs at least one call of its subject", "pass calibration text")
        return self.probe or self.calls[0]


@dataclass(frozen=True)
class Rewritten:
    """What was done to a subject.

    sites       what was rewritten, by name inside the module
    fallbacks   what was left as it was, and why
    difference  largest relative difference of the probe's output in float64
    native      whether the model's own class can hold the result, so that plain transformers opens it once saved
    notes       what whoever saves the model must know
    quantizers  reader of a norm -> the tensor-wise quantizer of its input (repquant)
    limits      linear -> largest magnitude (rows, groups) to clamp its weight to before rounding (awq)
    """

    sites: tuple[str, ...]
    fallbacks: tuple[Fallback, ...]
    difference: float
    native: bool = True
    notes: tuple[str, ...] = ()
    quantizers: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    limits: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Saved:
    """One module's own parameters and children, to be put back."""

    part: nn.Module
    children: dict[str, nn.Module | None]
    parameters: dict[str, tuple[nn.Parameter | None, Tensor | None]]

    @classmethod
    def of(cls, part: nn.Module) -> "_Saved":
        parameters = {
            name: (tensor, None if tensor is None else tensor.detach().clone())
            for name, tensor in part._parameters.items()
        }
        return cls(part, dict(part._modules), parameters)

    def restore(self) -> None:
        self.part._modules.clear()
        self.part._modules.update(self.children)
        self.part._parameters.clear()
        for name, (tensor, value) in self.parameters.items():
            if tensor is not None and value is not None:
                tensor.data.copy_(value)
            self.part._parameters[name] = tensor


class Work:
    """Edits of one subject, made and checked one after the other; see `working`."""

    def __init__(self, subject: Subject) -> None:
        self.module = subject.module
        self.probe = subject.first.doubled()
        self.reference = self.probe.run(self.module)
        self.sites: list[str] = []
        self.fallbacks: list[Fallback] = []
        self.difference = 0.0

    def attempt(self, where: str, parts: Sequence[nn.Module], edit: Callable[[], None]) -> bool:
        """Make an edit that touches only `parts`; keep it if the output stays, else undo it and record why.

        `edit` may raise InputError to say why the site cannot be rewritten.
        """
        saved = [_Saved.of(part) for part in parts]
        try:
            edit()
            difference = relative_difference(self.probe.run(self.module), self.reference)
            reason = f"the output would change by {difference:.1e}"
        except InputError as error:
            difference, reason = float("nan"), error.what
        if difference <= TOLERANCE:
            self.sites.append(where)
            self.difference = max(self.difference, difference)
            return True
        for one in saved:
            one.restore()
        self.fallbacks.append(Fallback(where=where, reason=reason))
        return False

    def require(self, where: str, parts: Sequence[nn.Module], edit: Callable[[], None]) -> None:
        """`attempt`, for a rewrite of which nothing is left when this edit fails. Raises InputError with the reason."""
        if not self.attempt(where, parts, edit):
            raise InputError(f"{where}: {self.fallbacks[-1].reason}", "leave this reparameterization out")

    def leave(self, where: str, reason: str) -> None:
        """Record a site that is left as it is."""
        self.fallbacks.append(Fallback(where=where, reason=reason))

    def result(self, **more: Any) -> Rewritten:
        """The outcome so far; `more` are further fields of Rewritten."""
        return Rewritten(tuple(self.sites), tuple(self.fallbacks), self.difference, **more)


@contextmanager
def working(subject: Subject) -> Iterator[Work]:
    """Hold the subject in float64, without gradients, while it is edited."""
    training = subject.module.training
    subject.module.eval()
    try:
        with torch.no_grad(), in_float64(subject.module), exact():
            yield Work(subject)
    finally:
        subject.module.train(training)
