"""torchao weight-only integers through transformers."""

from typing import Any

import torch
from job import Job, run
from torchao.quantization import IntxWeightOnlyConfig, PerGroup
from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm
from transformers import AutoModelForCausalLM, TorchAoConfig


def quantize(job: Job) -> None:
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{int(job.bits)}"),
        granularity=PerGroup(job.group_size),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm(job.settings["scales"]),
    )
    job.facts["ignored"] = job.ragged()
    asked = TorchAoConfig(quant_type=config, modules_to_not_convert=["lm_head", *job.facts["ignored"]])
    with job.timed():
        model = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=torch.float32, device_map="cpu", quantization_config=asked
        )
        model.save_pretrained(job.output)


def reload(job: Job) -> Any:
    return AutoModelForCausalLM.from_pretrained(job.output, dtype=torch.float32, device_map="cpu")


if __name__ == "__main__":
    run(("torchao",), quantize, reload)
