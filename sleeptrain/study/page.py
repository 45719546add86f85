"""A report as paragraphs, tables and figures, written as one HTML page and as Markdown."""

import html
from collections.abc import Sequence
from typing import NamedTuple

CSS = """
:root { --ink: #1c2733; --soft: #5b6b7b; --line: #dde3ea; --tint: #f5f8fb; --accent: #1f5fa8; }
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--ink);
       max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; }
.lead { font-size: 1.1rem; color: var(--soft); }
.verdict { background: var(--tint); border-left: 4px solid var(--accent);
           padding: .9rem 1.2rem .9rem 2.4rem; }
.verdict li { margin: .35rem 0; }
figure { margin: 1.4rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption, caption, .small { color: var(--soft); font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: 1rem 0;
        font-variant-numeric: tabular-nums; }
caption { text-align: left; caption-side: bottom; padding-top: .5rem; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
th { background: var(--tint); font-weight: 600; }
code { background: var(--tint); padding: .1rem .3rem; font-size: .88em; overflow-wrap: anywhere; }
"""


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Points(NamedTuple):
    """A list; as the verdict it stands out."""

    items: Sequence[str]
    is_verdict: bool = False


class Table(NamedTuple):
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


class Picture(NamedTuple):
    """A file beside the page. The caption says what it shows and in what units."""

    file: str
    caption: str


class Command(NamedTuple):
    """A line to type."""

    text: str


Part = Text | Points | Table | Picture | Command


class Section(NamedTuple):
    title: str
    parts: Sequence[Part]


class Page(NamedTuple):
    title: str
    lead: str
    sections: Sequence[Section]


def to_html(page: Page) -> str:
    """Self-contained but for the pictures beside it."""
    body = [f"<h1>{_escape(page.title)}</h1>", f'<p class="lead">{_escape(page.lead)}</p>']
    for section in page.sections:
        body += [f"<h2>{_escape(section.title)}</h2>"] if section.title else []
        body += [_html(part) for part in section.parts]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(page.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def to_markdown(page: Page) -> str:
    lines = [f"# {page.title}", "", page.lead, ""]
    for section in page.sections:
        lines += [f"## {section.title}", ""] if section.title else []
        for part in section.parts:
            lines += [*_markdown(part), ""]
    return "\n".join(lines).rstrip() + "\n"


def _html(part: Part) -> str:
    match part:
        case Text(text):
            return f"<p>{_prose(text)}</p>"
        case Points(items, is_verdict):
            entries = "".join(f"<li>{_prose(item)}</li>" for item in items)
            kind = "verdict" if is_verdict else "plain"
            return f'<ul class="{kind}">{entries}</ul>'
        case Table(headings, rows, caption):
            head = "".join(f"<th>{_escape(cell)}</th>" for cell in headings)
            lines = ("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
            told = f"<caption>{_escape(caption)}</caption>" if caption else ""
            table = f"<table>{told}<tr>{head}</tr>{''.join(lines)}</table>"
            return f'<div class="scroll">{table}</div>'
        case Picture(file, caption):
            image = f'<img src="{_escape(file)}" alt="{_escape(caption)}">'
            return f"<figure>{image}<figcaption>{_prose(caption)}</figcaption></figure>"
        case Command(text):
            return f"<p><code>{_escape(text)}</code></p>"


def _markdown(part: Part) -> list[str]:
    match part:
        case Text(text):
            return [text]
        case Points(items, _):
            return [f"- {item}" for item in items]
        case Table(headings, rows, caption):
            lines = [headings, ["---"] * len(headings), *rows]
            table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
            return [*table, *(["", caption] if caption else [])]
        case Picture(file, caption):
            return [f"![{caption}]({file})", "", caption]
        case Command(text):
            return ["```", text, "```"]


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


def _prose(text: str) -> str:
    """With `code` in backticks."""
    parts = _escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
