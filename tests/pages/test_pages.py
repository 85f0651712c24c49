"""Pages about one run: every part appears with its data and only then; nothing in a name acts."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from reader import check_harmless, read
from synthetic_reports import make_plan, make_report, make_run, scored
from synthetic_scores import usage_series

from llmcompress.cli import cli
from llmcompress.cli.report import frontier_of
from llmcompress.errors import InputError
from llmcompress.files import to_json
from llmcompress.pages.reading import Run, read_run
from llmcompress.pages.single import run_page

HOSTILE = "<img src=x onerror=alert(1)></script></style>[red]\x1b[31m\n::error::\u202e\u2066`|@me&amp;\"'"
SECTIONS = (
    "gate", "tokens", "bits", "sensitivity", "frontier", "trials", "structure", "losses", "drift", "costs",
    "positions", "worst", "sampling", "tasks", "speed", "figures", "provenance",
)  # fmt: skip


def sections(html: str) -> list[str]:
    return [value for tag, name, value in read(html).attributes if (tag, name) == ("section", "id")]


def page_of(run: Run, **more: Any) -> str:
    return run_page(run, frontier=frontier_of(run), **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "made")


def test_every_part_is_there_when_its_data_are(folder: Path) -> None:
    html = page_of(read_run(folder))
    assert sections(html) == list(SECTIONS)
    page = check_harmless(html)
    assert page.headings[0] == "h1"
    assert page.headings.count("h1") == 1
    assert set(page.values("href")) == {f"#{word}" for word in SECTIONS}
    assert {"header", "nav", "main", "footer"} <= page.tags
    assert page.values("lang") == ["en"]


def test_behind_every_picture_is_a_table(folder: Path) -> None:
    figures = read(page_of(read_run(folder))).figures
    assert len(figures) == 13
    for figure in figures:
        assert figure["svg"] == figure["details"] == figure["table"] == figure["desc"] == 1
        assert figure["title"] >= 1
        assert figure["tr"] > 1


def lean(report: Any) -> Any:
    """As version 1 of the schema had it."""
    gone = {
        "tokens": None,
        "trajectory": (),
        "costs": (),
        "sampling": None,
        "speed": (),
        "tasks": {},
        "reference_tasks": {},
    }
    return report.model_copy(update=gone | {"documents": {}})


REMOVALS: dict[str, tuple[Callable[[Run], dict[str, Any]], set[str]]] = {
    "report": (lambda run: {"report": None},
               {"gate", "tokens", "drift", "costs", "positions", "worst", "sampling", "tasks", "speed", "figures"}),
    "lean report": (lambda run: {"report": lean(run.report)},
                    {"tokens", "drift", "costs", "positions", "worst", "sampling", "tasks", "speed"}),
    "plan": (lambda run: {"plan": None}, {"bits", "trials", "frontier"}),
    "scores": (lambda run: {"scores": None}, {"sensitivity", "frontier", "structure"}),
    "blocks": (lambda run: {"blocks": ()}, {"losses"}),
    "record": (lambda run: {"record": {}}, set()),
}  # fmt: skip


@pytest.mark.parametrize("what", REMOVALS)
def test_no_part_is_there_without_its_data(what: str, folder: Path) -> None:
    change, lost = REMOVALS[what]
    run = read_run(folder)
    left = Run(**({name: getattr(run, name) for name in Run.__dataclass_fields__} | change(run)))
    html = page_of(left)
    assert set(SECTIONS) - set(sections(html)) == lost
    check_harmless(html)


def test_the_first_screen_has_the_figures(folder: Path) -> None:
    run = read_run(folder)
    html = page_of(run)
    assert run.report is not None
    assert run.plan is not None
    top = read(html[html.index("<header") : html.index("</header>")]).text
    found = run.report.summary
    for words in (f"{found.kld.mean:.5f}", f"{found.kld.low:.5f} to {found.kld.high:.5f}", "3.00", "14.00 GB",
                  f"{run.plan.allocation.bits_per_weight:.3f}", run.report.command, "UNDECIDED"):  # fmt: skip
        assert words in top
    assert "UNDECIDED" not in page_of(run, profile="none")
    assert "PASS" in page_of(run, profile="aggressive")
    assert "FAIL" in page_of(run, profile="near-lossless")
    with pytest.raises(InputError, match="profile"):
        page_of(run, profile="strict")


def test_no_name_acts(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "made", words=HOSTILE))
    page = check_harmless(page_of(run))
    assert "<img src=x onerror=alert(1)>" in page.text
    assert "[U+202E]" in page.text
    assert "[U+001B]" in page.text


def test_the_harm_check_can_fail(folder: Path) -> None:
    html = page_of(read_run(folder))
    for bad in ("<script></script>", "<img src=x>", "<p onclick=x>", "<a href='http://x'>", "\u202e", "<p style=x>"):
        with pytest.raises(AssertionError):
            check_harmless(html.replace("</main>", f"{bad}</main>"))


def test_a_large_model_fits_and_its_linears_are_all_there(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / ("long-name-" * 12), blocks=80))
    html = page_of(run)
    assert len(html.encode()) < 2_000_000
    assert run.plan is not None
    assert len(run.plan.allocation.assigned) == 560
    for assigned in run.plan.allocation.assigned:
        assert html.count(f">{assigned.linear}</th>") == 2  # widths, losses


def test_what_is_not_finite_is_said(folder: Path) -> None:
    report = read_run(folder).report
    assert report is not None
    kld = (None, *report.per_sequence.kld[1:])
    broken = report.model_copy(update={
        "finite": False,
        "per_sequence": report.per_sequence.model_copy(update={"kld": kld}),
        "summary": report.summary.model_copy(update={"kld": report.summary.kld.model_copy(
            update={"mean": None, "low": None, "high": None})}),
    })  # fmt: skip
    text = check_harmless(run_page(Run("x", folder, report=broken))).text
    assert "FAIL" in text
    assert "Not finite." in text
    assert text.count("NaN") == 1  # the sentence about it


def test_what_one_folder_lacks_the_other_has(folder: Path, tmp_path: Path) -> None:
    out, beside = tmp_path / "out", tmp_path / "out-eval"
    out.mkdir()
    beside.mkdir()
    for name in ("llmcompress.json", "scores.json"):
        (out / name).write_bytes((folder / name).read_bytes())
    (beside / "report.json").write_bytes((folder / "report.json").read_bytes())
    for given in (out, beside, beside / "report.json"):
        run = read_run(given)
        assert run.report is not None
        assert run.blocks
        assert run.scores is not None
    other = json.loads((out / "llmcompress.json").read_text())
    other["plan"]["seed"] = 7
    (out / "llmcompress.json").write_text(json.dumps(other))
    assert read_run(out).report is None
    assert not read_run(beside).blocks


def test_a_pruned_model_shows_its_voids(tmp_path: Path) -> None:
    record = {"origin": {"model_digest": "reference"}, "series": [s.model_dump(mode="json") for s in usage_series(4)]}
    record["blocks"] = 4  # as many as the original had
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "pruning.json").write_text(json.dumps(record))
    (tmp_path / "pruned-eval").mkdir()
    (tmp_path / "pruned-eval" / "report.json").write_text(to_json(make_report("pruned").model_dump(mode="json")))
    html = page_of(read_run(tmp_path / "pruned"))
    assert "structure" in sections(html)
    assert "bits" not in sections(html)


def test_bits_are_drawn_from_the_names_in_a_report_alone(tmp_path: Path) -> None:
    plan = make_plan(scored(8))
    path = tmp_path / "report.json"
    path.write_text(to_json(make_report(plan=plan.model_dump(mode="json")).model_dump(mode="json")))
    html = page_of(read_run(path))
    assert "bits" in sections(html)
    for assigned in plan.allocation.assigned:
        assert f"<title>{assigned.linear}: {assigned.spec.bits} bits" in html


DAMAGE: dict[str, tuple[str, Callable[[str], str], str]] = {
    "report": ("report.json", lambda text: text.replace('"finite": true', '"finite": NaN'), "report.json"),
    "record": ("llmcompress.json", lambda text: "[]", "not an object"),
    "blocks": ("llmcompress.json", lambda text: text.replace('"proxy_loss": 1.0', '"proxy_loss": "x"', 1), "blocks"),
    "plan": ("llmcompress.json", lambda text: text.replace('"seed"', '"seeds"', 1), "seed"),
    "scores": ("scores.json", lambda text: text[:-9], "scores.json"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files_are_refused(what: str, folder: Path, tmp_path: Path) -> None:
    name, damage, word = DAMAGE[what]
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = (tmp_path / name).read_text()
    assert damage(before) != before
    (tmp_path / name).write_text(damage(before))
    with pytest.raises(InputError, match=word):
        read_run(tmp_path)


def test_where_there_is_nothing_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "x.json"):
        with pytest.raises(InputError):
            read_run(path)


def test_the_command_needs_no_torch(folder: Path, tmp_path: Path) -> None:
    """One real process with torch and transformers out of reach: a page, a comparison, Markdown."""
    code = f"""
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "safetensors"):
            raise ImportError(name)
sys.meta_path.insert(0, Wall())
from click.testing import CliRunner
from llmcompress.cli import cli
for words in (["{folder}", "-o", "one.html"], ["{folder}", "{folder}", "-o", "two.html"], ["{folder}", "--md"]):
    found = CliRunner().invoke(cli, ["report", *words], catch_exceptions=False)
    assert found.exit_code == 0, found.output
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.html", "two.html"]


def test_the_command_writes_beside_the_report(folder: Path) -> None:
    found = CliRunner().invoke(cli, ["report", str(folder), "--json"], catch_exceptions=False)
    document = json.loads(found.stdout)
    page = folder / "report.html"
    assert document == {"output": "report.html", "bytes": page.stat().st_size, "runs": [folder.name]}
    assert page.read_text().startswith("<!doctype html>")
