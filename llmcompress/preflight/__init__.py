"""Look at a model directory before any library opens it, and refuse what is wrong or unsafe, all faults at once.

transformers loads many damaged checkpoints without a word, follows `../` in an index and links wherever they lead; so
whatever it or we would read is validated here first, with the standard library alone. docs/inputs.md lists every rule.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from llmcompress.errors import Finding, InputError, Refused
from llmcompress.preflight.documents import (
    SETTINGS,
    check_config,
    check_settings,
    check_tokens,
    read_documents,
    vocabulary_of,
)
from llmcompress.preflight.fit import check_fit
from llmcompress.preflight.folder import check_folder
from llmcompress.preflight.header import TensorEntry
from llmcompress.preflight.installed import check_words
from llmcompress.preflight.weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    check_adapter,
    check_index,
    check_sizes,
    read_shards,
    shard_list,
)

MOST_FINDINGS = 1000


@dataclass(frozen=True)
class SourceFiles:
    """A validated model directory: its config, its shards, and where every tensor lies."""

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Paths of the shards."""
        return tuple(self.folder / name for name in self.shards)


def check_source(folder: Path, *, packed: bool = False) -> SourceFiles:
    """Validate a model directory. Raises Refused, an InputError, with every fault: the file and the remedy.

    With `packed` the directory may be already quantized (an output of ours is opened again).
    """
    if not folder.is_dir():
        raise InputError(f"{folder.name}: not a model directory", "give a directory with config.json and safetensors")
    findings: list[Finding] = []
    refused: set[str] = set()
    for name, finding in check_folder(folder):
        refused.add(name)
        findings.append(finding)
    documents, unread = read_documents(folder, refused)
    findings += [*unread, *_check_documents(folder, documents, refused, packed=packed)]
    config = documents.get("config.json")
    config = config if isinstance(config, dict) else {}
    shards: tuple[str, ...] = ()
    tensors: dict[str, TensorEntry] = {}
    try:
        shards, index = shard_list(folder, refused)
        tensors, broken = read_shards(folder, shards, refused, packed=packed)
        findings += broken
        if not broken and not refused & set(shards):
            findings += islice(_check_weights(config, index, tensors), MOST_FINDINGS)
    except InputError as error:
        findings += error.findings if isinstance(error, Refused) else [Finding(error.what, error.hint)]
    findings += check_adapter(folder, documents.get(f"{ADAPTER}/{ADAPTER_CONFIG}"), refused)
    if not findings:  # only then is it worth comparing the two
        findings += [*check_words(config), *islice(check_fit(config, tensors), MOST_FINDINGS)]
    if findings:
        raise Refused(findings[:MOST_FINDINGS])
    return SourceFiles(folder, config, shards, tensors)


def _check_documents(
    folder: Path, documents: Mapping[str, Any], refused: set[str], *, packed: bool
) -> Iterator[Finding]:
    config = documents.get("config.json")
    if config is None and not (folder / "config.json").exists() and "config.json" not in refused:
        yield Finding(f"{folder.name}: no config.json", "give a Hugging Face model directory")
    for name, document in documents.items():
        if any(fnmatchcase(name, pattern) for pattern in SETTINGS):
            yield from check_settings(name, document)
    if isinstance(config, dict):
        yield from check_config(config, packed=packed)
        vocabulary = vocabulary_of(config)
        if vocabulary is not None:
            yield from check_tokens(documents, vocabulary)


def _check_weights(
    config: Mapping[str, Any], index: Mapping[str, str] | None, tensors: Mapping[str, TensorEntry]
) -> Iterator[Finding]:
    if index is not None:
        yield from check_index(index, tensors)
    yield from check_sizes(config, tensors)
