"""Really trained models: orders that random weights cannot show."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.forked import Forker

Run = Callable[..., subprocess.CompletedProcess[str]]
SMALL = ("--set", "calibration.samples=48", "--set", "calibration.sequence_length=256")
FEW = ("--set", "calibration.samples=8", "--set", "calibration.sequence_length=128", "--set", "plan.bits=[3]")


def kl(run: Run, output: str, model: str | Path, *text: str | Path) -> float:
    found = run("eval", output, "--ref", model, "--samples", "24", "--sequence-length", "256", "--json", *text)
    assert found.returncode == 0, found.stderr
    return float(json.loads(found.stdout)["summary"]["kld"]["mean"])


def test_gptq_earns_its_keep_on_the_demo_model(run: Run) -> None:
    """At uniform 3 bits, same bytes: at most 0.6 of rounding's KL divergence."""
    for name in ("rtn", "gptq"):
        flags = ("--set", "plan.bits=[3]", "--set", f"quantizer={name}", "--set", "scorer=zd")
        found = run("quantize", "demo", "--budget", "4bits", "-o", name, *flags, *SMALL)
        assert found.returncode == 0, found.stderr
    assert kl(run, "gptq", "demo") <= 0.6 * kl(run, "rtn", "demo")


@pytest.mark.parametrize("name", ["tiny1m", "stories260k"])
def test_gptq_earns_its_keep_on_real_models(name: str, shared: Path, run: Run) -> None:
    model, stories = shared / "models" / name, shared / "data" / "tinystories"
    for quantizer in ("rtn", "gptq"):
        flags = ("--set", "plan.bits=[3]", "--set", f"quantizer={quantizer}", "--set", "scorer=zd")
        words = ("quantize", model, "--budget", "4bits", "-o", quantizer, "--calibration", stories / "train_part_b.txt")
        found = run(*words, *flags, *SMALL)
        assert found.returncode == 0, found.stderr
    text = ("--data", stories / "heldout.txt")
    assert kl(run, "gptq", model, *text) <= 0.85 * kl(run, "rtn", model, *text)


def test_calibrating_on_text_of_the_model_itself_works(run: Run) -> None:
    flags = ("--set", "calibration.samples=6", "--set", "calibration.sequence_length=48", "--set", "plan.bits=[4]")
    found = run("quantize", "demo", "--budget", "5bits", "-o", "out", "--calibration", "self", *flags)
    assert found.returncode == 0, found.stderr
    assert run("verify", "out").returncode == 0


@pytest.fixture(scope="module")
def nearest(tmp_path_factory: pytest.TempPathFactory, forker: Forker) -> float:
    """KL divergence of the demo model rounded to nearest at 3 bits."""

    def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
        return forker.run(words, folder)

    folder = tmp_path_factory.mktemp("nearest")
    found = run("quantize", "demo", "--budget", "8bits", "-o", "out", "--recipe", "fast", "--set", "plan.bits=[3]")
    assert found.returncode == 0, found.stderr
    return kl(run, "out", "demo")


@pytest.mark.parametrize("name", ["gptq", "signround", "adaround", "adaquant"])
def test_eight_sequences_do_no_harm(name: str, nearest: float, run: Run) -> None:
    """However little text there is, no method that reads it does worse on other text than rounding does."""
    flags = ("--set", f"quantizer={name}", "--set", "quantize.iterations=20", "--set", "calibration.batch_size=2")
    found = run("quantize", "demo", "--budget", "8bits", "-o", "out", *FEW, *flags)
    assert found.returncode == 0, found.stderr
    assert kl(run, "out", "demo") < nearest
