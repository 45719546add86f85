"""A report as HTML and as Markdown."""

from html.parser import HTMLParser

from sleeptrain.study.page import Command, Page, Picture, Points, Section, Table, Text, to_html, to_markdown

PAGE = Page(
    "N < 4",
    "Does <b> matter?",
    [
        Section("", [Points(["one & two"], is_verdict=True)]),
        Section(
            "Figures", [Text('A "text".'), Picture("a.svg", "What it shows."), Command("python -m x a=1")]
        ),
        Section("Tables", [Table(["N", "a|b"], [["1", "2"], ["3", "4"]], "Below.")]),
    ],
)


class Structure(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.cells += tag == "td"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_closed_and_escaped() -> None:
    text, structure = to_html(PAGE), Structure()
    structure.feed(text)
    assert structure.open == []
    assert structure.cells == 4
    assert "N &lt; 4" in text
    assert "Does &lt;b&gt; matter?" in text
    assert 'alt="What it shows."' in text
    assert "http" not in text  # nothing is fetched


def test_markdown_has_all_of_it() -> None:
    text = to_markdown(PAGE)
    assert text.startswith("# N < 4\n")
    assert "| N | a\\|b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |" in text
    assert "![What it shows.](a.svg)" in text
    assert "```\npython -m x a=1\n```" in text
