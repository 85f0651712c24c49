"""`score`, `plan` and `--scores` as a person runs them."""

import json
import resource
import subprocess
import sys
import xml.etree.ElementTree as tree
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL
from synthetic_scores import make_file

Run = Callable[..., subprocess.CompletedProcess[str]]
QUICK = (*SMALL, "--set", "plan.trials=false", "--set", "quantizer=rtn")
HEAVY = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "huggingface_hub")


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """A score file of 80 blocks with 560 linears and four scorers."""
    path = tmp_path / "scores.json"
    path.write_text(make_file(80, head=True).model_dump_json())
    return path


@pytest.fixture(scope="module")
def scored(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A score file made from the tiny model on the small text, by two scorers."""
    folder = tmp_path_factory.mktemp("scored")
    words = ["score", llama, "--scorer", "lim", "--scorer", "fisher", "-o", "scores.json", "--pictures", "pictures"]
    command = [sys.executable, "-m", "llmcompress", *map(str, words), "--calibration", str(text_file), *QUICK]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    (folder / "stdout.txt").write_text(found.stdout)
    return folder


def test_planning_from_scores_is_light(scores: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom llmcompress.cli import cli\n"
        "cli.main(['plan', 'scores.json', '--budget', '3.5bits', '--frontier', '--pictures', 'p', '-o', 'plan.json'],"
        " standalone_mode=False)\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "sys.exit(','.join(heavy) or 0)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "plan.json").is_file()


def test_planning_560_linears_takes_two_seconds(scores: Path, run: Run) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = run("plan", "scores.json", "--budget", "3.5bits", "-o", "plan.json")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert found.returncode == 0, found.stderr
    # Time of the processor, not of the clock: the machine may be busy with other things.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 2.0


def test_a_plan_says_what_it_decided(scores: Path, run: Run, tmp_path: Path) -> None:
    found = run("plan", "scores.json", "--budget", "3.5bits", "-o", "plan.json", "--frontier")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert lines[0].split() == ["block", "q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"]
    assert [line.split()[0] for line in lines[1:82]] == [*map(str, range(80)), "head"]
    assert "the first in nats/token; --scorer takes rdp, voids, hessian instead" in found.stdout
    assert "nats/token expected, least possible" in found.stdout
    assert "measured damage needs the model" in found.stdout
    assert found.stdout.isascii()
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["scorer"], plan["unit"], plan["version"]) == ("fisher", "nats/token", 1)
    assert plan["bits_per_weight"] <= 3.5
    assert len(plan["assigned"]) == 560
    assert len(plan["frontier"]) > 10
    assert all(point["measured_kld"] is None for point in plan["frontier"])


def test_json_is_one_strict_document(scores: Path, run: Run) -> None:
    plain = json.loads(run("plan", "scores.json", "--budget", "3.5bits", "--json").stdout)
    assert set(plain) == {"allocation", "model", "scorer", "unit", "runtimes"}
    full = run("plan", "scores.json", "--budget", "3.5bits", "--json", "--frontier", "--pictures", "p", "-q")
    assert json.loads(full.stdout)["allocation"] == plain["allocation"]
    assert json.loads(full.stdout)["frontier"]
    assert full.stderr == ""


def test_another_scorer_can_be_asked_for(scores: Path, run: Run) -> None:
    found = run("plan", "scores.json", "--budget", "3.5bits", "--scorer", "hessian")
    assert "scorer      hessian, proxy loss\n" in found.stdout
    refused = run("plan", "scores.json", "--budget", "3.5bits", "--scorer", "zd")
    assert refused.returncode == 2
    assert "rdp, voids, fisher, hessian" in refused.stderr


def test_a_limit_of_damage_is_kept_by_the_plan_and_by_the_model_made_from_it(
    llama: Path, run: Run, tmp_path: Path
) -> None:
    words = (*SMALL, "--set", "calibration.samples=12", "--set", "plan.group_size=64")
    planned = run("plan", llama, "--budget", "kld<=0.2", *words, "--json")
    assert planned.returncode == 0, planned.stderr
    found = run("quantize", llama, "--budget", "kld<=0.2", *words, "-o", "out")
    assert found.returncode == 0, found.stderr
    plan = json.loads((tmp_path / "out" / "llmcompress.json").read_text())["plan"]
    assert plan["allocation"]["assigned"] == json.loads(planned.stdout)["allocation"]["assigned"]
    kept = [t for t in plan["trials"] if t["bits_per_weight"] == plan["allocation"]["bits_per_weight"]]
    assert all(t["upper"] <= 0.2 for t in kept)
    assert kept
    too_tight = run("quantize", llama, "--budget", "kld<=0.00001", *words, "-o", "none")
    assert too_tight.returncode == 2
    assert "cannot be met" in too_tight.stderr
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("scores.json", "--budget", "kld<=0.05"), "measured"),
        (("scores.json", "--budget", "ppl<=+2%"), "measured"),
        (("nothing.json", "--budget", "3bits"), "no such file"),
        (("scores.json", "--budget", "3bits", "--scores", "scores.json"), "--scores goes with a model"),
        (("scores.json", "--budget", "1bits"), "smallest possible"),
        (("scores.json", "--budget", "3bits", "--set", "plan.bits=[3]"), "its own settings"),
        (("scores.json", "--budget", "3bits", "--set", "plan.program=quadratic"), "needs the model"),
        (("scores.json", "--budget", "3bits", "--set", "plan.program=order"), "damages, not an importance"),
    ],
)
def test_bad_requests_are_refused(
    words: tuple[str, ...], expected: str, scores: Path, run: Run, tmp_path: Path
) -> None:
    found = run("plan", *words, "-o", "plan.json")
    assert found.returncode == 2
    assert expected in found.stderr
    assert "hint:" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "plan.json").exists()


def test_pictures_are_written_and_whole(scores: Path, run: Run, tmp_path: Path) -> None:
    found = run("plan", "scores.json", "--budget", "3.5bits", "--frontier", "--pictures", "deep/pictures")
    assert found.returncode == 0, found.stderr
    folder = tmp_path / "deep" / "pictures"
    assert {p.name for p in folder.iterdir()} == {"bits.svg", "sensitivity.svg", "frontier.svg", "index.html"}
    for path in folder.glob("*.svg"):
        assert tree.parse(path).getroot().get("role") == "img"
    page = (folder / "index.html").read_text()
    assert page.count("<svg") == 3
    assert page.count("<details>") == 3


def test_hostile_score_files_are_harmless(run: Run, tmp_path: Path) -> None:
    name = "../../x<img src=x onerror=alert(1)>\x1b[31m"
    file = make_file(3)
    renamed = tuple(scores.model_copy(update={"scorer": name}) for scores in file.scores[:2])
    (tmp_path / "scores.json").write_text(
        file.model_copy(update={"model": name, "scores": renamed}).model_dump_json()
    )  # fmt: skip
    found = run("plan", "scores.json", "--budget", "4bits", "--pictures", "p")
    assert found.returncode == 0, found.stderr
    assert "\x1b" not in found.stdout + found.stderr
    assert "<img" not in (tmp_path / "p" / "index.html").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"scores.json", "p"}


def test_score_prints_a_block_a_line(scored: Path) -> None:
    said = (scored / "stdout.txt").read_text()
    assert "lim: expected damage at 3 bits, unitless (every width with -v)" in said
    assert "fisher: expected damage at 3 bits, nats/token (every width with -v)" in said
    table = said.partition("fisher: ")[2].splitlines()[1:5]
    assert table[0].split() == ["block", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    file = json.loads((scored / "scores.json").read_text())
    layers = {x["linear"]: x for x in next(s for s in file["scores"] if s["scorer"] == "fisher")["layers"]}
    damage = next(c for c in layers["model.layers.2.mlp.down_proj"]["candidates"] if c["spec"]["bits"] == 3)["damage"]
    assert table[3].split()[0] == "2"
    assert table[3].split()[-1] == f"{damage:.3g}"
    assert "lim, by block" in said
    assert "…" not in said
    assert {p.name for p in (scored / "pictures").iterdir()} == {
        "sensitivity-lim.svg", "sensitivity-fisher.svg", "index.html"
    }  # fmt: skip


def test_score_draws_and_tells_paths_and_voids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from llmcompress.cli.say import Speaker
    from llmcompress.cli.scoring import _tell_scores
    from llmcompress.pictures.figures import score_figures

    file = make_file(8)
    names = [figure.name for figure in score_figures(file)]
    curves = [f"sensitivity-{name}" for name in ("rdp", "voids", "fisher", "hessian")]
    assert sorted(names) == sorted([*curves, "trajectory-rdp", "voids-voids"])
    for verbose in (False, True):
        for scores in file.scores:
            _tell_scores(file.trace, scores, Speaker(json=False, quiet=False, verbose=verbose))
        said = capsys.readouterr().out
        assert "breakpoints: 2 and 7, on a path from 0 (embedding) to 8" in said
        assert "prompt: block 1 (7%) is void for most tokens" in said
        assert "rdp, by point" in said
        assert "rdp, by block" in said
        assert ("selected raw" in said) == verbose
        assert ("model.layers.7.mlp.down_proj" in said) == verbose


def test_plan_takes_scores_that_fit_and_no_others(scored: Path, llama: Path, text_file: Path, run: Run) -> None:
    words = ("plan", llama, "--budget", "3.3bits", "--json", "--calibration", text_file, *QUICK)
    given = ("--scores", scored / "scores.json")
    fresh, reused = run(*words), run(*words, *given)
    assert reused.returncode == 0, reused.stderr
    assert "scoring" in fresh.stderr
    assert "scoring" not in reused.stderr
    assert json.loads(fresh.stdout) == json.loads(reused.stdout)
    other = run(*words, *given, "--scorer", "lim")
    assert json.loads(other.stdout)["unit"] == "unitless"
    refused = run(*words, *given, "--seed", "5", "--set", "plan.bits=[2, 3]")
    assert refused.returncode == 2, refused.stdout
    assert "other calibration text" in refused.stderr
    assert "other settings" in refused.stderr
    assert "other model" not in refused.stderr
    assert "hint:" in refused.stderr


def test_the_frontier_of_a_model_is_measured(scored: Path, llama: Path, text_file: Path, run: Run) -> None:
    words = ("plan", llama, "--budget", "3.3bits", "--frontier", "--calibration", text_file, *QUICK)
    found = run(*words, "--scores", scored / "scores.json", "--json")
    assert found.returncode == 0, found.stderr
    points = json.loads(found.stdout)["frontier"]
    assert len(points) > 2
    measured = [point["measured_kld"] for point in points]
    assert all(value > 0 for value in measured)
    assert measured[0] > measured[-1]


def test_quantize_takes_scores_that_fit_and_no_others(
    scored: Path, llama: Path, text_file: Path, run: Run, tmp_path: Path
) -> None:
    words = ("quantize", llama, "--budget", "3.3bits", "-o", "out", "--calibration", text_file, *QUICK)
    given = ("--scores", scored / "scores.json")
    refused = run(*words, *given, "--seed", "5")
    assert refused.returncode == 2
    assert "other calibration text" in refused.stderr
    assert list(tmp_path.iterdir()) == []
    done = run(*words, *given)
    assert done.returncode == 0, done.stderr
    assert "scoring" not in done.stderr
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("*.safetensors")}
    again = run(*words[:5], "again", *words[6:])
    assert again.returncode == 0, again.stderr
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "again").glob("*.safetensors")}
