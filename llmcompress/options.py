"""What scorers, reparameterizations and quantizers may be told: one part per method, named after its file.

A recipe sets those of scorers as `score.lim.mode: flat` or on the command line as `--set score.lim.mode=flat`. Every
option is read by the method of that name; an unknown one is refused.
"""

from typing import Literal

from pydantic import Field

from llmcompress.spec import INPUTS, InputSpec, InputsWord, Noun


class LimOptions(Noun):
    """`mode`: one cosine per token, then the mean; or one per sequence, tokens and features flattened."""

    mode: Literal["token", "flat"] = "token"
    skip_first: bool = True


class ZdOptions(Noun):
    """`sides`: count `z > 1`, or `|z| > 1`."""

    sides: Literal["one", "two"] = "one"


class RdpOptions(Noun):
    """`points`: mean over tokens, the last token, or token by token; `space`: what distances are taken in.

    `counts` are the numbers of breakpoints that vote, `beta` the share of the vote in the hybrid score,
    `keep` the number of breakpoints selected (a third of the blocks where not given).
    """

    space: Literal["raw", "unit", "rms", "drop_top_dims"] = "unit"
    points: Literal["mean", "last", "token"] = "mean"
    score: Literal["hybrid", "vote", "velocity"] = "hybrid"
    beta: float = Field(default=0.5, ge=0, le=1)
    counts: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    keep: int | None = Field(default=None, ge=1)
    skip_first: bool = True


class BlockInfluenceOptions(Noun):
    """`distance`: `1 - cos` (ShortGPT) or `arccos(cos) / pi`; `tokens`: all, or the last of each sequence."""

    distance: Literal["cosine", "angular"] = "cosine"
    tokens: Literal["all", "last"] = "all"


class VoidsOptions(Noun):
    """`alpha` scales the range a change of norm must reach; `phase` is the usage taken as importance.

    The generation phase is seen on `prompts` prompts of `prompt_tokens` tokens, continued by `new_tokens`
    tokens that the model itself prefers; 0 leaves it out.
    """

    alpha: float = Field(default=0.8, ge=0)
    skip_first: bool = True
    from_embedding: bool = True
    phase: Literal["prompt", "generation"] = "prompt"
    prompts: int = Field(default=8, ge=1)
    prompt_tokens: int = Field(default=16, ge=2)
    new_tokens: int = Field(default=8, ge=0)


class DepthOptions(Noun):
    """`effect` of skipping a block: on the output, on later blocks, or on later blocks at later positions."""

    effect: Literal["output", "current", "future"] = "output"
    statistic: Literal["mean", "max"] = "mean"
    samples: int = Field(default=4, ge=1)
    tokens: int = Field(default=64, ge=4)


class HtsrOptions(Noun):
    """`metric` of a weight's spectrum, where its tail begins, and whether a block's linears share one value."""

    metric: Literal["alpha", "alpha_hat", "erg"] = "alpha"
    tail: Literal["ks", "mid", "peak"] = "ks"
    pool: Literal["linear", "block"] = "linear"


class KurtosisOptions(Noun):
    """Excess kurtosis `of` what each linear reads, or of its weights along the input axis."""

    of: Literal["inputs", "weights"] = "inputs"


class ArankOptions(Noun):
    """`rank` of attention maps: the entropy of their singular values, or the exact rank."""

    rank: Literal["effective", "exact"] = "effective"
    samples: int = Field(default=4, ge=1)
    tokens: int = Field(default=64, ge=4)


class FisherOptions(Noun):
    """How gradients and output changes are combined, and whose labels the gradients are for.

    `reduce`: `sum` of squares over outputs, `dot` product per token, or `sequence`: one dot product over all
    tokens. `labels`: drawn from the `model` (true Fisher) or the `data` (empirical). `draws` of labels.
    """

    reduce: Literal["sum", "dot", "sequence"] = "sum"
    labels: Literal["model", "data"] = "model"
    draws: int = Field(default=1, ge=1)


