"""The nouns of a traced model: its linears and what one forward showed of them. No tensor enters one."""

from llmcompress.spec import Noun


class LinearInfo(Noun):
    """One linear `(rows = outputs, columns = inputs)` and where its weight is kept.

    `transposed` marks GPT-2's Conv1D, stored `(columns, rows)`. Linears of one `unit` are fused by serving runtimes and
    must share a format; `shared_input` numbers the tensor the linear reads. `expert` is the number of the expert it
    belongs to, whose inputs are the tokens routed there.
    """

    name: str
    tensor: str
    rows: int
    columns: int
    transposed: bool = False
    unit: str
    shared_input: int
    expert: int | None = None

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def stem(self) -> str:
        """What the names of its tensors begin with in a packed file."""
        return self.tensor.removesuffix(".weight")


class NormFeed(Noun):
    """The norm module whose output is the input of one shared-input group."""

    shared_input: int
    norm: str


class StreamWriter(Noun):
    """A linear whose output is added to a stream of the block: what enters the block, or what `norm` reads.

    `after` are linears whose outputs were added to that stream before, where several write side by side.
    """

    linear: str
    norm: str = ""
    after: tuple[str, ...] = ()


class ChildEnd(Noun):
    """A child of a block (attention, MLP) that returns the output of a linear inside it as it is.

    `beside` is how many Nones it returns after that in a tuple; 0 is a bare tensor.
    """

    child: str
    linear: str
    beside: int = 0


class BlockTrace(Noun):
    """What one forward of a block showed: its linears in call order, the norms that feed them, what they write to.

    `routers`, tensors of the file, decide which experts a token goes to: they are never quantized.
    """

    index: int
    name: str
    linears: tuple[LinearInfo, ...]
    norms: tuple[NormFeed, ...]
    writers: tuple[StreamWriter, ...] = ()
    ends: tuple[ChildEnd, ...] = ()
    routers: tuple[str, ...] = ()


class ModelTrace(Noun):
    """The traced model: its blocks, the head where it is a linear of its own, and the size of everything else.

    `head` is the linear outside the blocks that makes the logits. One tied to the input embedding has no weight
    of its own: it is None, and stays at the source precision.
    """

    model_type: str
    blocks: tuple[BlockTrace, ...]
    head: LinearInfo | None = None
    parameters: int
    other_bytes: int  # tensors in the checkpoint that belong to no linear of the blocks
    untraced_share: float  # of the weights inside the blocks but routers: experts that the file keeps fused

    @property
    def untraced(self) -> str:
        """What is said of weights that no format is planned for; empty where there are none."""
        if self.untraced_share <= 0.001:
            return ""
        share = f"{self.untraced_share:.0%} of the block weights"
        why = "they are not in linears of their own (experts that the file keeps in one tensor, convolutions)"
        return f"left at the source precision, {share}: {why}"

    @property
    def routers(self) -> tuple[str, ...]:
        """What the names of routers' weights in the file begin with."""
        return tuple(name.removesuffix(".weight") for block in self.blocks for name in block.routers)

    @property
    def linears(self) -> tuple[LinearInfo, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)

    @property
    def every(self) -> tuple[LinearInfo, ...]:
        """The linears of the blocks and the head."""
        return self.linears if self.head is None else (*self.linears, self.head)
