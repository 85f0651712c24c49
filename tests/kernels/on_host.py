"""Kernels in CUDA C++ as libraries for a CPU, a thread for each of theirs."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

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
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(target))
