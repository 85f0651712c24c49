"""Fixtures: tiny random models of many families, a tiny tokenizer, and runs of the program."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forker

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other are no faster on two processors
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"
TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.\n"
    "def add(left, right):\n    return left + right\n\n"
    "It was a bright cold day in April, and the clocks were striking thirteen.\n"
)


def make_tokenizer(folder: Path, vocabulary: int = 96) -> None:
    """A byte-level tokenizer of a few dozen tokens; unknown bytes become one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(set(TEXT))[: vocabulary - 3]
    table = {word: place for place, word in enumerate(["<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)


def save_model(folder: Path, config: Any, *, shard_size: str = "200KB", seed: int = 0) -> Path:
    """A random model of a config, written as a Hugging Face directory with a tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    with torch.no_grad():  # norms and biases that are not their initial ones and zeros
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif "embed" not in name:
                parameter.mul_(3.0)
    model.save_pretrained(folder, max_shard_size=shard_size)
    make_tokenizer(folder)
    return folder


def llama_config(**changes: Any) -> Any:
    """A Llama small enough for a test and large enough for groups of 64."""
    from transformers import LlamaConfig

    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**(sizes | changes))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama directory; do not write into it."""
    return save_model(tmp_path_factory.mktemp("models") / "llama", llama_config())


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text enough for small calibrations."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 60, encoding="utf-8")
    return path


SMALL = (
    "--set", "calibration.samples=8", "--set", "calibration.sequence_length=32",
    "--set", "calibration.score_samples=4", "--set", "plan.bits=[2, 3, 4]",
)  # fmt: skip


def program(*words: str | Path) -> list[str]:
    """The command line of this interpreter's llmcompress."""
    return [sys.executable, "-m", "llmcompress", *map(str, words)]


def ended(words: list[str]) -> int:
    """The exit status of the program, run in this process."""
    from llmcompress.cli import main

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as end:
        main(words)
    for number, handler in before.items():
        signal.signal(number, handler)
    return int(end.value.code or 0)


@pytest.fixture(scope="session")
def forker() -> Iterator[Forker]:
    """What runs the program without importing everything anew."""
    found = Forker()
    yield found
    found.close()


@pytest.fixture
def run(tmp_path: Path, forker: Forker) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the program for real, in a process of its own and an empty folder."""

    def call(*words: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        given = {"cwd": tmp_path, "env": {}, "timeout": 240} | more
        changes = {key: value for key, value in given["env"].items() if os.environ.get(key) != value}
        return forker.run(words, given["cwd"], changes=changes, timeout=given["timeout"])

    return call


@pytest.fixture
def shared() -> Path:
    """Real trained models and text that may lie beside the project."""
    if not (SHARED / "models").is_dir():
        pytest.skip("the trained models are not beside this clone")
    return SHARED
