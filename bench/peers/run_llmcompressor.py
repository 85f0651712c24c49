"""llm-compressor: GPTQ and AWQ, saved as compressed-tensors and reloaded through transformers."""

from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from job import Job, run
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM

BATCH = 8


def _mappings(job: Job) -> list[dict[str, Any]] | None:
    """Its own for the model; where `down_proj` is left alone, those of a Llama without it, for it fails otherwise."""
    if not any(name.endswith("down_proj") for name in job.ragged()):
        return None
    pairs = (("input_layernorm", ("q", "k", "v")), ("v_proj", ("o",)), ("post_attention_layernorm", ("gate", "up")))
    return [{"smooth_layer": f"re:.*{a}$", "balance_layers": [f"re:.*{x}_proj$" for x in b]} for a, b in pairs]


def _recipe(job: Job, ignore: list[str]) -> list[Any]:
    weights: dict[str, Any] = {
        "num_bits": int(job.bits),
        "type": "int",
        "strategy": "group",
        "group_size": job.group_size,
        "symmetric": job.settings["symmetric"],
    }
    if "observer" in job.settings:
        weights["observer"] = job.settings["observer"]
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))}
    if job.settings["method"] == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=ignore)]
    if job.settings["method"] == "awq":
        return [AWQModifier(mappings=_mappings(job)), QuantizationModifier(config_groups=groups, ignore=ignore)]
    return [QuantizationModifier(config_groups=groups, ignore=ignore)]


def quantize(job: Job) -> None:
    ragged = job.ragged()
    tokens = job.tokens()
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    with job.timed():
        model = job.source()
        oneshot(
            model=model,
            tokenizer=job.tokenizer(),
            recipe=_recipe(job, ["lm_head", *ragged]),
            dataset=Dataset.from_dict(rows),
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
            batch_size=BATCH,
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(job.output, save_compressed=True)
    job.facts["ignored"] = ragged


def reload(job: Job) -> Any:
    return AutoModelForCausalLM.from_pretrained(job.output, dtype=torch.float32, device_map="cpu")


if __name__ == "__main__":
    if not torch.accelerator.is_available():  # it pins memory whether there is an accelerator or not
        IntermediatesCache._pin_intermediate = classmethod(lambda cls, value: None)
    run(("llmcompressor", "compressed-tensors"), quantize, reload)
