"""What every peer's runner does, inside the peer's own environment: read a job, quantize, save, reload, write results.

    PEER/bin/python run_PEER.py quantize JOB.json    writes JOB.output and JOB.quantize.json
    PEER/bin/python run_PEER.py reload JOB.json      writes JOB.dense and JOB.reload.json

Nothing here imports llmcompress. The weights a user of the reloaded model gets are found by running the identity
matrix through every linear, whatever class it has become; the plain model with those weights must then give the
reloaded model's logits.
"""

import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FLOATS = ("F64", "F32", "F16", "BF16")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
             "tokenizer.model", "added_tokens.json", "vocab.txt", "spiece.model")  # fmt: skip
CHECKED_WINDOWS = 2


@dataclass
class Job:
    """One cell for one peer. `linears` are `(name, rows, columns)` of the blocks; `settings` are the peer's own."""

    model: Path
    output: Path
    dense: Path
    calibration: Path
    held_out: Path
    bits: float
    group_size: int
    settings: dict[str, Any]
    linears: list[tuple[str, int, int]]
    threads: int
    seed: int
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def tokens(self) -> Tensor:
        """Calibration token ids, int64 `(samples, length)`."""
        return torch.from_numpy(numpy.load(self.calibration))

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def source(self) -> Any:
        """The original model in float32, so that every peer calibrates on exact activations."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()

    def ragged(self) -> list[str]:
        """Linears whose columns the group size does not divide: a user of a peer that refuses them leaves them out."""
        return [name for name, _, columns in self.linears if columns % self.group_size]

    def unpackable(self) -> list[str]:
        """Linears with a side that is no multiple of 32, for peers that pack along both."""
        return [name for name, rows, columns in self.linears if rows % 32 or columns % 32]

    @contextmanager
    def timed(self) -> Iterator[None]:
        """What is inside counts as quantizing: loading and saving too, imports not."""
        began = time.monotonic()
        yield
        self.seconds += time.monotonic() - began


def read(path: Path) -> Job:
    """A job from its file."""
    document: dict[str, Any] = json.loads(path.read_text())
    for key in ("model", "output", "dense", "calibration", "held_out"):
        document[key] = Path(document[key])
    return Job(**document)


def probe(module: nn.Module, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight a linear acts with, float32 `(rows, columns)`."""
    inputs = torch.cat([torch.zeros(1, columns), torch.eye(columns)]).to(dtype)
    made: Tensor = module(inputs).float()
    return (made[1:] - made[:1]).T.contiguous().view(rows, columns)


def _state(job: Job, model: nn.Module) -> dict[str, Tensor]:
    """Every parameter of the plain model, float32, with the weights of the blocks' linears probed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.model))
    dtype = next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    modules = dict(model.named_modules())
    made = {f"{name}.weight": probe(modules[name], rows, columns, dtype) for name, rows, columns in job.linears}
    there = dict(model.named_parameters(remove_duplicate=False))
    for name, wanted in plain.named_parameters():
        if name not in made:
            made[name] = there[name].detach().float().contiguous().clone()
        if made[name].shape != wanted.shape:
            raise SystemExit(f"{name}: {tuple(made[name].shape)} is not {tuple(wanted.shape)}")
    return made


def dump(job: Job, model: Any) -> dict[str, Any]:
    """Write the model as a plain float32 checkpoint, and say how far its logits are from the reloaded one's."""
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(numpy.load(job.held_out))[:CHECKED_WINDOWS]
    theirs = torch.log_softmax(model(input_ids=tokens).logits.double(), -1)  # some unpack at their first forward
    shutil.rmtree(job.dense, ignore_errors=True)
    job.dense.mkdir(parents=True)
    save_file(_state(job, model), job.dense / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((job.model / "config.json").read_text())
    (job.dense / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2))
    for name in TOKENIZER:
        if (job.model / name).is_file():
            shutil.copy(job.model / name, job.dense / name)
    plain = AutoModelForCausalLM.from_pretrained(job.dense, dtype=torch.float32).eval()
    ours = torch.log_softmax(plain(input_ids=tokens).logits.double(), -1)
    return {
        "reload_kld": float((theirs.exp() * (theirs - ours)).sum(-1).mean()),
        "reload_logit_difference": float((theirs - ours).abs().max()),
    }


def stored(folder: Path) -> dict[str, tuple[str, int]]:
    """Name, dtype and bytes of every tensor in the safetensors files of a folder."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                dtype = file.get_slice(name).get_dtype()
                found[name] = (dtype, tensor.numel() * tensor.element_size())
    return found


def count(linears: list[tuple[str, int, int]], tensors: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """True bits on disk of the blocks' linears: codes, scales, zeros, index and shape tensors, biases left out."""
    quantized_bits = quantized_weights = every_bits = every_weights = 0
    left = []
    for name, rows, columns in linears:
        own = {key: value for key, value in tensors.items() if key.startswith(name + ".") and key != name + ".bias"}
        if not own:
            raise SystemExit(f"{name}: nothing of it is stored")
        bits = 8 * sum(size for _, size in own.values())
        every_bits, every_weights = every_bits + bits, every_weights + rows * columns
        if set(own) == {name + ".weight"} and own[name + ".weight"][0] in FLOATS:
            left.append(name)
        else:
            quantized_bits, quantized_weights = quantized_bits + bits, quantized_weights + rows * columns
    return {
        "bits_per_weight": quantized_bits / max(quantized_weights, 1),
        "block_bits_per_weight": every_bits / every_weights,
        "left": left,
        "weight_file_bytes": sum(size for _, size in tensors.values()),
    }


def run(
    packages: tuple[str, ...],
    quantize: Callable[[Job], None],
    reload: Callable[[Job], Any],
    tensors: Callable[[Path], dict[str, tuple[str, int]]] = stored,
) -> None:
    """The command line of a runner."""
    began = time.monotonic()
    phase, path = sys.argv[1], Path(sys.argv[2])
    job = read(path)
    torch.set_num_threads(job.threads)
    random.seed(job.seed)
    numpy.random.seed(job.seed)
    torch.manual_seed(job.seed)
    if phase == "quantize":
        shutil.rmtree(job.output, ignore_errors=True)
        job.output.mkdir(parents=True)
        quantize(job)
        found: dict[str, Any] = {"seconds": job.seconds}
    else:
        with torch.no_grad():
            found = dump(job, reload(job).eval()) | count(job.linears, tensors(job.output))
    found |= {
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
        "process_seconds": time.monotonic() - began,
        "facts": job.facts,
    }
    path.with_suffix(f".{phase}.json").write_text(json.dumps(found, indent=2))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # some peers leave worker threads that never end
