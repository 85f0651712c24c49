"""HQQ through its own model class: half-quadratic scales, no data."""

from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from job import Job, run


def quantize(job: Job) -> None:
    with job.timed():
        model = job.source()
        config = BaseQuantizeConfig(nbits=int(job.bits), group_size=job.group_size, **job.settings)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float32, device="cpu")
        AutoHQQHFModel.save_quantized(model, str(job.output))


def reload(job: Job) -> Any:
    return AutoHQQHFModel.from_quantized(str(job.output), compute_dtype=torch.float32, device="cpu")


def tensors(folder: Path) -> dict[str, tuple[str, int]]:
    """Its file maps a module to its state: codes, scales and zeros, and settings that count as nothing."""
    found: dict[str, tuple[str, int]] = {}
    for module, state in torch.load(folder / "qmodel.pt", map_location="cpu", weights_only=True).items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                dtype = "F32" if value.dtype == torch.float32 else str(value.dtype)
                found[f"{module}.{key}"] = (dtype, value.numel() * value.element_size())
    return found


if __name__ == "__main__":
    HQQLinear.set_backend(HQQBackend.PYTORCH)
    run(("hqq",), quantize, reload, tensors)
