"""Virtual environments of the peers, one each, over the packages of the interpreter that runs the benchmark.

    python bench/peers/venvs.py DIR [PEER ...]

A `.pth` file lets a peer's environment see the packages beside torch here, so that each holds only what it adds or
needs in another version. The editable llmcompress is not seen: its own `.pth` file is not read from there.
"""

import argparse
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

# What each peer needs beyond torch. Versions are pinned: figures belong to them.
PINS: dict[str, tuple[str, ...]] = {
    "auto_round": ("auto-round==0.16.1",),
    "gptqmodel": ("gptqmodel==7.6.0",),
    "llmcompressor": ("llmcompressor==0.14.0.1", "transformers==5.17.0"),
    "hqq": ("hqq==0.2.8.post1",),
    "bitsandbytes": ("bitsandbytes==0.50.2",),
    "quanto": ("optimum-quanto==0.2.7",),
    "torchao": ("torchao==0.18.0",),
}
BUILD = ("setuptools>=77", "wheel", "ninja")
BARE = ("gptqmodel",)  # builds from source and looks at the torch that is installed


def python_of(folder: Path, peer: str) -> Path:
    """The interpreter of a peer's environment."""
    return folder / peer / "bin" / "python"


def prepare(folder: Path, peers: Iterable[str]) -> None:
    """Make the environments that are not there yet. A finished one has a stamp with its pins."""
    for peer in peers:
        stamp = folder / peer / "pins.txt"
        wanted = "\n".join(PINS[peer]) + "\n"
        if not stamp.is_file() or stamp.read_text() != wanted:
            _make(folder, peer)
            stamp.write_text(wanted)


def _make(folder: Path, peer: str) -> None:
    began = time.monotonic()
    home = folder / peer
    print(f"{peer}: installing {' '.join(PINS[peer])} into {home}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    beside = sysconfig.get_paths()["purelib"]
    own = next(home.glob("lib/python3*/site-packages"))
    (own / "beside.pth").write_text(beside + "\n")
    limits = home / "constraints.txt"
    limits.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    pip = [str(python_of(folder, peer)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if peer in BARE:
        subprocess.run([*pip, "-c", str(limits), *BUILD], check=True)
        pip.append("--no-build-isolation")
    subprocess.run([*pip, "-c", str(limits), *PINS[peer]], check=True)
    print(f"{peer}: ready in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("peers", nargs="*", choices=[[], *PINS])
    options = parser.parse_args()
    prepare(options.folder, options.peers or PINS)
