"""auto-round: rounding, SignRound, and AutoScheme for an average width."""

import difflib
import json
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from job import Job, run
from transformers import AutoModelForCausalLM

BATCH = 8


def _scheme(bits: int, job: Job) -> QuantizationScheme:
    return QuantizationScheme(
        bits=bits, group_size=job.group_size, sym=job.settings["sym"], data_type="int", act_bits=16
    )


def _text(job: Job, tokens: torch.Tensor) -> str:
    """A file of the calibration text: AutoScheme takes nothing else. Says how many tokens come back as they were."""
    tokenizer = job.tokenizer()
    texts = [tokenizer.decode(row, skip_special_tokens=False) for row in tokens.tolist()]
    pairs = [(tokenizer(text).input_ids, row) for text, row in zip(texts, tokens.tolist(), strict=True)]
    shares = [difflib.SequenceMatcher(None, again[: len(row)], row, autojunk=False).ratio() for again, row in pairs]
    job.facts["tokens_same_as_text"] = sum(shares) / len(shares)
    job.facts["windows_too_short"] = sum(len(again) < len(row) for again, row in pairs)
    path = job.output.with_suffix(".text.json")
    path.write_text(json.dumps([{"text": text} for text in texts]))
    return str(path)


def _narrower(job: Job) -> dict[str, dict[str, int]]:
    """Linears whose inputs groups do not divide, with the widest halved groups that do: a mixture it can reload."""
    sizes = [job.group_size >> shift for shift in range(1, 4)]
    found = {name: next((size for size in sizes if columns % size == 0), None) for name, _, columns in job.linears}
    odd = {name for name, _, columns in job.linears if columns % job.group_size}
    return {name: {"group_size": size} for name, size in found.items() if name in odd and size}


def quantize(job: Job) -> None:
    tokens = job.tokens()
    data: Any = [{"input_ids": b, "attention_mask": torch.ones_like(b)} for b in tokens.split(BATCH)]
    model = job.source()
    scheme: Any = None
    if "options" in job.settings:
        data = _text(job, tokens)
        options = [_scheme(bits, job) for bits in job.settings["options"]]
        scheme = AutoScheme(avg_bits=job.bits, options=options)
    else:
        scheme = _scheme(int(job.bits), job)
    with job.timed():
        maker = AutoRound(
            model,
            tokenizer=job.tokenizer(),
            scheme=scheme,
            dataset=data,
            seqlen=tokens.shape[1],
            nsamples=len(tokens),
            batch_size=BATCH,
            device_map="cpu",
            seed=job.seed,
            enable_torch_compile=False,
            iters=job.settings["iters"],
            layer_config=_narrower(job),
            **job.settings.get("more", {}),
        )
        maker.quantize_and_save(str(job.output), format="auto_round")


def reload(job: Job) -> Any:
    places = [job.output, *sorted(p for p in job.output.iterdir() if p.is_dir())]
    place = next(p for p in places if (p / "config.json").is_file())
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, device_map="cpu")


if __name__ == "__main__":
    run(("auto-round",), quantize, reload)