class SwapOptions(Noun):
    """Measured scores (`kl`, `working_point`, `noise`, `adaquant_delta`) and exchange: how much text, around what.

    `base_bits` is the uniform width swaps are made around (the one nearest to the budget where not given, or
    the middle of the candidates where there is no budget). `noise` is the relative size of injected noise,
    `proposals` the exchanges measured per round, `memory_mb` what hidden states of swaps may take.
    `interactions` of the quadratic program come from error vectors in the logits, or from every pair measured.
    """

    samples: int = Field(default=16, ge=2)
    tokens: int = Field(default=256, ge=8)
    base_bits: int | None = Field(default=None, ge=2, le=8)
    noise: float = Field(default=0.1, gt=0, le=1)
    proposals: int = Field(default=32, ge=1)
    interactions: Literal["gram", "pairs"] = "gram"
    memory_mb: int = Field(default=2048, ge=1)


class ScorerOptions(Noun):
    """The options of every scorer; each reads its own part."""

    lim: LimOptions = LimOptions()
    zd: ZdOptions = ZdOptions()
    rdp: RdpOptions = RdpOptions()
    block_influence: BlockInfluenceOptions = BlockInfluenceOptions()
    voids: VoidsOptions = VoidsOptions()
    depth: DepthOptions = DepthOptions()
    htsr: HtsrOptions = HtsrOptions()
    kurtosis: KurtosisOptions = KurtosisOptions()
    arank: ArankOptions = ArankOptions()
    fisher: FisherOptions = FisherOptions()
    swaps: SwapOptions = SwapOptions()


class RepquantOptions(Noun):
    """`bits` of the activations; `clip` their ranges not at all, by the best pair of a grid, or by `steps` of learning.

    `bias` lets a norm without one be given one, so that zero-points may differ between channels; the file then needs
    a norm its architecture does not have. Without it such norms are rewritten by scale only. `links` evens out
    what `o` and `down` read too, by the rows of `v` and `up`. `unseen`: ranges also hold what tokens cause that the
    calibration text lacks, as far as the model shows it for each of them once, among others.
    """

    bits: int = Field(default=8, ge=2, le=8)
    clip: Literal["none", "grid", "learn"] = "none"
    steps: int = Field(default=200, ge=1)
    bias: bool = False
    links: bool = True
    unseen: bool = True


class SmoothOptions(Noun):
    """`alpha`: how much of the inputs' range moves into the weights."""

    alpha: float = Field(default=0.5, ge=0, le=1)


class AwqOptions(Noun):
    """`ratios` tried per site; `duo` divides by the weights' own magnitudes too; `links`: v -> o and up -> down too.

    `bits` and `group_size` are the format assumed while searching; where not given, the middle one of the recipe's
    widths and its group size. `clip` also searches limits for the weights, on `clip_tokens` tokens.
    """

    ratios: int = Field(default=20, ge=2)
    duo: bool = False
    links: bool = True
    bits: int | None = Field(default=None, ge=2, le=8)
    group_size: int | None = Field(default=None, ge=1)
    clip: bool = False
    clip_tokens: int = Field(default=512, ge=1)

    @property
    def assumed(self) -> tuple[int, int]:
        """Width and group size of the assumed format."""
        return self.bits or 4, self.group_size or 128


class EqualizeOptions(Noun):
    """What is balanced against the target's columns: the source's rows, or the activations between them."""

    by: Literal["weights", "activations"] = "weights"


class RmsnormOptions(Noun):
    """`keep` LayerNorms, without a gain, which the model's own class holds, or `replace` them by RMSNorms."""

    norms: Literal["replace", "keep"] = "keep"


class RotateOptions(Noun):
    """`base`: a random rotation, or none, to learn from where the model is; `heads` rotates values inside heads too.

    `learn` turns the rotations to lower the loss of the model with activations of `bits` bits, in `steps` steps on the
    Stiefel manifold, each at most `rate` long.
    """

    base: Literal["hadamard", "orthogonal", "identity"] = "hadamard"
    heads: bool = True
    learn: bool = False
    bits: int = Field(default=4, ge=2, le=8)
    steps: int = Field(default=100, ge=1)
    rate: float = Field(default=1.0, gt=0)
    seed: int = 0


