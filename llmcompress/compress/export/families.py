"""Model families as GGUF files have them: names of tensors, and where numbers differ from the checkpoint's.

llama          Llama and Mistral: rows of q and k interleaved, since neighbours are rotated there
qwen2          biases of q, k and v
qwen3          norms of q and k
gemma2, 3      norms keep 1 + weight; norms after attention and MLP; sliding windows in a fixed pattern
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmcompress.compress.export.checkpoint import TO_BF16
from llmcompress.errors import InputError

OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
AROUND = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ATTENTION_BIASES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Family:
    """How GGUF has the models of one `model_type`.

    inside       modules of a block, and what their tensors are called
    biased       those that may have a bias
    interleaved  whether rows of q and k are in another order
    offset       what norms have more than in the checkpoint
    windows      every how many blocks one has no sliding window; 0 where all have none
    """

    architecture: str
    inside: Mapping[str, str]
    activation: str = "silu"
    biased: tuple[str, ...] = ()
    interleaved: bool = False
    offset: float = 0.0
    windows: int = 0
    outside: Mapping[str, str] = field(default_factory=lambda: OUTSIDE)

    def name_of(self, parameter: str) -> str:
        """A parameter's name in the file. Raises InputError where there is none."""
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", parameter)
        if parameter in self.outside:
            return self.outside[parameter]
        if found is None or found[2] not in self.inside or (found[3] == "bias" and found[2] not in self.biased):
            raise InputError(f"{parameter}: {self.architecture} in GGUF has no place for it", TO_BF16)
        return f"blk.{found[1]}.{self.inside[found[2]]}.{found[3]}"

    def heads_of(self, config: Any, parameter: str) -> int | None:
        """Heads whose rows are in another order, None for other tensors."""
        if not self.interleaved:
            return None
        if parameter.endswith("self_attn.q_proj.weight"):
            return int(config.num_attention_heads)
        return int(config.num_key_value_heads) if parameter.endswith("self_attn.k_proj.weight") else None

    def offset_of(self, parameter: str) -> float:
        """What a tensor has more in the file than in the checkpoint."""
        return self.offset if parameter.endswith("norm.weight") else 0.0


WITHOUT_HEAD = {name: word for name, word in OUTSIDE.items() if not name.startswith("lm_head")}
LLAMA = Family("llama", LINEARS | NORMS, interleaved=True)
GEMMA2 = Family("gemma2", LINEARS | AROUND, "gelu_pytorch_tanh", offset=1.0, windows=2, outside=WITHOUT_HEAD)
GEMMA3 = Family("gemma3", LINEARS | AROUND | HEAD_NORMS, "gelu_pytorch_tanh", offset=1.0, windows=6)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Family("qwen2", LINEARS | NORMS, biased=ATTENTION_BIASES),
    "qwen3": Family("qwen3", LINEARS | NORMS | HEAD_NORMS),
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
}


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows with the two halves of each head taken in turn: 0, n / 2, 1, n / 2 + 1, ..."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def apart(rows: Tensor, heads: int) -> Tensor:
    """Inverse of `interleaved`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def family_of(config: Any) -> Family:
    """The family of a model. Raises InputError for one that GGUF, or this, does not hold, with the reason."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(f"a {config.model_type} model: only {', '.join(FAMILIES)} are exported to GGUF", TO_BF16)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != family.activation:
        raise InputError(f"{activation} between the linears of the MLP: GGUF has {family.activation}", TO_BF16)
    if family.windows:
        _check_gemma(config, family)
    elif getattr(config, "sliding_window", None):
        raise InputError(f"sliding windows, which {family.architecture} in GGUF does not have", TO_BF16)
    for rope in ropes_of(config).values():
        if rope.get("rope_type", "default") != "default":
            raise InputError(f"rotary embeddings of type {rope['rope_type']!r} are not exported to GGUF", TO_BF16)
    return family


def _check_gemma(config: Any, family: Family) -> None:
    """What llama.cpp takes for granted of these models."""
    if config.query_pre_attn_scalar != config.head_dim:
        raise InputError("query_pre_attn_scalar: llama.cpp scales by the size of a head", TO_BF16)
    full = [place for place, kind in enumerate(config.layer_types) if kind == "full_attention"]
    if full != list(range(family.windows - 1, len(config.layer_types), family.windows)):
        raise InputError(f"layer_types: llama.cpp has one block in {family.windows} without a window", TO_BF16)


def ropes_of(config: Any) -> dict[str, dict[str, Any]]:
    """Rotary embeddings by the kind of attention; under `full_attention` alone where there is one for all."""
    found = config.rope_parameters or {}
    return dict(found) if "full_attention" in found else {"full_attention": found}
