"""Peak anonymous memory of each stage of each command, and how it grows with depth.

    python bench/memory.py demo --json bench/results/memory-demo.json
    python bench/memory.py random --depths 2,8 --only score --json bench/results/memory-random.json
    python bench/memory.py large --only "quantize, fast" --json bench/results/memory-large.json
    python bench/memory.py large --blocks 3 --only "quantize, balanced" --max-memory 735MB \
        --set calibration.samples=16 --set calibration.sequence_length=256 --set calibration.score_samples=8 \
        --json bench/results/memory-large-balanced.json
    python bench/memory.py shapes --json bench/results/memory-shapes.json

Memory is RssAnon of the process, read every few milliseconds: what the system cannot take back by writing or dropping
pages of files. `random` is a generated Llama, wide enough for its blocks to show beside the constant of the imports;
where its peak grows from one depth to the next, something is kept of every block. Further `--set KEY=VALUE` and
`--max-memory` go to every command that has it. `large` is a generated Llama of 1.5 GB (of 38 blocks, or of `--blocks`,
the others left out); beside its peaks stand what
importing torch takes, the most disk in use, and how long reading and hashing its weights takes, once after the system
was told to drop them from its cache and once more. `shapes` runs nothing: it is the forecast for Llamas of 8, 70 and
405 billion weights.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import publish
from transformers import LlamaConfig, LlamaForCausalLM

from llmcompress.compress.memory import stages
from llmcompress.hub.source import resolve
from llmcompress.model.needs import peak
from llmcompress.recipes import load_recipe
from llmcompress.types import LinearInfo

INTERVAL = 0.004  # seconds between two readings
DISK_INTERVAL = 0.25
SMALL = ("calibration.samples=16", "calibration.sequence_length=256", "calibration.score_samples=8")
MB = 1e6


LARGE = {"vocab_size": 32000, "intermediate_size": 3456, "num_attention_heads": 20}
LARGE_WIDTH, LARGE_BLOCKS = 1280, 38


def generate(folder: Path, blocks: int, width: int, **sizes: int) -> Path:
    """A random bfloat16 Llama with the demo model's tokenizer."""
    demo = resolve("demo").path
    vocabulary = int(json.loads((demo / "config.json").read_text())["vocab_size"])
    plain = {"vocab_size": vocabulary, "intermediate_size": 3 * width, "num_attention_heads": 8}
    config = LlamaConfig(
        **{**plain, **sizes},
        hidden_size=width,
        num_hidden_layers=blocks,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="400MB")
    torch.set_default_dtype(torch.float32)
    for path in demo.glob("*token*"):
        shutil.copy(path, folder / path.name)
    return folder


def anonymous(pid: int) -> int:
    """RssAnon of a process in bytes, 0 once it is gone."""
    try:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) << 10 if found else 0


def occupied(folder: Path) -> int:
    """Bytes of disk that the files of a folder take."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_blocks * 512
    return total


def reading_seconds(folder: Path) -> list[float]:
    """How long it takes to read and hash the shards: dropped from the cache as far as the system does, then again."""
    found = []
    for cold in (True, False):
        began = time.monotonic()
        for path in sorted(folder.glob("*.safetensors")):
            state = hashlib.sha256()
            with path.open("rb", buffering=0) as stream:
                if cold:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while piece := stream.read(1 << 22):
                    state.update(piece)
        found.append(round(time.monotonic() - began, 2))
    return found


def bare_import() -> int:
    """RssAnon of a program that has imported torch and nothing else."""
    code = "import torch; print(open('/proc/self/status').read())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"RssAnon:\s+(\d+) kB", said)[1]) << 10  # type: ignore[index]


def peaks(words: list[str], folder: Path) -> dict[str, Any]:
    """Run a program; its highest RssAnon in bytes, in all and by the stage it last spoke of, and what disk it took."""
    began, stage, found = time.monotonic(), "start", dict[str, int]()
    before = disk = occupied(folder)
    looked = began
    running = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []

    def listen() -> None:
        for line in running.stderr or ():
            lines.append(line)

    listener = threading.Thread(target=listen)
    listener.start()
    seen = 0
    while running.poll() is None:
        for line in lines[seen:]:
            seen += 1
            if (name := re.match(r"(.+) \.\.\.$", line)) is not None:
                stage = name[1]
            elif line.startswith(("plan:", "resuming")):
                stage = "quantizing"
        found[stage] = max(found.get(stage, 0), anonymous(running.pid))
        if time.monotonic() - looked > DISK_INTERVAL:
            looked, disk = time.monotonic(), max(disk, occupied(folder))
        time.sleep(INTERVAL)
    listener.join()
    if running.returncode:
        raise SystemExit(f"{' '.join(words)}\n{''.join(lines)}")
    seconds = round(time.monotonic() - began, 1)
    return {"peak": max(found.values()), "stages": found, "seconds": seconds, "disk": disk - before}


def commands(model: str, sets: list[str], more: list[str]) -> Iterator[tuple[str, list[str]]]:
    """What is run on one model, in this order: `eval` reads what `quantize` wrote."""
    program = [sys.executable, "-m", "llmcompress"]
    flags = [word for change in sets for word in ("--set", change)]
    yield "quantize, balanced", [*program, "quantize", model, "--budget", "4bits", "-o", "out", *flags, *more]
    part = ["--samples", "8", "--sequence-length", "256"]
    yield "eval", [*program, "eval", "out", "--ref", model, *part, "-o", "report", *more]
    yield "score", [*program, "score", model, "-o", "scores.json", *flags, *more]
    yield "prune", [*program, "prune", model, "--blocks", "1", "-o", "pruned", *flags, *more]
    fast = ["--recipe", "fast"]
    yield "quantize, fast", [*program, "quantize", model, "--budget", "4bits", "-o", "fast", *fast, *more]


def row(label: str, model: str, name: str, words: list[str], folder: Path) -> dict[str, Any]:
    """One run of one command."""
    found = peaks(words, folder)
    print(f"{'':<33} {found['disk'] / MB:7.0f} MB of disk at most, {occupied(folder) / MB:.0f} MB left", flush=True)
    stages = "  ".join(f"{stage} {size / MB:.0f}" for stage, size in found["stages"].items())
    print(f"{label:<12} {name:<20} {found['peak'] / MB:7.0f} MB  {found['seconds']:6.1f} s   {stages}", flush=True)
    forecast = None
    if name.startswith("quantize"):
        dry = subprocess.run([*words, "--force", "--dry-run", "--json"], cwd=folder, capture_output=True, check=False)
        forecast = json.loads(dry.stdout)["peak_memory_bytes"] if dry.returncode == 0 else None
        print(f"{'':<33} {(forecast or 0) / MB:7.0f} MB forecast", flush=True)
    return {"model": label, "command": name, **found, "forecast": forecast}


SHAPES = {"8B": (32, 4096, 14336, 32), "70B": (80, 8192, 28672, 64), "405B": (126, 16384, 53248, 128)}
VOCABULARY, KEY_HEADS = 128256, 8


def shape(blocks: int, width: int, inner: int, heads: int) -> Any:
    """What the forecast reads of an opened model, for a Llama 3 of this shape in bfloat16."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=KEY_HEADS,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    infos, inputs = (
        [],
        {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3},
    )
    for place, block in enumerate(model.model.layers):
        linears = []
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear):
                full, rows, columns = f"model.layers.{place}.{name}", module.out_features, module.in_features
                group = inputs[name.rpartition(".")[2]]
                linears.append(
                    LinearInfo(
                        name=full,
                        tensor=f"{full}.weight",
                        rows=rows,
                        columns=columns,
                        unit=full,
                        shared_input=group,
                    )
                )
        infos.append(SimpleNamespace(linears=tuple(linears)))
    parameters = sum(p.numel() for p in model.parameters())
    return SimpleNamespace(
        trace=SimpleNamespace(blocks=infos, parameters=parameters),
        skeleton=SimpleNamespace(
            blocks=model.model.layers,
            config=config,
            model=model,
            tied=dict,
            names=SimpleNamespace(converted=False),
        ),
        source_bytes=2 * parameters,
        context_tokens=None,
        shards=SimpleNamespace(head=None),
    )


