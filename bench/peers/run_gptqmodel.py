"""GPTQModel: GPTQ, with its activation orders, its error search and its asymmetric objectives."""

import os
import re
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer than two its pool of workers is refused

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import FOEMConfig, GPTAQConfig
from job import Job, run

BATCH = 8


def quantize(job: Job) -> None:
    settings = dict(job.settings)
    if "gptaq" in settings:
        settings["gptaq"] = GPTAQConfig(alpha=settings["gptaq"])
    if "foem" in settings:
        settings["foem"] = FOEMConfig(**settings["foem"])
    job.facts["ignored"] = job.unpackable()
    if job.facts["ignored"]:
        settings["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in job.facts["ignored"]}
    config = QuantizeConfig(bits=int(job.bits), group_size=job.group_size, offload_to_disk=False, **settings)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.tokens()]
    with job.timed():
        model = GPTQModel.load(str(job.model), config, device="cpu", dtype=torch.float32)
        model.quantize(rows, batch_size=BATCH)
        model.save(str(job.output))


def reload(job: Job) -> Any:
    return GPTQModel.load(str(job.output), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


if __name__ == "__main__":
    run(("gptqmodel",), quantize, reload)
