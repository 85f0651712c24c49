"""SmoothQuant (arXiv 2211.10438): move the range of activations into the weights that read them, through the norm.

The gain of each channel is divided by `s = max|x|^alpha / max|W|^(1 - alpha)`, the column of every reader multiplied.
"""

from functools import partial

from llmcompress.compress.rewriting.edits import divide_gain, matrix
from llmcompress.compress.rewriting.samples import input_samples, migration_scale, peak_columns
from llmcompress.compress.rewriting.sites import norm_sites
from llmcompress.compress.rewriting.work import Rewritten, Subject, working
from llmcompress.options import ReparamOptions

SCOPE = "block"


def rewrite(subject: Subject, options: ReparamOptions) -> Rewritten:
    """Smooth every norm of a block that feeds linears."""
    block = subject.module
    sites = norm_sites(block, subject.first)
    names = [site.readers[0] for site in sites]
    seen = input_samples(block, subject.calls, names, tokens=options.tokens, skip_first=options.skip_first)
    with working(subject) as work:
        for site in sites:
            norm, readers = block.get_submodule(site.norm), [block.get_submodule(name) for name in site.readers]
            peaks = seen[site.readers[0]].double().abs().amax(0)
            factor = migration_scale(peaks, peak_columns([matrix(linear) for linear in readers]), options.smooth.alpha)
            work.attempt(site.norm, [*norm.modules(), *readers], partial(divide_gain, norm, readers, factor))
    return work.result()
