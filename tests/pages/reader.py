"""A page as a parser sees it: elements, attributes, what each figure holds."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "nav", "main", "footer", "section", "figure"),
    *("details", "summary", "div", "p", "span", "b", "a", "h1", "h2", "h3", "ul", "ol", "li", "dl", "dt", "dd", "pre"),
    *("code", "mark", "table", "caption", "thead", "tbody", "tr", "th", "td"),
    *("svg", "desc", "text", "rect", "circle", "polyline", "polygon"),
}
UNSEEN = {chr(c) for c in (*range(9), *range(11, 32), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@dataclass
class Page(HTMLParser):
    """Collects what tests ask about."""

    tags: set[str] = field(default_factory=set)
    attributes: list[tuple[str, str, str]] = field(default_factory=list)
    headings: list[str] = field(default_factory=list)
    figures: list[dict[str, int]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag in ("h1", "h2", "h3"):
            self.headings.append(tag)
        if tag == "figure":
            self.figures.append({})
        if "figure" in self.open or tag == "figure":
            self.figures[-1][tag] = self.figures[-1].get(tag, 0) + 1
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def values(self, name: str) -> list[str]:
        """Every value of one attribute."""
        return [value for _, each, value in self.attributes if each == name]


def read(html: str) -> Page:
    """A parsed page."""
    page = Page()
    page.feed(html)
    page.close()
    return page


def check_harmless(html: str) -> Page:
    """Nothing runs, nothing is fetched, nothing changes how other text is seen."""
    page = read(html)
    assert page.tags <= TAGS, page.tags - TAGS
    names = {name for _, name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "style", "srcset", "action")}
    assert all(address.startswith("#") for address in page.values("href"))
    assert html.count("http") == html.count('xmlns="http://www.w3.org/2000/svg"') + 1  # http-equiv
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\"" in html
    assert not [
        c for c in html if ord(c) in (*range(0x202A, 0x202F), *range(0x2066, 0x206A)) or (c < " " and c != "\n")
    ]
    return page
