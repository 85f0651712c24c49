"""Pages in a real browser: quiet, offline, nothing wider than the window, every letter readable, light and dark."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import PROGRAM, Browser, browser
from synthetic_reports import make_run
from test_pages import HOSTILE, page_of

from llmcompress.pages.compare import comparison_page
from llmcompress.pages.reading import read_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium here")

# Of every text that is drawn: its contrast with the nearest background behind it, by the formula of WCAG 2.2.
CONTRAST = """
(() => {
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = c.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b };
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const behind = e => {
    if (e.namespaceURI.endsWith('svg')) {
      const cell = e.getAttribute('fill') && e.previousElementSibling;
      if (cell && cell.getAttribute('fill')) return parse(getComputedStyle(cell).fill).slice(0, 3);
      e = e.ownerSVGElement.parentElement;
    }
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || (c.length === 4 && c[3] > 0)) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    const style = getComputedStyle(e);
    if (!own || ['title', 'desc', 'style'].includes(e.localName) || style.visibility === 'hidden') continue;
    const ink = parse(e.localName === 'text' ? style.fill : style.color).slice(0, 3);
    const [a, b] = [light(ink), light(behind(e))].sort((x, y) => y - x);
    found.push([(a + .05) / (b + .05), e.localName + ' ' + e.textContent.slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
})()
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    runs = [make_run(folder / name, blocks=blocks, words=words, mean=mean)
            for name, blocks, words, mean in (("plain", 8, "", 0.05), ("hostile", 4, HOSTILE, 0.1))]  # fmt: skip
    found = {run.name: page_of(read_run(run)) for run in runs}
    found["comparison"] = comparison_page([read_run(run) for run in runs])
    for name, html in found.items():
        (folder / f"{name}.html").write_text(html)
    return {name: folder / f"{name}.html" for name in found}


@pytest.mark.parametrize("name", ["plain", "hostile", "comparison"])
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_quiet_offline_and_no_wider_than_the_window(
    name: str, dark: bool, width: int, pages: dict[str, Path], chromium: Browser
) -> None:
    address = pages[name].as_uri()
    chromium.look(width=width, dark=dark)
    chromium.open(address)
    assert chromium.complaints() == []
    assert chromium.requests() == [address]
    assert chromium.ask("document.documentElement.scrollWidth") <= width
    assert chromium.ask("document.querySelectorAll('script, img, iframe').length") == 0


@pytest.mark.parametrize("name", ["plain", "comparison"])
@pytest.mark.parametrize("dark", [False, True])
def test_every_letter_has_contrast(name: str, dark: bool, pages: dict[str, Path], chromium: Browser) -> None:
    chromium.look(width=1400, dark=dark)
    chromium.open(pages[name].as_uri())
    chromium.ask("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = chromium.ask(CONTRAST)
    assert len(found) > 50
    assert found[0][0] >= 4.5, found[:5]


@pytest.mark.parametrize("dark", [False, True])
def test_the_scheme_is_the_readers(dark: bool, pages: dict[str, Path], chromium: Browser) -> None:
    chromium.look(width=1400, dark=dark)
    chromium.open(pages["plain"].as_uri())
    paper = chromium.ask("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 24, 29)" if dark else "rgb(255, 255, 255)")
    ink = chromium.ask("getComputedStyle(document.querySelector('.llmc .ink')).fill")
    assert ink == ("rgb(230, 233, 238)" if dark else "rgb(27, 31, 36)")


def test_no_label_of_a_picture_covers_another(pages: dict[str, Path], chromium: Browser) -> None:
    chromium.look(width=1400)
    chromium.open(pages["plain"].as_uri())
    found = chromium.ask("""
    [...document.querySelectorAll('svg.llmc')].flatMap(s => {
      const boxes = [...s.querySelectorAll('text')].filter(t => getComputedStyle(t).visibility !== 'hidden')
        .map(t => [t.getBoundingClientRect(), t.textContent]);
      const bad = [];
      boxes.forEach(([a, one], k) => boxes.slice(k + 1).forEach(([b, other]) => {
        const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (w > 2 && h > 4) bad.push([s.querySelector('title').textContent, one, other]);
      }));
      return bad;
    })""")
    assert found == []


def test_printed_it_is_black_on_white_without_what_is_folded(pages: dict[str, Path], chromium: Browser) -> None:
    chromium.look(width=800, dark=True, medium="print")
    chromium.open(pages["plain"].as_uri())
    assert chromium.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert chromium.ask("getComputedStyle(document.querySelector('details')).display") == "none"
    assert chromium.ask("document.documentElement.scrollWidth") <= 800
