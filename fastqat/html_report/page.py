"""The page of a report: HTML and CSS without scripts, fonts or pictures from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1f2937; --soft: #6b7280; --line: #e5e7eb; --page: #ffffff; --bar: #fed7aa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --page: #111827; --bar: #7c2d12; }
}
body { font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 5rem; color: var(--ink); background: var(--page); }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 0.5rem; }
p { max-width: 44rem; margin: 0.5rem 0; }
.soft, caption { color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.875rem; }
caption { text-align: left; padding-bottom: 0.25rem; }
th { text-align: left; vertical-align: bottom; font-weight: 600; border-bottom: 1px solid var(--soft);
  max-width: 7rem; line-height: 1.3; }
td { white-space: nowrap; }
th, td { padding: 0.2rem 0.9rem 0.2rem 0.25rem; }
tbody tr:hover { background: color-mix(in srgb, var(--line) 50%, transparent); }
td { border-bottom: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; padding: 0.5rem; background: #ffffff; border: 1px solid var(--line); border-radius: 6px; }
figure img { display: block; width: 100%; height: auto; }
summary { cursor: pointer; color: var(--soft); }
li { margin: 0.25rem 0; max-width: 44rem; }
"""


@dataclass
class Section:
    """A part of a report.

    Args:
        title: its heading.
        body: HTML.
        pictures: PNG files, by name; the body refers to them by :func:`figure`.
    """

    title: str
    body: str
    pictures: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: what it shows.
        share: length of the bar behind it, 0..1; None has none.
    """

    text: str
    share: float | None = None


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return a whole HTML file.

    Args:
        title, subtitle: text.
        sections: in order.
    """
    body = "".join(f"<section>\n<h2>{escape(each.title)}</h2>\n{each.body}</section>\n" for each in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="soft">{escape(subtitle)}</p>\n{body}</body>\n</html>\n'
    )


def figure(png: bytes, text: str) -> str:
    """Return a picture that is part of the page.

    Args:
        png: its file.
        text: for those who do not see it.
    """
    data = base64.b64encode(png).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{escape(text)}"></figure>\n'


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>\n"


def bullets(texts: Sequence[str]) -> str:
    """Return a list of plain texts."""
    return "<ul>\n" + "".join(f"<li>{escape(text)}</li>\n" for text in texts) + "</ul>\n"


def folded(summary: str, body: str) -> str:
    """Return HTML that shows on a click.

    Args:
        summary: text that always shows.
        body: HTML.
    """
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>\n"


def table(heading: Sequence[str], rows: Sequence[Sequence[Cell | str]], texts: int = 1, caption: str = "") -> str:
    """Return a table; numbers are aligned at their right ends.

    Args:
        heading: one text per column.
        rows: as many cells each.
        texts: so many columns, from the left, hold text; the others numbers.
        caption: above it.
    """

    def cell(tag: str, column: int, content: Cell | str) -> str:
        content = content if isinstance(content, Cell) else Cell(content)
        kind = "" if column < texts else ' class="number"'
        if content.share is not None:
            length = f"{min(max(content.share, 0.0), 1.0):.1%}"
            kind += f' style="background: linear-gradient(to right, var(--bar) {length}, transparent {length})"'
        return f"<{tag}{kind}>{escape(content.text)}</{tag}>"

    def line(tag: str, cells: Sequence[Cell | str]) -> str:
        return "<tr>" + "".join(cell(tag, column, each) for column, each in enumerate(cells)) + "</tr>\n"

    title = f"<caption>{escape(caption)}</caption>\n" if caption else ""
    content = "".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll"><table>\n{title}<thead>\n{line("th", heading)}</thead>\n'
        f"<tbody>\n{content}</tbody>\n</table></div>\n"
    )
