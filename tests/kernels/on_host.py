"""Kernels in CUDA C++ as libraries for a CPU, a thread for each of theirs."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import Tensor

from llmcompress.kernels.nvrtc import compiler

HERE = Path(__file__).resolve().parent
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def built(folder: Path, made: compiler.Definitions, header: str, parts: tuple[str, ...], entries: str) -> ctypes.CDLL:
    """The `.cu` files of `parts` with a header's instructions, called by what `entries` exports."""
    code = "\n".join((compiler.FOLDER / f"{name}.cu").read_text() for name in parts)
    source, target = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(f'#include "{HERE / header}"\n{code}\n{entries}')
    flags = [f"-D{name}={value}" for name, value in made]
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", *flags, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(target))


def given(*values: Tensor | int | None) -> list[ctypes.c_void_p | ctypes.c_int]:
    """As C takes them."""
    return [
        ctypes.c_int(value) if isinstance(value, int) else ctypes.c_void_p(None if value is None else value.data_ptr())
        for value in values
    ]
