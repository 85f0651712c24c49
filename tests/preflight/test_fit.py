"""What headers alone tell agrees with the classes of transformers: nothing they write is refused, all damage is."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attacks
import pytest
import transformers
from accelerate import init_empty_weights
from experts_help import FAMILIES as MIXTURES
from experts_help import SIZES
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers.activations import ACT2FN
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from llmcompress.preflight import check_source, installed
from llmcompress.preflight.fit import check_fit
from llmcompress.preflight.header import TensorEntry
from llmcompress.preflight.installed import known_activations, known_rotations, known_types
from llmcompress.preflight.layouts import LAYOUTS

ROOT = Path(transformers.__file__).parent
SHARD = Path("model.safetensors")
# every size another number, so that no two dimensions agree by chance
PLAIN = {
    "vocab_size": 96, "hidden_size": 60, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 60},
    "phi3": {"original_max_position_embeddings": 40},
    "gpt2": {"n_embd": 60, "n_layer": 3, "n_head": 6, "n_positions": 40},
    "bloom": {"n_layer": 3, "n_head": 6},
}
MORE |= {name: SIZES | more | {"hidden_size": 60, "num_attention_heads": 6} for name, (_, more) in MIXTURES.items()}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "opt": [
        {"word_embed_proj_dim": 20},
        {"do_layer_norm_before": False},
        {"word_embed_proj_dim": 20, "do_layer_norm_before": False, "tie_word_embeddings": False},
    ],
    "gpt2": [{"n_inner": 44}, {"add_cross_attention": True}],
    "qwen3_moe": [{}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}],
    "qwen2_moe": [{"qkv_bias": False}, {"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}],
}
READ = {
    "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "intermediate_size", "n_inner", "ffn_dim", "word_embed_proj_dim", "num_experts", "num_local_experts",
    "moe_intermediate_size", "shared_expert_intermediate_size", "max_position_embeddings", "n_positions",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "qkv_bias", "enable_bias",
}  # fmt: skip
EVERYWHERE: list[dict[str, Any]] = [{}, {"head_dim": 14}, {"num_key_value_heads": 6}, {"num_hidden_layers": 1}]


def described(kind: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of a family, with all keys that its class would write."""
    known = transformers.AutoConfig.for_model(kind).to_dict()
    asked = {key: value for key, value in PLAIN.items() if key in known} | MORE.get(kind, {}) | changes
    found: dict[str, Any] = json.loads(transformers.AutoConfig.for_model(kind, **asked).to_json_string(use_diff=False))
    return found


