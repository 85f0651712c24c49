"""Processes that work together: what one of them would find, all find, and none waits for one that is gone."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from llmcompress.model.crew import ALONE
from tests.forked import Forker


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_shared_is_what_one_has(forker: Forker, tmp_path: Path, ranks: int) -> None:
    found = forker.run((), tmp_path, ranks=ranks, call="tests.crew_cases:work", timeout=60)
    assert found.returncode == 0, found.stderr


def test_a_process_that_fails_says_why_to_the_others(forker: Forker, tmp_path: Path) -> None:
    found = forker.run((), tmp_path, ranks=3, call="tests.crew_cases:failing", timeout=60)
    assert found.returncode == 2, found.stderr


def test_where_memory_runs_out_all_meet_again(forker: Forker, tmp_path: Path) -> None:
    found = forker.run((), tmp_path, ranks=3, call="tests.crew_cases:scarce", timeout=60)
    assert found.returncode == 0, found.stderr


def test_who_waits_to_meet_again_hears_why_another_does_not_come(forker: Forker, tmp_path: Path) -> None:
    found = forker.run((), tmp_path, ranks=3, call="tests.crew_cases:ruined", timeout=60)
    assert found.returncode == 2, found.stderr


def test_a_process_that_does_not_answer_ends_the_others(forker: Forker, tmp_path: Path) -> None:
    def end_the_stopped() -> None:
        """Once all others have ended by themselves."""
        states: dict[int, str] = {}
        while "T" not in states.values() or set(states.values()) - {"T", "Z"}:
            time.sleep(0.2)
            with suppress(OSError):
                states = {pid: Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in forker.children()}
        for pid in states:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=end_the_stopped, daemon=True)
    thread.start()
    found = forker.run((), tmp_path, ranks=2, call="tests.crew_cases:stopped", timeout=80)
    thread.join(10)
    assert found.returncode == 3, found.stderr


def test_work_is_dealt_by_cost() -> None:
    assert ALONE.deal([1, 2, 3]) == [0, 0, 0]
