"""A signal that arrives where Python calls back from C: it is still an interruption, without a traceback."""

import signal
import subprocess
import sys

import pytest
from pydantic import BaseModel, field_serializer

from llmcompress.cli.trouble import exit_code, understood
from llmcompress.errors import Interrupted, Stopped

LOST = """
import os, signal, time, weakref
import llmcompress.cli as program

class Thing: pass

def arrive(_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000): pass

def work(**_):
    thing = Thing()
    kept = weakref.ref(thing, arrive)
    del thing
    print("went on", flush=True)
    time.sleep(30)

program.cli.main = work
program.main([])
"""


class Interruptible(BaseModel):
    """A model that is interrupted while it is written out."""

    value: int = 1

    @field_serializer("value")
    def interrupted(self, _: int) -> int:
        raise Stopped(signal.SIGTERM)


def test_what_a_library_wraps_is_an_interruption() -> None:
    with pytest.raises(Exception, match="Stopped") as caught:
        Interruptible().model_dump()
    assert isinstance(understood(caught.value), Interrupted)
    assert exit_code(caught.value) == 143


def test_what_python_cannot_stop_for_arrives_again() -> None:
    found = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True, check=False, timeout=60)
    assert found.stdout == "went on\n"
    assert found.returncode == 143
    assert "Traceback" not in found.stderr
    assert found.stderr.startswith("error: interrupted")
