"""Which tensors the checkpoints of well-known families have, and of what shape, as far as config.json tells.

A table, because the classes that know it take seconds to import; tests compare it with them. Families that are not in
it, and whatever config.json leaves to the class, wait for the skeleton to be built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Config = Mapping[str, Any]
Shapes = dict[str, tuple[str, ...]]  # tensor -> the words of `sizes` that its shape is made of
Sizes = Mapping[str, int | None]  # word -> size, None where config.json does not tell


@dataclass(frozen=True)
class Layout:
    """The tensors of one family. Names are relative: to a block, or to `bases`, what names begin with or leave out.

    Of a group of `may`, in blocks or outside, all are there in all blocks, or none: biases, gains, projections.
    """

    bases: tuple[str, ...]
    blocks: str
    sizes: Callable[[Config], Sizes]
    block: Shapes
    outside: Shapes
    block_may: tuple[Shapes, ...] = ()
    outside_may: tuple[Shapes, ...] = ()
    experts: Shapes = field(default_factory=dict)  # of every expert of a block, with `{}` for its number
    expert_count: tuple[str, ...] = ()  # keys of config.json
    heads: tuple[str, ...] = ("lm_head.weight",)  # names of the head, one of which is there unless it is tied
    head: tuple[str, ...] = ("vocabulary", "width")
    tied: bool = False  # where config.json does not say
    activation: str = "hidden_act"  # the key of its activation; empty where the class has its own


def whole(config: Config, *keys: str) -> int | None:
    """The one whole number that all of these keys which are there have."""
    found = {config[key] if type(config[key]) is int else None for key in keys if key in config}
    return found.pop() if len(found) == 1 else None


def _product(*factors: int | None) -> int | None:
    total = 1
    for factor in factors:
        if factor is None:
            return None
        total *= factor
    return total


def _common(config: Config) -> dict[str, int | None]:
    return {
        "one": 1,
        "vocabulary": whole(config, "vocab_size"),
        "width": whole(config, "hidden_size", "n_embd", "n_embed"),
        "inner": whole(config, "intermediate_size"),
    }


def _split(config: Config, *, own_head: bool = False) -> Sizes:
    """Sizes of families with apart queries, keys and values; with `own_head` the size of a head has its own default."""
    sizes = _common(config)
    heads, width = whole(config, "num_attention_heads"), sizes["width"]
    head = whole(config, "head_dim")
    if config.get("head_dim") is None and heads and width is not None and not own_head:
        head = width // heads
    pairs = heads if config.get("num_key_value_heads", 0) is None else whole(config, "num_key_value_heads")
    queries, keys = _product(heads, head), _product(pairs, head)
    return sizes | {
        "head": head,
        "queries": queries,
        "keys": keys,
        "even keys": _product(pairs, width // heads) if heads and width is not None else None,
        "fused": None if queries is None or keys is None else queries + 2 * keys,
        "gate and up": _product(2, sizes["inner"]),
        "experts": whole(config, "num_experts", "num_local_experts"),
        "expert": whole(config, "moe_intermediate_size"),
        "shared": whole(config, "shared_expert_intermediate_size"),
    }


def _split_own_head(config: Config) -> Sizes:
    return _split(config, own_head=True)


def _fused(config: Config) -> Sizes:
    """Sizes of families with queries, keys and values of equal width in one matrix."""
    sizes = _common(config)
    width = sizes["width"]
    inner = whole(config, "n_inner") if config.get("n_inner") is not None else _product(4, width)
    positions = whole(config, "n_positions", "max_position_embeddings")
    return sizes | {"fused": _product(3, width), "n_inner": inner, "four": _product(4, width), "positions": positions}


def _opt(config: Config) -> Sizes:
    sizes, positions = _common(config), whole(config, "max_position_embeddings")
    outer = "word_embed_proj_dim"
    embedding = whole(config, outer) if config.get(outer) is not None else sizes["width"]
    return sizes | {
        "inner": whole(config, "ffn_dim"),
        "embedding": embedding,
        "positions": None if positions is None else positions + 2,
    }


def _both(shapes: Shapes) -> Shapes:
    """With a bias for every weight, as large as its first dimension."""
    return shapes | _biases(shapes)


def _biases(shapes: Shapes) -> Shapes:
    return {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}


def _norms(*names: str, size: str = "width") -> Shapes:
    return {f"{name}.weight": (size,) for name in names}


QKV: Shapes = {
    "self_attn.q_proj.weight": ("queries", "width"),
    "self_attn.k_proj.weight": ("keys", "width"),
    "self_attn.v_proj.weight": ("keys", "width"),
}
ATTENTION: Shapes = {**QKV, "self_attn.o_proj.weight": ("width", "queries")}


def _gated(stem: str, inner: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    gate, up, down = (f"{stem}{name}.weight" for name in names)
    return {gate: (inner, "width"), up: (inner, "width"), down: ("width", inner)}


MLP = _gated("mlp.", "inner")
BEFORE = _norms("input_layernorm", "post_attention_layernorm")
AROUND = BEFORE | _norms("pre_feedforward_layernorm", "post_feedforward_layernorm")
HEAD_NORMS = _norms("self_attn.q_norm", "self_attn.k_norm", size="head")
ROUTER: Shapes = {"mlp.gate.weight": ("experts", "width")}
OUTSIDE: Shapes = {"embed_tokens.weight": ("vocabulary", "width"), "norm.weight": ("width",)}


def _llama(
    *shapes: Shapes, own_head: bool = False, may: tuple[Shapes, ...] = (), outside: Shapes = OUTSIDE, **more: Any
) -> Layout:
    """A relative of Llama: apart from what its blocks hold, and sizes of heads, all is named alike."""
    block = {name: shape for part in shapes for name, shape in part.items()}
    sizes = _split_own_head if own_head else _split
    return Layout(("model.",), "layers", sizes, block, outside, block_may=may, **more)


BIASES = _biases(ATTENTION)
NEOX: Shapes = {"attention.query_key_value.weight": ("fused", "width"), "attention.dense.weight": ("width", "width")}
OPT: Shapes = {
    "self_attn.q_proj.weight": ("width", "width"),
    "self_attn.k_proj.weight": ("width", "width"),
    "self_attn.v_proj.weight": ("width", "width"),
    "self_attn.out_proj.weight": ("width", "width"),
    "fc1.weight": ("inner", "width"),
    "fc2.weight": ("width", "inner"),
}
GPT2: Shapes = {  # its matrices are stored transposed
    "attn.c_attn.weight": ("width", "fused"),
    "attn.c_attn.bias": ("fused",),
    "attn.c_proj.weight": ("width", "width"),
    "attn.c_proj.bias": ("width",),
    "mlp.c_fc.weight": ("width", "n_inner"),
    "mlp.c_fc.bias": ("n_inner",),
    "mlp.c_proj.weight": ("n_inner", "width"),
    "mlp.c_proj.bias": ("width",),
}


def _up_and_down(inner: str) -> Shapes:
    return _both({"mlp.dense_h_to_4h.weight": (inner, "width"), "mlp.dense_4h_to_h.weight": ("width", inner)})


LAYOUTS: Mapping[str, Layout] = {
    "llama": _llama(ATTENTION, MLP, BEFORE, may=(BIASES, _biases(MLP))),
    "mistral": _llama(ATTENTION, MLP, BEFORE),
    "qwen2": _llama(ATTENTION, _biases(QKV), MLP, BEFORE),
    "qwen3": _llama(ATTENTION, HEAD_NORMS, MLP, BEFORE, own_head=True, may=(BIASES,)),
    "gemma": _llama(ATTENTION, MLP, BEFORE, own_head=True, may=(BIASES,), tied=True),
    "gemma2": _llama(ATTENTION, MLP, AROUND, own_head=True, may=(BIASES,), tied=True, activation="hidden_activation"),
    "gemma3_text": _llama(
        ATTENTION, HEAD_NORMS, MLP, AROUND, own_head=True, may=(BIASES,), tied=True, activation="hidden_activation"
    ),
    "phi3": _llama(
        {"self_attn.qkv_proj.weight": ("fused", "width"), "self_attn.o_proj.weight": ("width", "queries")},
        {"mlp.gate_up_proj.weight": ("gate and up", "width"), "mlp.down_proj.weight": ("width", "inner")},
        BEFORE,
    ),
    "mixtral": _llama(
        ATTENTION,
        {"block_sparse_moe.gate.weight": ("experts", "width")},
        BEFORE,
        experts=_gated("block_sparse_moe.experts.{}.", "inner", ("w1", "w3", "w2")),
        expert_count=("num_local_experts", "num_experts"),
    ),
    "qwen2_moe": _llama(
        ATTENTION,
        ROUTER,
        _gated("mlp.shared_expert.", "shared"),
        {"mlp.shared_expert_gate.weight": ("one", "width")},
        BEFORE,
        may=(_biases(QKV),),
        experts=_gated("mlp.experts.{}.", "expert"),
        expert_count=("num_experts",),
    ),
    "qwen3_moe": _llama(
        ATTENTION,
        HEAD_NORMS,
        ROUTER,
        BEFORE,
        may=(BIASES,),
        experts=_gated("mlp.experts.{}.", "expert"),
        expert_count=("num_experts", "num_local_experts"),
    ),
    "olmoe": _llama(
        ATTENTION,
        {"self_attn.q_norm.weight": ("width",), "self_attn.k_norm.weight": ("even keys",)},
        ROUTER,
        BEFORE,
        may=(BIASES,),
        experts=_gated("mlp.experts.{}.", "inner"),
        expert_count=("num_experts", "num_local_experts"),
    ),
    "gpt2": Layout(
        ("transformer.",),
        "h",
        _fused,
        {**GPT2, **_both(_norms("ln_1", "ln_2"))},
        {"wte.weight": ("vocabulary", "width"), "wpe.weight": ("positions", "width"), **_both(_norms("ln_f"))},
        tied=True,
        activation="activation_function",
    ),
    "opt": Layout(
        ("model.decoder.", "decoder."),
        "layers",
        _opt,
        OPT,
        {"embed_tokens.weight": ("vocabulary", "embedding"), "embed_positions.weight": ("positions", "width")},
        block_may=(_biases(OPT), _both(_norms("self_attn_layer_norm", "final_layer_norm"))),
        outside_may=(
            _both(_norms("final_layer_norm")),
            {"project_in.weight": ("width", "embedding"), "project_out.weight": ("embedding", "width")},
        ),
        head=("vocabulary", "embedding"),
        tied=True,
        activation="activation_function",
    ),
    "gpt_neox": Layout(
        ("gpt_neox.",),
        "layers",
        _fused,
        {**NEOX, **_up_and_down("inner"), **_both(BEFORE)},
        {"embed_in.weight": ("vocabulary", "width"), **_both(_norms("final_layer_norm"))},
        block_may=(_biases(NEOX),),
        heads=("embed_out.weight", "lm_head.weight"),
    ),
    "bloom": Layout(
        ("transformer.",),
        "h",
        _fused,
        {
            "self_attention.query_key_value.weight": ("fused", "width"),
            "self_attention.query_key_value.bias": ("fused",),
            **_both({"self_attention.dense.weight": ("width", "width")}),
            **_up_and_down("four"),
            **_both(BEFORE),
        },
        {
            "word_embeddings.weight": ("vocabulary", "width"),
            **_both(_norms("word_embeddings_layernorm", "ln_f")),
        },
        tied=True,
        activation="",
    ),
}
