"""From CUDA C++ to a function that can be launched: NVRTC and the driver, through their C interfaces.

Compiled code is kept under `~/.cache/llmcompress/kernels/nvrtc`, by a digest of source and definitions.
"""

import contextlib
import ctypes
import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from llmcompress.errors import MachineError
from llmcompress.files import cache_folder, commit_bytes, own_folder

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17", "-diag-suppress=177")
MOST_DYNAMIC_SHARED = 8  # of CUfunction_attribute
PROGRAMMATIC_SERIALIZATION = 6  # of CUlaunchAttributeID
Definitions = tuple[tuple[str, int], ...]
Given = ctypes.c_void_p | ctypes.c_int
PARTS = {"prefill": ("wgmma",), "decode": ("ring",), "twoterm": ("ring",)}  # beside `ptx` and `codes`
WARPGROUPS = ("prefill",)  # kernels of `wgmma.cu`, whose instructions no later compute capability has


@functools.lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """NVRTC, of the CUDA release PyTorch was built for, or any; None where there is none."""
    name = f"libnvrtc.so.{torch.version.cuda.partition('.')[0] if torch.version.cuda else '*'}"
    folders = sorted((Path(torch.__file__).parent.parent / "nvidia").glob(f"*/lib/{name}"))
    for path in [*map(str, folders), name]:
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else []:
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)  # NVRTC looks for it by its bare name
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    return None


def compiled(source: bytes, definitions: Mapping[str, int], architecture: str, nvrtc: ctypes.CDLL) -> bytes:
    """Machine code of `source` for `sm_90` or another. Raises MachineError with the compiler's words where it fails."""
    program = ctypes.c_void_p()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"kernel.cu", 0, None, None))
    try:
        options = [*OPTIONS, f"--gpu-architecture={architecture}", *(f"-D{k}={v}" for k, v in definitions.items())]
        listed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), listed):
            said = _text(nvrtc, program, "ProgramLog").decode(errors="replace")
            raise MachineError(f"a kernel does not compile: {said[:500]}", "LLMCOMPRESS_NVRTC=0 does without it")
        return _text(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    found = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, found))
    return found.raw


def _check(nvrtc: ctypes.CDLL, code: int) -> None:
    if code:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise MachineError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}", "LLMCOMPRESS_NVRTC=0 does without it")


def cached(source: bytes, definitions: Mapping[str, int], architecture: str, nvrtc: ctypes.CDLL) -> bytes:
    """The same, from the cache where it is there."""
    given = repr((OPTIONS, sorted(definitions.items()), architecture, torch.version.cuda)).encode()
    name = hashlib.sha256(source + given).hexdigest()[:32]
    try:
        path = own_folder(cache_folder("kernels", "nvrtc")) / f"{name}.cubin"
        if path.is_file():
            return path.read_bytes()
    except OSError:
        return compiled(source, definitions, architecture, nvrtc)
    made = compiled(source, definitions, architecture, nvrtc)
    with contextlib.suppress(MachineError):  # a cache that cannot be written is compiled for again
        commit_bytes(path, made)
    return made


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a number for what, and 64 bytes at 8 for its value."""

    _fields_ = (("what", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """Thread blocks, threads of each, and bytes of shared memory beyond those the kernel declares.

    early   the kernel may begin while the one before it in the stream still runs: it waits for that one itself
    """

    grid: tuple[int, int]
    threads: int
    shared: int = 0
    early: bool = False


class Function:
    """One kernel on one device."""

    def __init__(self, code: bytes, name: str) -> None:
        self._driver, self._shared = ctypes.CDLL("libcuda.so.1"), 0
        self._module, self._handle = ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cuModuleLoadData", ctypes.byref(self._module), code)
        self._do("cuModuleGetFunction", ctypes.byref(self._handle), self._module, name.encode())

    def _do(self, what: str, *given: object) -> None:
        code = getattr(self._driver, what)(*given)
        if code:
            raise MachineError(f"the GPU's driver: {what} returned {code}", "LLMCOMPRESS_NVRTC=0 does without it")

    def launch(self, how: Launch, given: list[Given]) -> None:
        """On PyTorch's current stream of the current device."""
        if how.shared > self._shared:
            self._do("cuFuncSetAttribute", self._handle, MOST_DYNAMIC_SHARED, how.shared)
            self._shared = how.shared
        places = (ctypes.c_void_p * len(given))(*(ctypes.addressof(value) for value in given))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = (*how.grid, 1, how.threads, 1, 1, how.shared)
        if not how.early:
            self._do("cuLaunchKernel", self._handle, *sizes, stream, places, None)
            return
        attribute = _Attribute(PROGRAMMATIC_SERIALIZATION, value=1)
        config = _Config(*sizes, stream, ctypes.pointer(attribute), 1)
        self._do("cuLaunchKernelEx", ctypes.byref(config), self._handle, places, None)


def source_of(name: str, folder: Path = FOLDER) -> bytes:
    """What a kernel is compiled from."""
    return b"".join((folder / f"{part}.cu").read_bytes() for part in ("ptx", "codes", *PARTS.get(name, ()), name))


@functools.lru_cache(maxsize=1024)
def function(name: str, definitions: Definitions, device: int) -> Function:
    """The kernel of the file `name`.cu, compiled for a device, which is the current one."""
    major, minor = torch.cuda.get_device_capability(device)
    nvrtc = library()
    if nvrtc is None:
        raise MachineError("NVRTC is not there", "install a CUDA build of PyTorch")
    architecture = f"sm_{major}{minor}{'a' if name in WARPGROUPS else ''}"
    return Function(cached(source_of(name), dict(definitions), architecture, nvrtc), name)
