"""bitsandbytes nf4 through transformers; blocks of 64 weights, fixed.

Its packed CPU path is switched off on every module: with it, what is saved after a forward differs from what ran.
"""

from typing import Any

import bitsandbytes
import torch
from job import Job, run
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def plain(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def quantize(job: Job) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32, **job.settings
    )
    with job.timed():
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, quantization_config=config)
        plain(model).save_pretrained(job.output)


def reload(job: Job) -> Any:
    return plain(AutoModelForCausalLM.from_pretrained(job.output, dtype=torch.float32))


if __name__ == "__main__":
    run(("bitsandbytes",), quantize, reload)
