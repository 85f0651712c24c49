"""Round the linears that read one input, by one look at it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch
from torch import Tensor, nn

from llmcompress.compress.dealing import dealt
from llmcompress.compress.grid import Codes, proxy_loss, squared_errors
from llmcompress.compress.learning import Learned
from llmcompress.compress.lowrank import quantized
from llmcompress.compress.observe import weight_of
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.compress.targets import aim
from llmcompress.model.crew import Crew
from llmcompress.types import BlockTrace, LinearInfo, LinearSpec, QuantizerOptions

LEFT = "left at the source precision"
FEW = "fewer calibration tokens reached it than it has inputs: its Hessian was damped accordingly"
Learner = Callable[..., Learned]
Look = tuple[Seen, dict[str, Tensor]]  # of one group: its input, and the term of the target of each writer


@dataclass(frozen=True)
class Method:
    """How to round: the quantizer, what it is told and the dtype of stored scales.

    `learns` is for good, not on trial: blocks are learned where the quantizer can, and the error of every linear is
    measured. `hints` are what rewrites of the model found out for it, `curvatures` those of the loss in linears'
    outputs, by name, where output-side feedback uses them.
    """

    quantizer: ModuleType
    options: QuantizerOptions
    dtype: torch.dtype
    learns: bool = False
    hints: Hints = field(default_factory=Hints)
    curvatures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def compares(self) -> bool:
        """Whether the full-precision model has to run beside the one that will be stored."""
        aims = self.options.target != "layer" and self.options.alpha != 0
        return bool(self.quantizer.NEEDS_HESSIAN and (aims or self.learners))

    @property
    def learners(self) -> tuple[Learner, ...]:
        """The ways in which the quantizer learns once a whole block is rounded, where it does and is to."""
        return getattr(self.quantizer, "LEARNERS", ()) if self.learns else ()


@dataclass(frozen=True)
class Rounded:
    """One linear, the weight that was asked for, what was made of it, and what was seen of its input.

    `wanted` and `seen` are let go once codes are final: Hessians of all groups would be larger than the block.
    """

    linear: LinearInfo
    wanted: Tensor
    result: Quantized
    seen: Seen | None
    known: tuple[float, float] | None = None
    tokens: int | None = None  # that were routed to it, of an expert's

    def errors(self) -> tuple[float, float]:
        """Error of the linear's output against what was asked for, and that of an output of zeros."""
        if self.known is not None:
            return self.known
        hessian = None if self.seen is None else self.seen.hessian
        found = _losses(self.wanted, self.result.codes, hessian)
        if all(map(math.isfinite, found)):
            return found
        return _losses(self.wanted.double(), self.result.codes, None if hessian is None else hessian.double())

    @property
    def refused(self) -> bool:
        """Whether the linear is better left at the source precision: nothing usable is known of its input.

        Experts are rounded all the same: those of a block share a format.
        """
        return self.result.blind and self.linear.expert is None

    def settled(self, *, measure: bool) -> "Rounded":
        """Without the tensors the codes were made from: they are final, and so is their error."""
        return replace(self, known=self.errors() if measure else None, wanted=self.wanted.new_empty(0), seen=None)


def _losses(wanted: Tensor, codes: Codes, hessian: Tensor | None) -> tuple[float, float]:
    """Error of a stored weight and of zeros, `tr(dW H dW^T)`; infinite where the dtype of `wanted` cannot hold them."""
    if hessian is None and wanted.dtype == torch.float32:
        return squared_errors(wanted, codes)
    stored = codes.dequantize().to(wanted.dtype)
    if hessian is None:
        return float(stored.sub_(wanted).square_().sum()), float(wanted.square().sum())
    return proxy_loss(wanted, stored, hessian), proxy_loss(torch.zeros_like(wanted), wanted, hessian)


def round_group(
    method: Method,
    block: nn.Module,
    info: BlockTrace,
    *,
    members: Sequence[tuple[LinearInfo, LinearSpec]],
    looks: list[Look | None],
    crew: Crew,
) -> list[Rounded]:
    """Round a group by the one look at it, which is taken out of `looks`, so that it can be let go piece by piece.

    Nothing is installed.
    """
    weights, seen = [weight_of(block, info, linear) for linear, _ in members], None
    wanted = weights
    if (look := looks.pop()) is not None:
        seen, terms = look
        del look
        wanted, seen = aim(method.options, seen, weights, [terms.pop(linear.name, None) for linear, _ in members])
    wanted = [_own(asked, weight) for asked, weight in zip(wanted, weights, strict=True)]
    for place, weight in enumerate(weights):  # what is zero stays zero: a skipped half of a block corrects nothing
        if not weight[:1].any() and not weight.any():
            wanted[place] = torch.zeros_like(wanted[place])
    for place, (linear, spec) in enumerate(members):
        if spec.inputs is None or not spec.inputs.hadamard:  # limits are of the weight as it was
            wanted[place] = method.hints.clamped(linear.name, wanted[place])
    pairs = zip(wanted, members, strict=True)
    requests = [Request(weight, spec, method.curvatures.get(linear.name)) for weight, (linear, spec) in pairs]
    results = dealt(crew, method.quantizer, requests, seen, options=method.options, dtype=method.dtype)
    found = []
    for (linear, _), weight, result in zip(members, wanted, results, strict=True):
        result = _explained(result, linear)
        tokens = None if linear.expert is None or seen is None else seen.tokens
        if tokens is not None and 0 < tokens < linear.columns:
            result = replace(result, fallbacks=(*result.fallbacks, FEW))
        known = None if seen is None or seen.nothing or not seen.finite else seen
        found.append(Rounded(linear, weight, result, known, tokens=tokens))
    return found


def _own(asked: Tensor, weight: Tensor) -> Tensor:
    """What is asked for apart from the weight, where what is installed goes, and laid out by rows."""
    return weight.clone(memory_format=torch.contiguous_format) if asked is weight else asked


def round_head(method: Method, head: LinearInfo, weight: Tensor, spec: LinearSpec, seen: Seen | None) -> Rounded:
    """Quantize the head's weight `(rows, columns)`; nothing is installed."""
    wanted = weight
    if seen is not None:
        (wanted,), seen = aim(method.options, seen, [weight], [None])
    requests = [Request(wanted, spec)]
    (result,) = quantized(method.quantizer, requests, seen, options=method.options, dtype=method.dtype)
    return Rounded(head, wanted, _explained(result, head), seen)


def _explained(result: Quantized, linear: LinearInfo) -> Quantized:
    """An answer with what becomes of a linear of which the quantizer knows nothing."""
    if not result.blind:
        return result
    end = LEFT if linear.expert is None else "rounded without them"
    return replace(result, fallbacks=tuple(f"{note}: {end}" for note in result.fallbacks))
