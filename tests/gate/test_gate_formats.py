"""Every format keeps its structure whatever a model, a task or a digest is called."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from gate_reports import HOSTILE, document, documents, report
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from llmcompress.eval.report import EvalReport
from llmcompress.files import to_json
from llmcompress.gate import formats
from llmcompress.gate.judge import judge
from llmcompress.gate.limits import Limits, read_limits
from llmcompress.gate.verdict import Verdict
from llmcompress.gate.words import LONGEST_NAME, tame

NAMES = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
STANDARD = read_limits(None, {})[0]


def judged(name: str, kld: float = 0.2) -> tuple[EvalReport, Verdict]:
    """A verdict in which everything a stranger can name is called `name`."""
    made = document(kld, name=name, documents={name: documents(1000, 10, 150, 500) | {"metric": name}})
    made["ref"] = {"name": name, "model_digest": name, "revision": None}
    found = EvalReport.parse(to_json(made), "r")
    return found, judge(found, STANDARD.model_copy(update={"expect": {"ref": "wanted"}}))


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(), max_size=200))
def test_tamed_text_is_one_printable_line_and_begins_no_command(name: str) -> None:
    found = tame(name)
    assert found.isprintable() or not found
    assert len(found) <= LONGEST_NAME
    assert "::" not in found
    assert "##[" not in found
    assert tame("org/model-7B_v1.5") == "org/model-7B_v1.5"


@settings(max_examples=30, deadline=None)
@given(NAMES)
def test_text_lines_are_printable_and_begin_with_our_words(name: str) -> None:
    _, verdict = judged(name)
    for line in formats.text(verdict):
        assert re.match(r"pass |FAIL|undecided |note |UNDECIDED: |PASS: |profile ", line)
        assert line.isprintable()
    assert any(tame(f"task {name}") in line for line in formats.text(verdict))


def decode(words: str) -> str:
    """What GitHub's runner makes of the escapes."""
    for code, letter in (("%0A", "\n"), ("%0D", "\r"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        words = words.replace(code, letter)
    return words


@settings(max_examples=30, deadline=None)
@given(NAMES)
def test_annotations_are_one_command_a_line(name: str) -> None:
    _, verdict = judged(name)
    lines = formats.github(verdict)
    assert len(lines) == 4  # the digest, KL, perplexity, the task
    for line in lines:
        found = re.fullmatch(r"::error title=([^:,\r\n]*)::([^\r\n]*)", line)
        assert found, line
        assert len(line.splitlines()) == 1
    assert decode(lines[3].split("::")[1].removeprefix("error title=")) == tame(
        f"llmcompress gate, {tame(f'task {name}')}"
    )


def test_annotations_are_ten_at_most_and_undecided_may_be_warnings() -> None:
    bad = {f"task{i}": documents(1000, 10, 150, 500) for i in range(20)}
    lines = formats.github(judge(report(0.2, documents=bad), STANDARD))
    assert len(lines) == formats.MOST_ANNOTATIONS
    assert "13 other checks" in lines[-1]
    undecided = judge(report(0.05), Limits(max_kld=0.05))
    assert formats.github(undecided)[0].startswith("::error ")
    assert formats.github(undecided, undecided="warning")[0].startswith("::warning ")
    assert "sequences are needed" in formats.github(judge(report(0.046, count=10), Limits(max_kld=0.05)))[0]
    assert formats.github(judge(report(0.01), STANDARD)) == ["::notice title=llmcompress gate::PASS: all 4 checks"]


@settings(max_examples=40, deadline=None)
@given(NAMES)
def test_junit_is_xml_with_one_case_for_each_check(name: str) -> None:
    _, verdict = judged(name)
    root = ElementTree.fromstring(formats.junit(verdict))
    cases = root.findall("testcase")
    assert len(cases) == int(root.get("tests", "0")) == len(verdict.conditions) + len(verdict.criteria)
    assert cases[-1].get("name") == tame(f"task {name}")
    assert len(root.findall("testcase/failure")) == int(root.get("failures", "0")) == 4
    assert {child.tag for case in cases for child in case} == {"failure", "system-out"}


def test_junit_says_error_or_skipped_for_undecided() -> None:
    verdict = judge(report(0.05), Limits(max_kld=0.05))
    assert ElementTree.fromstring(formats.junit(verdict)).get("errors") == "1"
    allowed = ElementTree.fromstring(formats.junit(verdict, undecided="skipped"))
    assert (allowed.get("errors"), allowed.get("skipped"), len(allowed.findall("testcase/skipped"))) == ("0", "1", 1)


class Page(HTMLParser):
    """Tags, their attributes, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.cells: list[str] = []
        self.rows: list[int] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.inside = True
            self.rows[-1] += 1
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells[-1] += data


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_markdown_renders_names_as_text(name: str) -> None:
    found, verdict = judged(name)
    page = Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(
        formats.markdown(found, verdict)))  # fmt: skip
    assert page.tags == {"h3", "p", "strong", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert page.attributes <= {"style"}
    assert set(page.rows) == {6, 2}
    assert page.rows.count(6) == 1 + len(verdict.conditions) + len(verdict.criteria)
    assert " ".join(tame(f"task {name}").split()) in [" ".join(cell.split()) for cell in page.cells]


def test_markdown_without_a_verdict_has_the_figures_alone() -> None:
    found = formats.markdown(report(0.02, documents={"arc": documents(10, 1, 2, 5)}), None)
    assert "0.02 [0.018, 0.022]" in found
    assert "0.7000 → 0.6000" in found
    assert "answer" not in found
    assert found.endswith("\n")


def test_a_step_summary_is_cut_at_a_line() -> None:
    made = report(0.02, documents={f"{'n' * 100}{i}": documents(8, 1, 1, 5) for i in range(4000)})
    summary = formats.step_summary(made, judge(made, STANDARD))
    assert len(summary.encode()) < 1 << 20
    assert "too long" in summary.splitlines()[-1]
    small = report(0.02)
    assert formats.step_summary(small, judge(small, STANDARD)) == formats.markdown(small, judge(small, STANDARD))


@pytest.mark.parametrize("name", HOSTILE)
def test_json_keeps_names_as_they_are(name: str) -> None:
    _, verdict = judged(name)
    assert Verdict.parse(to_json(verdict.model_dump(mode="json")), "verdict.json") == verdict
    assert verdict.model == name