def forecasts() -> list[dict[str, Any]]:
    """The highest stage of each shape under two recipes, with hidden states in memory and in files."""
    rows = []
    for name, sizes in SHAPES.items():
        opened = shape(*sizes)
        for word, spilled, changes in (
            ("balanced", False, ()),
            ("balanced", True, ()),
            ("balanced", True, ("calibration.batch_size=1",)),
            ("fast", False, ()),
        ):
            recipe = load_recipe(word, changes)
            spec = (None,) * len(recipe.plan.bits)
            opened.candidates = {x.name: spec for info in opened.trace.blocks for x in info.linears}
            found = peak(stages(opened, recipe, reads=word != "fast"), spilled=spilled)
            terms = {key: round(size / 1e9, 1) for key, size in found.every(spilled=spilled).items()}
            total = found.total(spilled=spilled) / 1e9
            batch = recipe.calibration.batch_size
            print(f"{name:<5} {word:<9} spilled={spilled!s:<5} batch {batch}  {total:7.1f} GB  {found.name}: {terms}")
            rows.append({"shape": name, "recipe": word, "spilled": spilled, "batch": batch, "GB": round(total, 1),
                         "stage": found.name, "terms": terms})  # fmt: skip
    return rows


def main() -> None:
    """Run every command on every model asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo", help="demo, a directory, random, large, or shapes")
    parser.add_argument("--depths", default="4,8,16", help="of the random model")
    parser.add_argument("--width", type=int, default=512, help="of the random model")
    parser.add_argument("--blocks", type=int, default=LARGE_BLOCKS, help="of the large model")
    parser.add_argument("--set", dest="sets", action="append", default=[])
    parser.add_argument("--max-memory", default=None)
    parser.add_argument("--only", default="", help="only commands whose name begins so")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    more = [] if options.max_memory is None else ["--max-memory", options.max_memory]
    rows = forecasts() if options.model == "shapes" else []
    with tempfile.TemporaryDirectory() as scratch:
        made = options.model in ("random", "large", "shapes")
        known = {} if made else {options.model: str(resolve(options.model).path)}
        depths = map(int, options.depths.split(",")) if options.model == "random" else ()
        for blocks in depths:
            known[f"{blocks} blocks"] = str(generate(Path(scratch) / f"model-{blocks}", blocks, options.width))
        if options.model == "large":
            known["large"] = str(generate(Path(scratch) / "large", options.blocks, LARGE_WIDTH, **LARGE))
            print(f"importing torch {bare_import() / MB:.0f} MB; reading and hashing, seconds, "
                  f"{reading_seconds(Path(known['large']))}", flush=True)  # fmt: skip
        sets = [*(SMALL if options.model == "random" else ()), *options.sets]
        for label, model in known.items():
            folder = Path(scratch) / f"run-{label.replace(' ', '-').replace('/', '-')}"
            folder.mkdir()
            for name, words in commands(model, sets, more):
                if name.startswith(options.only):
                    rows.append(row(label, model, name, words, folder))
    document = {
        "model": Path(options.model).name,
        "width": options.width if options.model == "random" else None,
        "blocks": options.blocks if options.model == "large" else None,
        "max_memory": options.max_memory,
        "sets": sets,
        "rows": rows,
    }
    publish(options.json, document)


if __name__ == "__main__":
    main()
