"""What the linears of a block read on calibration text: a bounded sample of it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llmcompress.compress.rewriting.sites import reading
from llmcompress.compress.rewriting.work import Call, Subject
from llmcompress.errors import InputError


def input_samples(
    block: nn.Module, calls: Sequence[Call], names: Sequence[str], *, tokens: int, skip_first: bool
) -> dict[str, Tensor]:
    """Inputs `(at most tokens, columns)` of the named linears, spread evenly over the calls.

    With `skip_first` the first token of every sequence is left out: many models keep enormous values there, which would
    widen a static range for all others.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    share = max(tokens // max(len(calls), 1), 1)
    for call in calls:

        def see(name: str, tensor: Tensor, call: Call = call) -> None:
            rows = _after_first(tensor, call) if skip_first else tensor.flatten(0, -2)
            step = max(-(-len(rows) // share), 1)
            found[name].append(rows[::step].clone())

        with torch.no_grad(), reading(block, see, names):
            call.run(block)
    silent = [name for name, parts in found.items() if not sum(len(part) for part in parts)]
    if silent:
        raise InputError(f"{silent[0]}: no calibration tokens reached it", "calibrate on sequences of several tokens")
    return {name: torch.cat(parts) for name, parts in found.items()}


def unseen_ends(subject: Subject, names: Sequence[str], *, tokens: int) -> dict[str, Tensor]:
    """Least and largest `(2, columns)` of what the named linears read in calls with tokens that the text lacks.

    Nothing where there are no such calls.
    """
    if not subject.unseen:
        return {}
    seen = input_samples(subject.module, subject.unseen, names, tokens=tokens, skip_first=True)
    return {name: torch.stack([inputs.amin(0), inputs.amax(0)]) for name, inputs in seen.items()}


def _after_first(tensor: Tensor, call: Call) -> Tensor:
    """Rows `(tokens, columns)` without the first of each sequence; all rows where sequences cannot be told apart."""
    if tensor.ndim >= 3:
        return tensor[..., 1:, :].flatten(0, -2)
    given = next((value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)), None)
    if given is None or given.ndim < 2 or given.shape[0] * given.shape[1] != len(tensor):
        return tensor
    rows: Tensor = tensor.reshape(*given.shape[:2], -1)[:, 1:]
    return rows.flatten(0, 1)


def peak_columns(weights: Sequence[Tensor]) -> Tensor:
    """Largest magnitude in each column `(columns,)` of several weights `(rows, columns)`."""
    return torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)


def migration_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's factor of each channel, `peak(x)^alpha / peak(W)^(1 - alpha)`; inputs are divided by it.

    inputs, weights  (channels,) largest magnitudes. A channel that is silent on either side keeps the factor 1.
    """
    floor = 1e-5
    factor = inputs.clamp_min(floor).pow(alpha) / weights.clamp_min(floor).pow(1 - alpha)
    silent = (inputs <= 0) | (weights <= 0)
    return torch.where(silent, torch.ones_like(factor), factor.clamp_min(floor))
