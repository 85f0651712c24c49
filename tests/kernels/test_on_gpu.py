"""The run of everything that needs a GPU: its order and its clock, with other commands in place of the real ones."""

import json
from pathlib import Path

import pytest
import triton_cases

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton is not installed")
def test_steps_share_the_time_and_what_they_wrote_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that hangs is stopped with all its processes, one that fails is told from one that ends well."""
    monkeypatch.syspath_prepend(str(BENCH))
    import on_gpu

    first = "import sys, time, pathlib; pathlib.Path(sys.argv[-1]).write_text('1'); print('so far', flush=True); "
    steps = [
        on_gpu.Step("one that hangs", 0.2, ("-c", first + "time.sleep(600)"), "hangs.json"),
        on_gpu.Step("one that fails", 0.5, ("-c", "raise SystemExit(3)")),
        on_gpu.Step("one that is well", 0.5, ("-c", "print('well')")),
    ]
    found = on_gpu.all_of(steps, tmp_path, 10 / 60)
    assert [outcome.exit_code for outcome in found] == [None, 3, 0]
    assert 1.5 < found[0].seconds < 8
    assert (tmp_path / "hangs.json").read_text() == "1"
    assert "so far" in (tmp_path / "one-that-hangs.log").read_text()
    assert [row["exit_code"] for row in json.loads((tmp_path / "summary.json").read_text())] == [None, 3, 0]
    assert on_gpu.all_of(steps, tmp_path, 0) == []


@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton is not installed")
def test_steps_are_commands_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files exist, and every option is one that the script knows."""
    monkeypatch.syspath_prepend(str(BENCH))
    import on_gpu

    for step in on_gpu.steps():
        names = [part for part in step.command if part.endswith(".py")]
        assert names
        assert all((BENCH.parent / name).is_file() for name in names), step
        if names[0].startswith("bench/"):
            text = (BENCH.parent / names[0]).read_text()
            assert all(f'"{part}"' in text for part in step.command if part.startswith("--")), step
            assert '"--json"' in text
