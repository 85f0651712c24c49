"""What a run takes, what was forecast, and that a limit changes neither the result nor is exceeded in silence."""

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, program, save_model

from llmcompress.compress.allocate.budget import parse_budget, parse_size
from llmcompress.compress.forecast import fitted, forecast
from llmcompress.compress.pipeline import Opened, open_model
from llmcompress.compress.rounds import copied
from llmcompress.compress.run import Planned, QuantizeRequest, Warned, quantize
from llmcompress.errors import InputError, MachineError
from llmcompress.hub.source import resolve
from llmcompress.model.checkpoint import CheckpointReader
from llmcompress.model.shelf import Shelf
from llmcompress.model.skeleton import Skeleton
from llmcompress.preflight import check_source
from llmcompress.recipes import Recipe, load_recipe
from llmcompress.runtime.packed import PackedReader
from llmcompress.types import BlockOutcome

SETS = ("calibration.samples=8", "calibration.sequence_length=32", "calibration.score_samples=4", "plan.bits=[2, 3, 4]")
BUDGET = parse_budget("3.3bits")


def anonymous(pid: int) -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) << 10 if found else 0


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def recipe_for(text: Path, *more: str) -> Recipe:
    return load_recipe("balanced", (*SETS, f"calibration.source={text}", *more))


