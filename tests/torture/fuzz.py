"""Coverage-guided fuzzing, by atheris, of what reads strangers' bytes.

    scripts/fuzz header|recipe|json [flags of libFuzzer, as -max_total_time=120]

Anything but a refusal or an answer that holds ends it with the input that did it, kept in a file by libFuzzer.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ModuleNotFoundError:
    sys.exit("error: atheris is not installed\n  hint: pip install atheris, in the environment that runs this")

with atheris.instrument_imports(include=["llmcompress", "json", "yaml"]):
    from llmcompress.errors import InputError
    from llmcompress.files import parse_json, parse_yaml, to_json
    from llmcompress.preflight.header import read_header
    from llmcompress.recipes import load_recipe, recipe_names, recipe_text

PLACE = Path(os.environ.get("FUZZ_FOLDER") or tempfile.mkdtemp(prefix="fuzz-"))  # libFuzzer ends without a finally
ENTRY = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"__metadata__":{"format":"pt"}}'


def header(data: bytes) -> None:
    """Tensors of a header that is taken cover the file."""
    path = PLACE / "x.safetensors"
    path.write_bytes(data)
    try:
        entries = read_header(path)
    except InputError:
        return
    if max((entry.stop for entry in entries), default=len(data)) != len(data):
        raise AssertionError("the tensors do not end with the file")


def recipe(data: bytes) -> None:
    """A recipe is taken or refused; so is YAML of any kind."""
    path = PLACE / "x.yaml"
    path.write_bytes(data)
    with contextlib.suppress(InputError):
        load_recipe(str(path))
    with contextlib.suppress(InputError):
        parse_yaml(data.decode(errors="replace"), "x")


def json(data: bytes) -> None:
    """What is taken as JSON can be written as JSON, and reads the same."""
    try:
        value = parse_json(data, "x")
    except InputError:
        return
    if parse_json(to_json(value), "x") != value:
        raise AssertionError("JSON does not survive being written out")


TARGETS: dict[str, Callable[[bytes], None]] = {"header": header, "recipe": recipe, "json": json}


def seeds(name: str) -> Path:
    """Good documents to begin from."""
    folder = PLACE / "seeds"
    folder.mkdir()
    if name == "recipe":
        for word in recipe_names():
            (folder / word).write_text(recipe_text(word)[0])
    elif name == "header":
        (folder / "one").write_bytes(len(ENTRY).to_bytes(8, "little") + ENTRY + bytes(16))
    else:
        (folder / "one").write_bytes(ENTRY)
    return folder


def main() -> None:
    """Fuzz what was named."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"error: {name or 'nothing'} to fuzz\n  hint: name one of {', '.join(TARGETS)}")
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(seeds(name))], TARGETS[name])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
