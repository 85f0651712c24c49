"""Several runs: differences are paired, what cannot be compared is said, Markdown cannot be broken out of."""

import itertools
import json
import re
from pathlib import Path

import numpy
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from reader import check_harmless
from scipy import stats
from synthetic_reports import make_report, make_run
from test_pages import HOSTILE

from llmcompress.cli import cli
from llmcompress.errors import InputError
from llmcompress.eval.report import DataFacts, EvalReport, Footprint
from llmcompress.pages.compare import Named, comparison_page, differences, named, overview, warnings
from llmcompress.pages.markdown import comparison_markdown, run_markdown
from llmcompress.pages.reading import Run
from llmcompress.pictures.runs import Sized, dominated


def run_of(report: EvalReport) -> Run:
    return Run(report.model.name, Path(), report=report)


def elsewhere(report: EvalReport) -> EvalReport:
    data = DataFacts(**(report.data.model_dump() | {"tokens_digest": "other"}))
    return report.model_copy(update={"data": data})


def test_differences_are_those_of_the_pairs() -> None:
    one, other = make_report("one", mean=0.05, seed=1), make_report("other", mean=0.06, seed=2)
    found = differences([Named("one", one), Named("other", other)])[0]
    pairs = zip(other.per_sequence.kld, one.per_sequence.kld, strict=True)
    apart = numpy.asarray([float(a or 0) - float(b or 0) for a, b in pairs])
    low, high = stats.t.interval(0.95, len(apart) - 1, apart.mean(), stats.sem(apart))
    assert found.kld.mean == pytest.approx(apart.mean())
    assert (found.kld.low, found.kld.high) == pytest.approx((low, high))
    assert found.verdict == ("worse" if low > 0 else "better" if high < 0 else "no difference shown")


@pytest.mark.parametrize(("mean", "word"), [(0.2, "worse"), (0.01, "better"), (0.05, "no difference shown")])
def test_a_difference_counts_where_its_interval_leaves_zero(mean: float, word: str) -> None:
    rows = [Named("one", make_report(mean=0.05, seed=1)), Named("other", make_report(mean=mean, seed=2))]
    assert differences(rows)[0].verdict == word


def test_what_cannot_be_compared_is_not_and_is_said() -> None:
    one, other = make_report("one"), elsewhere(make_report("other"))
    rows = [Named("one", one), Named("other", other)]
    assert differences(rows) == []
    assert "other tokens" in warnings(rows)[0]
    html = comparison_page([run_of(one), run_of(other)])
    assert "cannot be compared" in check_harmless(html).text
    assert 'id="paired"' not in html
    assert 'id="paired"' in comparison_page([run_of(one), run_of(make_report("other", seed=3))])
    assert warnings([Named("a", one), Named("b", one)]) == []


def test_the_table_has_the_original_once_and_every_run() -> None:
    runs = [run_of(make_report(name, mean=mean)) for name, mean in (("a", 0.1), ("b", 0.2), ("a", 0.3))]
    rows = named(runs)
    assert [row.name for row in rows] == ["a (1)", "b", "a (2)"]
    columns, lines = overview(rows)
    assert [line[0] for line in lines] == ["original (original)", "a (1)", "b", "a (2)"]
    assert {len(line) for line in lines} == {len(columns)}
    assert lines[0][2:4] == ["16.000", "14.00 GB"]
    assert lines[0][-1] == lines[1][-1] == "62.5"


def test_a_model_of_fewer_blocks_is_compared_by_the_weights_of_the_original() -> None:
    """Half of the blocks removed, the rest as it was: half the bits of the original, whichever run comes first."""
    whole, half = make_report("whole"), make_report("half")
    sizes = half.footprint.model_dump() | {"shard_bytes": 7 * 10**9, "parameters": 35 * 10**8}
    sizes |= {"file_bits_per_weight": 16.0, "reference_parameters": 7 * 10**9}
    rows = [Named("half", half.model_copy(update={"footprint": Footprint(**sizes)})), Named("whole", whole)]
    for order in (rows, rows[::-1]):
        _, lines = overview(order)
        found = {line[0]: line[2] for line in lines}
        assert found == {"original (original)": "16.000", "half": "8.000", "whole": "3.429"}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8))
def test_a_dominated_model_has_one_that_is_smaller_or_better(found: list[tuple[int, int]]) -> None:
    rows = [Sized(str(k), float(bits), float(kld)) for k, (bits, kld) in enumerate(found)]
    hidden = dominated(rows)
    assert not all(hidden)
    for (k, one), (j, other) in itertools.permutations(enumerate(found), 2):
        if other[0] < one[0] and other[1] < one[1]:
            assert hidden[k]
        if hidden[k] and not hidden[j]:
            assert not (one[0] <= other[0] and one[1] < other[1])


def check_markdown(text: str) -> None:
    """Every name stands in `<code>`, spelled so that nothing in it acts; tables keep their columns."""
    outside = re.sub(r"<code>([^<>`|@\n]*)</code>", "", text)
    assert not set(outside) & set("<`@")
    assert not re.search(r"https?:|!\[|\]\(", text)
    columns = 0
    for line in text.splitlines():
        assert not line.startswith("::")
        if line.startswith("|"):
            assert columns in (0, line.count("|"))
        columns = line.count("|") if line.startswith("|") else 0


def test_markdown_cannot_be_broken_out_of() -> None:
    one, other = make_report("one", words=HOSTILE), elsewhere(make_report("other", words=HOSTILE))
    check_markdown(run_markdown(run_of(one), "standard"))
    check_markdown(comparison_markdown([run_of(one), run_of(other)]))
    check_markdown(comparison_markdown([run_of(one), run_of(make_report("third", words=HOSTILE))]))
    with pytest.raises(AssertionError):
        check_markdown("| a | <b> |")
    check_harmless(comparison_page([run_of(one), run_of(other)]))


def test_the_command_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, mean in (("a", 0.05), ("b", 0.1)):
        make_run(tmp_path / name, blocks=2, mean=mean)
    found = CliRunner().invoke(cli, ["report", "a", "b", "--json"], catch_exceptions=False)
    assert json.loads(found.stdout)["runs"] == ["a", "b"]
    assert "2 compressed models" in (tmp_path / "report.html").read_text()
    found = CliRunner().invoke(cli, ["report", "a", "b", "--md"], catch_exceptions=False)
    assert found.stdout.startswith("### llmcompress: 2 compressed models")
    found = CliRunner().invoke(cli, ["report", "a", "--md", "-o", "c.md"], catch_exceptions=False)
    assert (tmp_path / "c.md").read_text().startswith("### llmcompress")
    with pytest.raises(InputError, match="no such folder"):
        CliRunner().invoke(cli, ["report", "a", "-o", "nowhere/x.html"], catch_exceptions=False)
    (tmp_path / "b" / "report.json").unlink()
    with pytest.raises(InputError, match="not evaluated"):
        CliRunner().invoke(cli, ["report", "a", "b"], catch_exceptions=False)
