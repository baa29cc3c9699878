"""Tables of text, for a terminal and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

Row = Sequence[str]


def aligned(rows: Sequence[Row], *, right: Collection[int] = ()) -> list[str]:
    """One line for each row.

    Args:
        rows: equally long, the header first.
        right: columns of numbers, which are aligned to the right.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [_line(row, widths, right) for row in rows]


def html_table(header: Row, rows: Iterable[Row]) -> str:
    """A table of escaped cells."""
    body = "".join(_html_row(row, "td") for row in rows)
    return f"<table><thead>{_html_row(header, 'th')}</thead><tbody>{body}</tbody></table>"


def html_list(title: str, lines: Iterable[str]) -> str:
    """A title and a list below it, escaped."""
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<p><b>{html.escape(title)}</b></p><ul>{items}</ul>"


def cut(text: str, longest: int) -> str:
    """The text on one line of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _line(row: Row, widths: Sequence[int], right: Collection[int]) -> str:
    cells = [
        cell.rjust(width) if column in right else cell.ljust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()


def _html_row(cells: Row, tag: str) -> str:
    inner = "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)
    return f"<tr>{inner}</tr>"