@pytest.fixture(scope="module")
def opened(llama: Path, text_file: Path) -> Opened:
    return open_model(resolve(str(llama)), recipe_for(text_file), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_what_is_put_away_reads_the_same_and_leaves_no_file(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.randn(3, 5, 7).to(dtype).transpose(0, 2)
    found = Shelf(tmp_path).put_away(tensor)
    assert found.dtype == dtype
    assert torch.equal(found, tensor)
    assert found.data_ptr() != tensor.data_ptr()
    assert list(tmp_path.iterdir()) == []
    assert Shelf(tmp_path).keep(tensor) is tensor


def mapping(address: int) -> tuple[str, int]:
    """What the system says of the pages at an address: their file, and how many kB of them are anonymous."""
    name, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (head := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+\s*(.*)", line)) is not None:
            name, inside = head[3], int(head[1], 16) <= address < int(head[2], 16)
        elif inside and line.startswith("Anonymous:"):
            return name, int(line.split()[1])
    raise AssertionError("not mapped")


def test_what_is_put_away_is_no_anonymous_memory(tmp_path: Path) -> None:
    tensor = torch.full((1 << 20,), 3.0)
    found = Shelf(tmp_path, everything=True).keep(tensor)
    assert float(found.sum()) == 3 << 20
    name, anonymous_kb = mapping(found.data_ptr())
    assert name.startswith(str(tmp_path / "shelf.tmp-"))
    assert anonymous_kb == 0
    assert mapping(tensor.data_ptr())[1] > 0


@pytest.mark.parametrize("filed", [True, False])
def test_the_full_precision_block_is_a_copy_that_waits_where_states_do(filed: bool, tmp_path: Path) -> None:
    block = torch.nn.Linear(300, 1000)
    before = block.weight.detach().clone()
    found = copied(block, Shelf(tmp_path, everything=filed).keep)
    with torch.no_grad():
        block.weight.zero_()
    assert torch.equal(found.weight, before)
    assert mapping(found.weight.data_ptr())[0].startswith(str(tmp_path / "shelf.tmp-")) == filed


def test_a_disk_that_refuses_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot keep hidden states"):
        Shelf(tmp_path / "absent").put_away(torch.ones(2))


def test_states_go_to_files_before_batches_shrink(opened: Opened, text_file: Path) -> None:
    recipe = recipe_for(text_file)
    free = forecast(opened, recipe, BUDGET)
    assert sum(free.memory.values()) == free.peak_memory_bytes
    assert fitted(opened, recipe, BUDGET, limit=None) == (recipe, free)
    assert fitted(opened, recipe, BUDGET, limit=free.peak_memory_bytes) == (recipe, free)
    same, spilled = fitted(opened, recipe, BUDGET, limit=free.peak_memory_bytes - 1)
    assert same == recipe
    assert spilled.spilled
    assert spilled.disk_bytes > free.disk_bytes
    fewer, smaller = fitted(opened, recipe, BUDGET, limit=spilled.peak_memory_bytes - 1)
    assert fewer.calibration.batch_size == 4
    assert smaller.peak_memory_bytes < spilled.peak_memory_bytes < free.peak_memory_bytes


def test_a_recipe_that_reads_no_text_needs_disk_for_its_output_alone(opened: Opened) -> None:
    found = forecast(opened, load_recipe("fast", ("plan.bits=[2, 3, 4]",)), BUDGET)
    assert (found.disk_bytes, found.hidden_bytes) == (found.output_bytes, 0)


def test_too_little_is_refused_with_a_figure_that_does(opened: Opened, text_file: Path) -> None:
    recipe = recipe_for(text_file)
    with pytest.raises(InputError) as caught:
        fitted(opened, recipe, BUDGET, limit=1 << 20)
    said = re.search(r"--max-memory (\d+MB) or more", caught.value.hint or "")
    assert said is not None
    found, needed = fitted(opened, recipe, BUDGET, limit=parse_size(said[1], "--max-memory"))
    assert found.calibration.batch_size < recipe.calibration.batch_size
    assert needed.peak_memory_bytes <= parse_size(said[1], "--max-memory")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["2", "many", "2bits", "2GB/file", "-2GB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--max-memory"):
        parse_size(text, "--max-memory")


def run(llama: Path, recipe: Recipe, output: Path, limit: int | None = None) -> list[Any]:
    return list(quantize(QuantizeRequest(resolve(str(llama)), output, recipe, BUDGET, "cpu", "same", max_memory=limit)))


def test_a_run_with_states_in_files_gives_the_same_bytes(
    opened: Opened, llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(text_file)
    limit = forecast(opened, recipe, BUDGET).peak_memory_bytes - 1
    folders, original = set(), Shelf.put_away

    def watched(self: Shelf, tensor: torch.Tensor) -> torch.Tensor:
        folders.add(self.folder.name)
        return original(self, tensor)

    run(llama, recipe, tmp_path / "free")
    monkeypatch.setattr(Shelf, "put_away", watched)
    events = run(llama, recipe, tmp_path / "bounded", limit)
    assert contents(tmp_path / "bounded") == contents(tmp_path / "free")
    assert ".bounded.llmcompress" in folders
    assert not [event for event in events if isinstance(event, Warned)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bounded", "free"]


def test_one_block_is_in_memory_at_a_time_and_its_error_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without data, on a model of six blocks: never two of them, and errors that the files confirm."""
    model = save_model(tmp_path / "model", llama_config(num_hidden_layers=6))
    load, there = Skeleton.load_block, []

    def watched(self: Skeleton, index: int) -> Any:
        found = load(self, index)
        there.append(sum(not next(block.parameters()).is_meta for block in self.blocks))
        return found

    monkeypatch.setattr(Skeleton, "load_block", watched)
    request = QuantizeRequest(
        resolve(str(model)), tmp_path / "out", load_recipe("fast"), parse_budget("4bits"), "cpu", ""
    )
    events = list(quantize(request))
    assert max(there) == 1
    plan = next(event.plan for event in events if isinstance(event, Planned))
    assert {a.spec.bits for a in plan.allocation.assigned}
    plain = CheckpointReader(check_source(model).tensors)
    files = check_source(tmp_path / "out", packed=True)
    packed = PackedReader(CheckpointReader(files.tensors), files.config)
    told = {x.linear: x.relative_loss for e in events if isinstance(e, BlockOutcome) for x in e.linears}
    assert len(told) == 6 * 7
    for name, loss in told.items():
        before, after = plain.read(f"{name}.weight").double(), packed.read(f"{name}.weight").double()
        assert loss == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-3)


def peak_of(words: list[str], folder: Path) -> int:
    running = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    highest = 0
    while running.poll() is None:
        try:
            highest = max(highest, anonymous(running.pid))
        except OSError:
            break
        time.sleep(0.005)
    _, said = running.communicate()
    assert running.returncode == 0, said.decode()
    return highest


def test_a_run_takes_what_was_forecast(text_file: Path, tmp_path: Path) -> None:
    config = llama_config(hidden_size=128, intermediate_size=2048, num_hidden_layers=2, max_position_embeddings=256)
    model = save_model(tmp_path / "model", config, shard_size="1GB")
    sets = ("calibration.samples=16", "calibration.sequence_length=256", "calibration.score_samples=4",
            "calibration.batch_size=1", "plan.bits=[3, 4]", "plan.trials=false", "quantize.sweeps=1")  # fmt: skip
    text = text_file.with_name("long.txt")
    text.write_text(text_file.read_text() * 4)
    flags = [word for one in sets for word in ("--set", one)]
    recipe = load_recipe("balanced", (*sets, f"calibration.source={text}"))
    opened = open_model(resolve(str(model)), recipe, "cpu")
    limit = forecast(opened, recipe, BUDGET).peak_memory_bytes - (4 << 20)
    needed = fitted(opened, recipe, BUDGET, limit=limit)[1]
    assert needed.spilled
    assert needed.peak_memory_bytes <= limit
    assert needed.memory["Hessian"] > 2**25  # of the widest input, in every form it takes: what a copy too many exceeds
    bounded = ["--max-memory", f"{limit}B"]
    words = program("quantize", model, "--budget", "3.5bits", "-o", "out", "--calibration", text, *flags, *bounded)
    taken = peak_of(words, tmp_path)
    assert 0.5 * needed.peak_memory_bytes < taken <= 1.1 * needed.peak_memory_bytes


@pytest.mark.parametrize("words", [("score",), ("prune", "--blocks", "1"), ("eval", "--ref", "{}")])
def test_other_commands_keep_to_a_limit_too(
    words: tuple[str, ...], llama: Path, text_file: Path, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The same answer with states in files, and a refusal that names a size which does."""
    name, *more = (word.format(llama) for word in words)
    sets = [word for one in SETS for word in ("--set", one)]
    given = [name, llama, *more, *(["--data", text_file, "--samples", "6", "--sequence-length", "32"]
             if name == "eval" else ["--calibration", text_file, *sets])]  # fmt: skip
    refused = run(*given, "--max-memory", "2MB")
    assert refused.returncode == 2
    said = re.search(r"give --max-memory (\d+)MB or more", refused.stderr)
    assert said is not None, refused.stderr
    free, bounded = run(*given, "--json"), run(*given, "--json", "--max-memory", f"{said[1]}MB")
    assert free.returncode == bounded.returncode == 0, bounded.stderr
    first, second = json.loads(free.stdout), json.loads(bounded.stdout)
    if name == "score":
        assert "hidden states go to files" in bounded.stderr
        pairs = zip(first["scores"][0]["layers"], second["scores"][0]["layers"], strict=True)
        assert all(
            a["candidates"][0]["damage"] == pytest.approx(b["candidates"][0]["damage"], rel=1e-4) for a, b in pairs
        )
    elif name == "prune":
        assert (first["removed"], first["kld"]) == (second["removed"], pytest.approx(second["kld"], rel=1e-4))
    else:
        assert first["summary"]["kld"]["mean"] == second["summary"]["kld"]["mean"]
