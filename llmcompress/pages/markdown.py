"""The short form for the comment of a pull request: a table in Markdown, in which no name can act."""

from collections.abc import Sequence

from llmcompress.gate.formats import code, markdown
from llmcompress.pages.compare import differences, named, overview, warnings
from llmcompress.pages.figures import with_interval
from llmcompress.pages.reading import Run
from llmcompress.pages.verdict import judged


def run_markdown(run: Run, profile: str) -> str:
    """One run, judged by the limits of a profile. Raises InputError for an unknown one."""
    if run.report is None:
        return f"### llmcompress: {code(run.name)}, not evaluated yet\n"
    return markdown(run.report, judged(run, profile))


def comparison_markdown(runs: Sequence[Run]) -> str:
    """Several evaluated runs, two or more."""
    rows = named(runs)
    columns, cells = overview(rows)
    lines = [
        f"### llmcompress: {len(rows)} compressed models",
        "",
        f"| {' | '.join(columns)} |",
        f"|---|{'---:|' * (len(columns) - 1)}",
        *(f"| {code(row[0])} | {' | '.join(row[1:])} |" for row in cells),
        "",
    ]
    paired = differences(rows)
    if paired:
        lines += [f"| less the KL of {code(rows[0].name)} | nats/token | |", "|---|---:|---|"]
        lines += [f"| {code(d.name)} | {with_interval(d.kld, 5)} | {d.verdict} |" for d in paired]
        lines.append("")
    lines += [f"> **Warning:** {code(words)}" for words in warnings(rows)]
    return "\n".join(lines).rstrip() + "\n"
