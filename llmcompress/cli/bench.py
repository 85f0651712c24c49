"""`llmcompress bench`."""

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import Finite, Whole, speaking
from llmcompress.cli.say import Speaker

COPIES = 8  # of a linear, so that caches have forgotten one before its turn comes again
TYPICAL = (4096, 4096)


@click.command("bench")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--tokens", type=Whole(1), default=1, show_default=True, help="Tokens at a time; 1 is decoding.")
@click.option("--seconds", type=Finite(0.05), default=1.0, show_default=True, help="For each row group.")
@click.option("--threads", type=Whole(1), help="Of torch. Default: what torch takes.")
@speaking
def bench_command(model: Path | None, tokens: int, seconds: float, threads: int | None, speaker: Speaker) -> None:
    """Time the linears of MODEL (or typical ones) on this machine's CPU, packed and as bfloat16.

    LLMCOMPRESS_BACKEND=NAME times another backend than the one that would be taken.
    """
    from llmcompress.preflight import check_source

    files = None if model is None else check_source(model, packed=True)
    import torch

    from llmcompress.runtime.timing import read_gigabytes_per_second

    torch.set_num_threads(threads or torch.get_num_threads())
    groups = _typical() if files is None else _of_model(files)
    rows = [row for key, group in groups.items() for row in _race(key, group, tokens, seconds)]
    speed = read_gigabytes_per_second()
    title = (
        f"{tokens} token(s), {torch.get_num_threads()} thread(s), memory reads {speed:.0f} GB/s; x bf16: times as fast"
    )
    head = ["linear", "format", "n", "backend", "µs", "GB/s", "x bf16", "error"]
    speaker.table(title, head, [
        [r["size"], r["format"], str(r["count"]), r["backend"], f"{r['low']:.0f}", f"{r['gigabytes_per_second']:.1f}",
         f"{r['speedup']:.2f}", f"{r['error']:.1e}"] for r in rows
    ])  # fmt: skip
    packed = sum(r["low"] * r["count"] for r in rows) / 1e3
    plain = sum(r["low"] * r["count"] * r["speedup"] for r in rows) / 1e3
    document = {"tokens": tokens, "threads": torch.get_num_threads(), "read_gigabytes_per_second": speed, "rows": rows}
    lines = [] if model is None else [f"all linears {packed:.1f} ms, as bfloat16 {plain:.1f} ms"]
    speaker.result(document, lines)


def _typical() -> dict[Any, Any]:
    """Random linears of every usual format."""
    from llmcompress.kernels.samples import random_codes
    from llmcompress.kernels.stored import tensors_of
    from llmcompress.spec import LinearSpec

    specs = [LinearSpec(bits=bits, group_size=128) for bits in (2, 3, 4, 8)]
    specs += [LinearSpec(bits=4, group_size=64, kind="nf4"), LinearSpec(bits=4, group_size=128, kind="asymmetric")]
    made = {spec: tensors_of("", random_codes(spec, *TYPICAL)) for spec in specs}
    return {
        (spec, TYPICAL): ([{name: part.clone() for name, part in tensors.items()} for _ in range(COPIES)], 1)
        for spec, tensors in made.items()
    }


def _of_model(files: Any) -> dict[Any, Any]:
    """The linears of a checkpoint, by format and size, at most `COPIES` of each read."""
    from llmcompress.runtime.packed import PackedReader
    from llmcompress.runtime.shards import ShardReader

    shards = ShardReader(files.paths)
    reader = PackedReader(shards, files.config)
    stems: dict[Any, list[str]] = defaultdict(list)
    for stem in reader.stems():
        codes_alone = reader.spec_of(stem).model_copy(update={"rank": 0})
        stems[codes_alone, reader.size_of(stem)].append(stem)
    return {
        key: ([{n.removeprefix(s): shards.read(n) for n in reader.parts(s)} for s in found[:COPIES]], len(found))
        for key, found in stems.items()
    }


def _race(key: Any, group: tuple[list[Any], int], tokens: int, seconds: float) -> list[dict[str, Any]]:
    """One row: the packed linear beside a bfloat16 one of its size."""
    import torch

    from llmcompress.kernels.backends import choose
    from llmcompress.runtime.timing import dense, packed, race

    spec, (rows, columns) = key
    copies, count = group
    x = torch.randn(tokens, columns).bfloat16()
    plain = [torch.randn(rows, columns).bfloat16() for _ in range(min(COPIES, 4))]
    ours, theirs = race([packed(spec.label, spec, copies, x), dense("bfloat16", plain, x)], x, seconds)
    backend = choose(spec.model_dump_json(), rows, columns, x).__name__.rpartition(".")[2]
    more = {"size": f"{rows} x {columns}", "format": spec.label, "count": count, "backend": backend}
    return [asdict(ours) | more | {"speedup": theirs.low / ours.low}]
