"""Voids skipped per token (L2 adaptive computation, arXiv 2505.14467), as a way to run a model that is evaluated.

A block is a void for a token whose norm it raises by less than `alpha` times the range of what earlier blocks did to
that norm; where there is no range yet, a block that lowers it. Each text is cut in two: a prompt (PP in the paper), and
what follows it, read as if it were the response (RG). Two protocols, which must not be confused:

attribution  the paper's own: every block runs on every token, and what the last norm is given is, token by token, what
             left the last block that is no void. It says where an answer was ready; nothing was skipped for later
             blocks, and later tokens attend to everything
skip         a void is skipped: the block leaves the token's hidden state as it was, so that later blocks and, through
             keys and values made of it, later tokens see what a model that skips would. To know the voids, the block
             is computed all the same: this measures what skipping costs, not what it saves

Position 0 is no void to any block: its norm, that of an attention sink, would make every later block one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmcompress.eval.fidelity import SequenceFidelity, compare
from llmcompress.eval.report import EvalReport, VoidRun, VoidSkipping, summarize
from llmcompress.eval.run import EvalRequest
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import token_batches
from llmcompress.runtime.packed import PackedReader

PROMPT, RESPONSE = "prompt", "response"
SKIPS = ((PROMPT,), (RESPONSE,), (PROMPT, RESPONSE))


@dataclass
class _Rule:
    """Extremes, for each token, of what the blocks so far did to its norm."""

    alpha: float
    lowest: Tensor | None = None
    highest: Tensor | None = None

    def voids(self, entering: Tensor, leaving: Tensor) -> Tensor:
        """For which tokens `(batch, tokens)` a block is a void, from hidden states `(batch, tokens, hidden)`."""
        change = torch.linalg.vector_norm(leaving.double(), dim=-1)
        change = change - torch.linalg.vector_norm(entering.double(), dim=-1)
        if self.lowest is None or self.highest is None:
            found: Tensor = change < 0
            self.lowest = self.highest = change
        else:
            found = change < self.alpha * (self.highest - self.lowest)
            self.lowest, self.highest = torch.minimum(self.lowest, change), torch.maximum(self.highest, change)
        found[:, 0] = False
        return found


@dataclass
class _Run:
    """One way to run the model: hidden states by batch, and what is known of their tokens.

    skips   parts of the text in which voids are skipped
    shown   what the last norm is given, where that is not the hidden state
    active  of each block, how many tokens of the prompt and of the response it was no void for
    """

    hidden: list[Tensor]
    rules: list[_Rule]
    skips: tuple[str, ...] = ()
    shown: list[Tensor] | None = None
    active: dict[str, list[int]] = field(default_factory=lambda: {PROMPT: [], RESPONSE: []})

    def take(self, leaving: Sequence[Tensor], prompt: int) -> None:
        """Go on with what a block made of every batch."""
        counts = {PROMPT: 0, RESPONSE: 0}
        for place, after in enumerate(leaving):
            before = self.hidden[place]
            void = self.rules[place].voids(before, after)
            counts[PROMPT] += int((~void[:, :prompt]).sum())
            counts[RESPONSE] += int((~void[:, prompt:]).sum())
            if self.shown is not None:
                self.shown[place] = torch.where(void[..., None], self.shown[place], after)
            if PROMPT not in self.skips:
                void[:, :prompt] = False
            if RESPONSE not in self.skips:
                void[:, prompt:] = False
            self.hidden[place] = torch.where(void[..., None], before, after)
        for part, count in counts.items():
            self.active[part].append(count)

    def usage(self, part: str, tokens: int) -> tuple[float, ...]:
        """Of each block, the share of a part's tokens it ran for; all of them where nothing is skipped there."""
        followed = self.shown is not None or part in self.skips
        return tuple(count / tokens if followed else 1.0 for count in self.active[part])


@torch.no_grad()
def void_runs(
    candidate: Skeleton, reference: Skeleton, batches: Sequence[Tensor], *, alpha: float, prompt: int
) -> VoidSkipping:
    """Every way to run `candidate`, each compared with `reference` on the prompts and on what follows them.

    batches  token ids, int64 `(batch, tokens)`
    prompt   how many tokens of each text are its prompt: at least 2, and at least 2 left
    """
    stream = BlockStream(candidate)
    entering, calls = stream.start(batches)
    runs = [_Run(list(entering), [_Rule(alpha) for _ in batches], shown=list(entering))]
    runs += [_Run(list(entering), [_Rule(alpha) for _ in batches], skips=skips) for skips in SKIPS]
    candidate.free_rest()
    for index, block in enumerate(candidate.blocks):
        candidate.load_block(index)
        for run in runs:
            pairs = zip(run.hidden, calls, strict=True)
            run.take([stream.run_block(index, hidden, call[index]) for hidden, call in pairs], prompt)
        candidate.free(block)
    candidate.load_exit()
    states = [runs[0].hidden, runs[0].shown or [], *(run.hidden for run in runs[1:])]
    found: list[dict[str, list[SequenceFidelity]]] = [{PROMPT: [], RESPONSE: []} for _ in states]
    for place, expected in enumerate(BlockStream(reference).logits(batches)):
        for one, hidden in zip(found, states, strict=True):
            logits = stream.leave(batches[place], hidden[place])
            one[PROMPT] += compare(expected[:, :prompt], logits[:, :prompt], batches[place][:, :prompt])
            one[RESPONSE] += compare(expected[:, prompt:], logits[:, prompt:], batches[place][:, prompt:])
    candidate.free_rest()
    words = ["whole", "attribution", *("skip " + " and ".join(run.skips) for run in runs[1:])]
    whole = _Run([], [], active=runs[0].active)
    return VoidSkipping(
        alpha=alpha,
        prompt_tokens=prompt,
        runs=tuple(
            _row(*row, batches=batches, prompt=prompt) for row in zip(words, [whole, *runs], found, strict=True)
        ),
    )


def _row(
    word: str, run: _Run, found: dict[str, list[SequenceFidelity]], *, batches: Sequence[Tensor], prompt: int
) -> VoidRun:
    rows = sum(len(batch) for batch in batches)
    before, after = summarize(found[PROMPT]), summarize(found[RESPONSE])
    return VoidRun(
        protocol=word,
        usage_prompt=run.usage(PROMPT, rows * prompt),
        usage_response=run.usage(RESPONSE, rows * (batches[0].shape[1] - prompt)),
        kld_prompt=before.kld,
        kld_response=after.kld,
        dnll_response=after.dnll,
        top1_response=after.top1,
    )


def with_voids(report: EvalReport, request: EvalRequest, alpha: float) -> EvalReport:
    """The report with what skipping voids costs, on the text that was evaluated on; its first half is the prompt."""
    candidate = Skeleton.open(request.model.path, request.device, decode=PackedReader)
    reference = Skeleton.open(request.reference.path, request.device, decode=PackedReader)
    text = replace(request.text, sequence_length=report.data.sequence_length)
    tokens = token_batches(text, request.reference.path).split(request.batch_size)
    prompt = report.data.sequence_length // 2
    return report.model_copy(update={"voids": void_runs(candidate, reference, tokens, alpha=alpha, prompt=prompt)})
