"""RepQuant (arXiv 2402.05628): calibrate activations channel by channel, rewrite so that one scale does the same.

With a scale `s` and a whole zero-point `z` per channel, `r1 = s / mean(s)` and `r2 = z - round(mean(z))`, the norm's
gain becomes `gamma / r1` and its bias `(beta + s r2) / r1`; readers get `W diag(r1)` and `b - W (s r2)`. The function
is unchanged, and the tensor-wise quantizer emits on the new activations the codes that the channel-wise one emits on
the old. A norm without a bias has nowhere to put `r2`: its channels share one zero-point and only `r1` is folded.

Norms feed only half of a block's linears. What `o` and `down` read gets even ranges too, with scales folded into
the rows of `v` and `up` (`rewriting/evening.py`; not in the paper). Static ranges fail on single sequences where tokens
come up that calibration text lacks: what those do (`Subject.unseen`) widens the ranges of channels here and there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmcompress.compress.rewriting.clipping import ActivationQuantizer, find_quantizer
from llmcompress.compress.rewriting.edits import BiasedNorm, add_bias, matrix, read_gain, scale_columns
from llmcompress.compress.rewriting.evening import Evened, Reader, by_rows, even_out
from llmcompress.compress.rewriting.samples import input_samples, unseen_ends
from llmcompress.compress.rewriting.sites import Link, links, norm_sites, rescale
from llmcompress.compress.rewriting.work import Rewritten, Subject, working
from llmcompress.errors import InputError
from llmcompress.options import ReparamOptions

SCOPE = "block"


@dataclass(frozen=True)
class Factors:
    """What turns channel-wise codes into tensor-wise ones.

    ratio  (channels,)  `r1`, positive
    shift  (channels,)  `s r2`, what is added to the activations before they are divided by `r1`
    target              the tensor-wise quantizer
    """

    ratio: Tensor
    shift: Tensor
    target: ActivationQuantizer


def factors(channelwise: ActivationQuantizer) -> Factors:
    """`r1` and `s r2` of a channel-wise quantizer with whole zero-points."""
    target = channelwise.tensorwise()
    return Factors(channelwise.scale / target.scale, channelwise.scale * (channelwise.zero - target.zero), target)


def rewrite_gain(gamma: Tensor, beta: Tensor, found: Factors) -> tuple[Tensor, Tensor]:
    """The norm's new gain and bias, `(channels,)` each."""
    return gamma / found.ratio, (beta + found.shift) / found.ratio


def rewrite_linear(weight: Tensor, found: Factors) -> tuple[Tensor, Tensor]:
    """A reader's new weight `(rows, columns)`, and what is added to its bias `(rows,)`."""
    return weight * found.ratio, -(weight @ found.shift)


def rewrite(subject: Subject, options: ReparamOptions) -> Rewritten:
    """Rewrite every norm of a block that feeds linears; their tensor-wise quantizers are returned by reader.

    All readers of a norm share one quantizer. Scales of weights must be searched after the rewrite.
    """
    block, asked = subject.module, options.repquant
    sites = norm_sites(block, subject.first)
    names = [site.readers[0] for site in sites]
    seen = input_samples(block, subject.calls, names, tokens=options.tokens, skip_first=options.skip_first)
    unseen = unseen_ends(subject, names, tokens=options.tokens)
    linked = _linked(subject, options) if asked.links else ()
    quantizers: dict[str, ActivationQuantizer] = {}
    added = False
    with working(subject) as work:
        for site in sites:
            norm, readers = block.get_submodule(site.norm), [block.get_submodule(name) for name in site.readers]
            whole = _takes_shift(norm) or asked.bias
            weights = torch.cat([matrix(linear) for linear in readers])
            first = site.readers[0]
            inputs = torch.cat([part[first] for part in (seen, unseen) if first in part]).double()
            gram = weights.T @ weights
            channelwise = find_quantizer(
                inputs, asked.bits, symmetric=not whole, clip=asked.clip, gram=gram, steps=asked.steps
            )
            found = factors(channelwise)
            owner = block.get_submodule(site.norm.rpartition(".")[0])
            edit = partial(_fold, owner, site.norm.rpartition(".")[2], readers, found)
            biases = _biases(block)
            if work.attempt(site.norm, [owner, *norm.modules(), *readers], edit):
                quantizers |= dict.fromkeys(site.readers, found.target)
                added = added or _biases(block) != biases
        for link, evened in linked:
            parts = [block.get_submodule(link.source), block.get_submodule(link.target)]
            edit = partial(rescale, block, link, evened.factor)
            if work.attempt(f"{link.source} -> {link.target}", parts, edit):
                quantizers[link.target] = evened.quantizer
    notes = ("norms or linears were given a bias that the model's own class has no place for",) if added else ()
    return work.result(quantizers=quantizers, native=not added, notes=notes)


def _linked(subject: Subject, options: ReparamOptions) -> list[tuple[Link, Evened]]:
    """Every link of a block with its factors."""
    block = subject.module
    with working(subject) as work:
        found = {link.target: link for link in links(block, work.probe)}
    if not found:
        return []
    seen = input_samples(block, subject.calls, list(found), tokens=options.tokens, skip_first=False)
    unseen = unseen_ends(subject, list(found), tokens=options.tokens)
    chosen = []
    for target, link in found.items():
        weight, rows = matrix(block.get_submodule(target)).double(), len(matrix(block.get_submodule(link.source)))
        rounding = partial(subject.rounding, target) if subject.rounding else by_rows
        reader = Reader(link, rows, weight, rounding)
        chosen.append((link, even_out(seen[target], reader, options.repquant.bits, unseen=unseen.get(target))))
    return chosen


def _takes_shift(norm: nn.Module) -> bool:
    try:
        return read_gain(norm).bias is not None
    except InputError:
        return False  # the edit finds the same and says why


def _biases(block: nn.Module) -> int:
    return sum(name.split(".")[-1] == "bias" for name, _ in block.named_parameters())


def _fold(owner: nn.Module, leaf: str, readers: Sequence[nn.Module], found: Factors) -> None:
    norm: nn.Module = owner.get_submodule(leaf)
    gain = read_gain(norm)
    gamma, beta = rewrite_gain(gain.gamma, gain.beta, found)
    gain.set(gamma, beta)
    if gain.bias is None and bool(beta.any()):
        setattr(owner, leaf, BiasedNorm(norm, beta))
    for linear in readers:
        _, shift = rewrite_linear(matrix(linear), found)
        if bool(shift.any()):
            add_bias(linear, shift)
        scale_columns(linear, found.ratio)