def written(config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The tensors that transformers writes for a model of a config: the oracle."""
    kind = str(config["model_type"])
    plain = {key: value for key, value in config.items() if key != "model_type"}
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **plain))
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    return entries({name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()})


def entries(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, "F32", shape, SHARD, 0, 0) for name, shape in shapes.items()}


def said(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> list[str]:
    return [finding.what for finding in check_fit(config, tensors)]


def variations(kind: str) -> Iterator[dict[str, Any]]:
    """Configs of a family: other sizes, every switch the other way round, every key left to the class."""
    yield from (described(kind, change) for change in (*EVERYWHERE, *CHANGES.get(kind, ())))
    full = described(kind, {})
    for key, value in full.items():
        if isinstance(value, bool):
            yield described(kind, {key: not value})


@pytest.mark.parametrize("kind", LAYOUTS)
def test_what_transformers_writes_is_never_refused(kind: str) -> None:
    refused = []
    for config in variations(kind):
        tensors = written(config)
        refused += said(config, tensors)
        for base in LAYOUTS[kind].bases:  # written without the head, names begin later
            refused += said(config, entries({name.removeprefix(base): e.shape for name, e in tensors.items()}))
    assert not refused, refused


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_config_that_leaves_its_keys_out_is_never_refused(kind: str) -> None:
    """Each key left out in turn: the class then takes its own default, which the headers may not show."""
    full = described(kind, {})
    refused = []
    for key in sorted(READ & set(full)):
        config = {name: value for name, value in full.items() if name != key}
        try:
            tensors = written(config)
        except (ValueError, TypeError, StrictDataclassClassValidationError):
            continue  # transformers' defaults do not go with the other sizes
        refused += [(key, what) for what in said(config, tensors)]
    assert not refused, refused


@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_single_tensor_that_is_missing_or_misshapen_is_refused(kind: str) -> None:
    for change in ({}, *CHANGES.get(kind, ())[:1], {"attention_bias": True, "mlp_bias": True}):
        config = described(kind, change)
        tensors = written(config)
        shapes = {name: entry.shape for name, entry in tensors.items()}
        for name, shape in shapes.items():
            (found,) = said(config, entries({n: s for n, s in shapes.items() if n != name}))
            assert f"1 tensor(s) are missing from the checkpoint: {name}, {shape} in a model" in found
            for wrong in ((*shape[:-1], shape[-1] + 1), shape[:-1], (*shape, 1), (shape[0] + 1, *shape[1:])):
                (found,) = said(config, entries(shapes | {name: wrong}))
                assert f"{SHARD}: tensor {name!r} is {wrong}, {shape} in a model of this config.json" in found
        for extra in ("x", f"{next(iter(shapes))}.x", LAYOUTS[kind].bases[0] + LAYOUTS[kind].blocks + ".3.x.weight"):
            (found,) = said(config, entries(shapes | {extra: (1,)}))
            assert found == f"1 tensor(s) do not belong to a {kind} model: {extra}"


def test_a_whole_block_too_few_or_too_many_is_one_line() -> None:
    config = described("llama", {})
    tensors = written(config)
    (found,) = said(config | {"num_hidden_layers": 5}, tensors)
    assert found.startswith("18 tensor(s) are missing from the checkpoint: model.layers.3.self_attn.q_proj.weight")
    (found,) = said(config | {"num_hidden_layers": 2}, tensors)
    assert found == "9 tensor(s) do not belong to a llama model: model.layers.2.self_attn.q_proj.weight"


def test_what_may_be_there_by_another_name_is_left_to_the_class() -> None:
    config = described("llama", {})
    shapes = {name: entry.shape for name, entry in written(config).items()}
    shapes["model.layers.0.attn.q.weight"] = shapes.pop("model.layers.0.self_attn.q_proj.weight")
    assert said(config, entries(shapes)) == []
    assert said(config | {"model_type": "lllama"}, entries({})) == []


def test_absurd_numbers_take_no_time() -> None:
    sparse, dense = described("qwen3_moe", {}), described("llama", {})
    tensors = {"sparse": written(sparse), "dense": written(dense)}
    began = time.monotonic()
    found = said(sparse | {"num_hidden_layers": 10_000, "num_local_experts": 100_000}, tensors["sparse"])
    assert "(6, 60), (100000, 60) in a model" in found[0]
    (found_dense,) = said(dense | {"num_hidden_layers": 10_000}, tensors["dense"])
    assert found_dense.startswith("1000 or more tensor(s) are missing from the checkpoint: model.layers.3.")
    assert time.monotonic() - began < 1


def test_words_are_those_of_the_installed_transformers() -> None:
    assert known_activations(ROOT) == set(ACT2FN)
    assert known_rotations(ROOT) == {*ROPE_INIT_FUNCTIONS, "default"}
    assert known_types(ROOT) >= set(CONFIG_MAPPING_NAMES)
    assert "lllama" not in known_types(ROOT)


def test_where_the_source_looks_unfamiliar_nothing_is_known(tmp_path: Path) -> None:
    (tmp_path / "activations.py").write_text("ACT2CLS = make()\n")
    (tmp_path / "modeling_rope_utils.py").write_text("not python\n")
    assert known_activations(tmp_path) == known_rotations(tmp_path) == known_types(tmp_path) == frozenset()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_class_reads_the_words_that_are_checked(kind: str) -> None:
    key, config = LAYOUTS[kind].activation, described(kind, {})
    if key:
        with pytest.raises(KeyError):
            written(config | {key: "geluu"})
    if kind not in installed.OTHER_ROTATIONS:
        section = {"rope_parameters": {"rope_type": "x", "rope_theta": 1e4}}
        with pytest.raises((KeyError, ValueError)):
            written(config | section)
        written(config | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}})


def test_misfits_are_refused_before_any_library_is_imported(tmp_path: Path) -> None:
    for number, fault in enumerate(attacks.MISFITS.values()):
        fault.damage(attacks.good(tmp_path / f"model{number}"))
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from llmcompress.errors import InputError\nfrom llmcompress.preflight import check_source\n"
        "for place in sys.argv[1:]:\n"
        "    try: check_source(Path(place))\n"
        "    except InputError as error: print(error.what)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    )
    places = [str(tmp_path / f"model{number}") for number in range(len(attacks.MISFITS))]
    ended = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    assert len(lines) == len(places)
    for line, (name, fault) in zip(lines, attacks.MISFITS.items(), strict=True):
        assert fault.word in line, name


def test_words_that_other_code_taught_the_library_are_left_to_it(tmp_path: Path) -> None:
    """With transformers imported, as here, someone may have registered a type."""
    folder = attacks.good(tmp_path / "model")
    attacks.config(folder, model_type="lllama")
    check_source(folder)
