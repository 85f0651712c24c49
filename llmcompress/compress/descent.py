"""Coordinate descent on a linear's output error, over codes and scales in turn; it never rises.

The error of a row is `e M e^T`, with `e` the difference to the weight asked for and `M` the damped Hessian. Each
column's best value, all others held, is where that parabola is lowest, and the nearest code to it is the best code.
The best scale of a group, codes held, is a parabola's lowest point too. Rows do not interact.
"""

import torch
from torch import Tensor

from llmcompress.compress.feedback import BLOCK_COLUMNS, STRIPE, damped_diagonal
from llmcompress.compress.grid import Codes, expand_scale, stored_scale
from llmcompress.kernels import native_columns
from llmcompress.kernels.triton import rounds_columns


def metric_of(hessian: Tensor, damp: float) -> Tensor:
    """The damped Hessian with a diagonal of 1 on average, float32 `(columns, columns)`."""
    metric = hessian.new_empty(hessian.shape, dtype=torch.float32)
    diagonal = damped_diagonal(hessian, damp)
    mean = diagonal.mean()
    for start in range(0, len(hessian), STRIPE):
        part = slice(start, start + STRIPE)
        metric[part] = hessian[part].double() / mean
    metric.diagonal().copy_(diagonal.div_(mean))
    return metric


def descend(weight: Tensor, codes: Codes, metric: Tensor, sweeps: int) -> Codes:
    """Lower the damped proxy loss of `codes` against `weight` by passes over all columns and all groups.

    weight  (rows, columns)     float32
    metric  (columns, columns)  from `metric_of`, the same for all weights that read one input
    """
    found = native_columns.descended(weight, codes, native_columns.Descent(metric, sweeps))
    return descend_plainly(weight, codes, metric, sweeps) if found is None else found


def descend_plainly(weight: Tensor, codes: Codes, metric: Tensor, sweeps: int) -> Codes:
    """`descend` in torch, for any device: what the C library is held against."""
    state = _State(weight, codes, metric)
    for _ in range(sweeps):
        if not state.sweep_codes() + state.sweep_scales():
            break
    return Codes(state.codes.T.contiguous(), state.scale, codes.spec)


class _State:
    """Codes and scales as they stand, transposed; `gradient` is `(Q - W) M`, kept up to date."""

    def __init__(self, weight: Tensor, codes: Codes, metric: Tensor) -> None:
        self.metric, self.spec, self.scale = metric, codes.spec, codes.scale.clone()
        self.codes = codes.codes.T.clone(memory_format=torch.contiguous_format)  # of one row the same memory
        self.half = 1 << (codes.spec.bits - 1)
        self.gradient = metric @ codes.dequantize().sub_(weight).T
        self.diagonal = metric.diagonal().tolist()
        self.fused = rounds_columns(self.gradient)

    def sweep_codes(self) -> int:
        """One pass over the columns; returns how many codes changed."""
        columns, changed = len(self.codes), 0
        steps = expand_scale(self.scale, columns).T.contiguous()
        for start in range(0, columns, BLOCK_COLUMNS):
            stop = min(start + BLOCK_COLUMNS, columns)
            moves = torch.empty_like(self.gradient[start:stop])
            self._settle(steps, moves, start, stop)
            changed += int(torch.count_nonzero(moves))
            self.gradient.addmm_(self.metric[:, start:stop], moves)
        return changed

    def _settle(self, steps: Tensor, moves: Tensor, start: int, stop: int) -> None:
        """Best codes of columns `start` to `stop`, one after the other; `moves` become the changes of their weights."""
        if self.fused:
            from llmcompress.kernels.triton.columns import settle_block  # lazy: triton is an extra

            top = 2 * self.half - 1
            settle_block(self.gradient, self.metric, steps, out=(self.codes, moves), start=start, top=top)
            return
        local = self.gradient[start:stop].clone()
        for column in range(start, stop):
            step, old = steps[column], self.codes[column].float()
            wanted = old - local[column - start] / (self.diagonal[column] * step)
            new = torch.round(wanted).clamp_(0, 2 * self.half - 1)
            move = (new - old) * step
            self.codes[column] = new
            moves[column - start] = move
            local.addr_(self.metric[column, start:stop], move)

    def sweep_scales(self) -> int:
        """One pass over the groups; returns how many scales changed."""
        size, changed = self.spec.group_size, 0
        for group in range(self.scale.shape[1]):
            place = slice(group * size, (group + 1) * size)
            level = self.codes[place].float() - self.half
            curve = ((self.metric[place, place] @ level) * level).sum(0)
            slope = (level * self.gradient[place]).sum(0)
            old = self.scale[:, group]
            new = stored_scale(old.float() - slope / curve.clamp_min(1e-30), self.scale.dtype)
            move = new.float() - old.float()
            better = (2 * slope + move * curve) * move < 0
            move = torch.where(better, move, torch.zeros_like(move))
            changed += int(torch.count_nonzero(move))
            self.scale[:, group] = torch.where(better, new, old)
            self.gradient.addmm_(self.metric[:, place], level * move)
        return changed
