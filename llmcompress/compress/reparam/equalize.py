"""Channel equalization: balance the rows of a linear against the columns of the one that follows (v -> o, up -> down).

Each linked row is divided, and its columns multiplied, by the square root of the ratio of their ranges, so that both
get the geometric mean (cross-layer equalization, arXiv 1906.04721). Under grouped heads all columns that follow one row
share its factor.
"""

from functools import partial

import torch
from torch import Tensor, nn

from llmcompress.compress.rewriting.edits import bias_of, matrix
from llmcompress.compress.rewriting.samples import input_samples
from llmcompress.compress.rewriting.sites import Link, links, rescale
from llmcompress.compress.rewriting.work import Rewritten, Subject, working
from llmcompress.options import ReparamOptions

SCOPE = "block"


def rewrite(subject: Subject, options: ReparamOptions) -> Rewritten:
    """Equalize every pair of linears of a block that can be."""
    block = subject.module
    with working(subject) as work:
        found = links(block, work.probe)
    targets = list(dict.fromkeys(link.target for link in found))
    seen = {}
    if options.equalize.by == "activations" and targets:
        seen = input_samples(block, subject.calls, targets, tokens=options.tokens, skip_first=options.skip_first)
    with working(subject) as work:
        for link in found:
            source, target = block.get_submodule(link.source), block.get_submodule(link.target)
            factor = row_factor(source, target, link, seen.get(link.target))
            edit = partial(rescale, block, link, factor)
            work.attempt(f"{link.source} -> {link.target}", [source, target], edit)
        if not found:
            work.leave("block", "no linear's rows reach another's columns in proportion")
    return work.result()


def row_factor(source: nn.Module, target: nn.Module, link: Link, inputs: Tensor | None) -> Tensor:
    """What each row of the source is divided by, `(rows,)`; 1 for rows that are not linked.

    inputs  (tokens, columns of the target), or None to take the range of a row from its weights and bias
    """
    weight, bias = matrix(source), bias_of(source)
    rows = len(weight)
    if inputs is None:
        own = weight.abs().amax(1)
        own = own if bias is None else torch.maximum(own, bias.abs())
    else:
        own = link.reduce(inputs.double().abs().amax(0), rows)
    other = link.reduce(matrix(target).abs().amax(0), rows)
    usable = (own > 0) & (other > 0)
    return torch.where(usable, (own / other.clamp_min(1e-300)).sqrt(), torch.ones_like(own))
