"""The C library of `native/`: compiled when first needed, once for each user, compiler and version of its sources.

There is nothing to install: where no C compiler is found, or it fails, there is no library, and the reason is kept.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from llmcompress.files import cache_folder, own_folder

SOURCES = Path(__file__).parent / "native"
# nothing is contracted: the searches of grid.c have the bits of torch's own operations
FLAGS = ("-O2", "-ftree-vectorize", "-std=gnu11", "-fno-math-errno", "-ffp-contract=off", "-fPIC")
LIBRARIES = ("-shared", "-lpthread", "-lm")
COMPILERS = ("cc", "gcc", "clang")
SECONDS = 120


def compiler() -> str | None:
    """The C compiler that CC names, or the first there is."""
    named = os.environ.get("CC")
    return next((path for name in ((named,) if named else COMPILERS) if (path := shutil.which(name))), None)


def _digest(program: str) -> str:
    """What a library depends on: sources, flags, compiler and machine."""
    words = [*FLAGS, *LIBRARIES, program, platform.machine()]
    words.append(subprocess.run([program, "--version"], capture_output=True, text=True, timeout=SECONDS).stdout)
    whole = hashlib.sha256("\0".join(words).encode())
    for path in sorted(SOURCES.glob("*.[ch]")):
        whole.update(path.read_bytes())
    return whole.hexdigest()[:32]


def build(program: str, folder: Path) -> Path:
    """Compile into `folder`, or find what was compiled there before. Raises OSError or subprocess.SubprocessError."""
    library = own_folder(folder) / f"{_digest(program)}.so"
    if not library.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            objects = _compile(program, Path(aside))
            whole = Path(aside) / "whole.so"
            words = [program, *map(str, objects), "-o", str(whole), *LIBRARIES]
            subprocess.run(words, check=True, capture_output=True, timeout=SECONDS)
            whole.replace(library)  # whole or not at all, also when two compile at once
    return library


def _compile(program: str, folder: Path) -> list[Path]:
    """All sources at the same time."""
    sources = sorted(SOURCES.glob("*.c"))
    objects = [folder / f"{source.stem}.o" for source in sources]
    commands = [[program, *FLAGS, "-c", str(a), "-o", str(b)] for a, b in zip(sources, objects, strict=True)]
    with ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen(words, stderr=subprocess.DEVNULL)) for words in commands]
        for one in running:
            stack.callback(one.kill)  # those that are left where one fails or takes too long
        for one, words in zip(running, commands, strict=True):
            if one.wait(SECONDS):
                raise subprocess.CalledProcessError(one.returncode, words)
    return objects


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why there is none. Silent but for a line at level DEBUG."""
    program = compiler()
    if program is None:
        why = "there is no C compiler (cc, gcc, clang, or what CC names)"
    else:
        try:
            found = ctypes.CDLL(str(build(program, cache_folder("native"))))
            for entry in (found.llmcompress_linear, found.llmcompress_grid, found.llmcompress_columns):
                entry.argtypes, entry.restype = (ctypes.c_char_p,), ctypes.c_int
        except (OSError, subprocess.SubprocessError) as error:
            why = f"{Path(program).name} did not compile it: {type(error).__name__}"
        else:
            return found, ""
    logging.getLogger("llmcompress").debug("no native kernels on CPU: %s", why)
    return None, why


@cache
def team() -> int:
    """Address of the function that runs work on the OpenMP threads torch already has, or 0."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError):
        return 0