class ReparamOptions(Noun):
    """The options of every reparameterization. Ranges are taken from `tokens` tokens.

    `skip_first` leaves out the first token of every sequence, where many models keep enormous values.
    """

    tokens: int = Field(default=8192, ge=2)
    skip_first: bool = True
    repquant: RepquantOptions = RepquantOptions()
    smooth: SmoothOptions = SmoothOptions()
    awq: AwqOptions = AwqOptions()
    equalize: EqualizeOptions = EqualizeOptions()
    rmsnorm: RmsnormOptions = RmsnormOptions()
    rotate: RotateOptions = RotateOptions()


class RewriteOptions(ReparamOptions):
    """Rewrites that keep the model's function, done before it is scored: `methods` by name, in order."""

    methods: tuple[str, ...] = ()


class QuantizerOptions(Noun):
    """What a quantizer may be told; each ignores what it has no use for.

    `target` is what a linear's output is brought close to: its own full-precision output on the same input
    (`layer`), the full-precision model's output there (`asymmetric`), the same with the error already present in
    what the output is added to (`residual`), or GPTAQ's approximation of the second (`gptaq`). `alpha` is how much
    of the difference is corrected; where not given, as much as the number of calibration tokens supports.
    `iterations` and `rate` are those of methods that learn; the rate is the method's own where not given.
    `true_sequential`: inputs of a linear are seen with the linears before it in its block already quantized.
    `inputs`: what the linears of the blocks read is rounded too, to integers or float8; with one scale from calibration
    (and for plain `int8` and `int4` a zero-point), or `-token`, a scale for each token. 8-bit weights then have one
    scale per row. `input_clip`: ranges from calibration reach to the extremes, or to the least squared error of a grid.
    `kv_cache`: keys and values are rounded as a cache would keep them, under one scale each per block.
    `correction_rank`: beside its codes each linear keeps two 16-bit factors of this rank, whose product is added to its
    weight: the best approximation of the rounding error on what the linear reads. Only our own layout holds them.
    `softmax`: attention weights become codes of `softmax_bits` bits that count half octaves (`log2`).
    `online_hadamard`: what the last linear of each block (`down`) reads is mixed by a Hadamard matrix while the model
    runs, before it is rounded (R4 of QuaRot), and the stored weight with it. Only our own layout holds that.
    `output_feedback`: experimental, of methods that round like GPTQ: so many rows of a weight at a time, what is left
    over after rounding is pushed onto the rows still unrounded as well (output-side feedback; none where 0).
    """

    damp: float = Field(default=0.01, gt=0, le=1)
    order: Literal["act", "group", "plain"] = "act"
    clip: bool = True
    target: Literal["layer", "gptaq", "asymmetric", "residual"] = "residual"
    alpha: float | None = Field(default=None, ge=0, le=1)
    true_sequential: bool = True
    sweeps: int = Field(default=0, ge=0)
    pull: float = Field(default=0.0, ge=0, lt=1)
    iterations: int = Field(default=200, ge=1)
    rate: float | None = Field(default=None, gt=0)
    double: bool = True  # nf4 and fp4: scales in 8 bits
    high_share: float = Field(default=0.0625, gt=0, lt=1)  # twotier: of the columns, with two bits more
    inputs: InputsWord = "none"
    input_clip: Literal["none", "grid"] = "grid"
    correction_rank: int = Field(default=0, ge=0)
    kv_cache: Literal["none", "int8", "fp8"] = "none"
    softmax: Literal["none", "log2"] = "none"
    softmax_bits: int = Field(default=4, ge=2, le=8)
    output_feedback: int = Field(default=0, ge=0)
    online_hadamard: bool = False

    @property
    def input_spec(self) -> InputSpec | None:
        """The format of the inputs."""
        return INPUTS.get(self.inputs)

    @property
    def cache_spec(self) -> InputSpec | None:
        """The format of keys and values."""
        return INPUTS.get("int8-symmetric" if self.kv_cache == "int8" else self.kv_cache)

    @property
    def rounds_attention(self) -> bool:
        """Whether anything inside attention is rounded."""
        return self.kv_cache != "none" or self.softmax != "none"
