"""Answers in a terminal: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

Json = dict[str, Any]
_FILE_WIDTH = 240  # of what is not written to a terminal: nothing is cut off


def console() -> Console:
    """Of the present standard output; plain text where that is a file or a pipe."""
    terminal = sys.stdout.isatty()
    return Console(
        file=sys.stdout, width=None if terminal else _FILE_WIDTH, highlight=False, soft_wrap=True
    )


def print_json(data: Any) -> None:
    """One JSON document, indented."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_rows(
    rows: Iterable[Json], columns: Sequence[str], *, as_json: bool, empty: str, letter: str = ""
) -> None:
    """A list as a table with a column for each named member, or as a JSON list.

    Args:
        columns: names of members; ``name=title`` gives another heading.
        empty: what to print for people when there is no row.
        letter: of these objects, by which their number is a name: ``A`` of A-17.
    """
    found = list(rows)
    if as_json:
        print_json(found)
    elif not found:
        click.echo(empty)
    else:
        if letter:
            found = [{**row, "number": f"{letter}-{row['number']}"} for row in found]
        console().print(table(found, columns))


def table(rows: Iterable[Json], columns: Sequence[str]) -> Table:
    """One row for each object; the columns as in :func:`print_rows`."""
    named = [column.partition("=") for column in columns]
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, _, title in named:
        made.add_column(title or name.replace("_", " "), overflow="fold")
    for row in rows:
        made.add_row(*(Text(shown(row.get(name))) for name, _, _ in named))
    return made


def print_members(data: Json, names: Sequence[str], *, exact: bool = False) -> None:
    """The named members of one object that have a value, one a line.

    Args:
        exact: print the names as they are, for what a person has to type again.
    """
    grid = Table.grid(padding=(0, 2))
    for name in names:
        if data.get(name) not in (None, "", [], {}):
            word = name if exact else name.replace("_", " ")
            grid.add_row(Text(word, style="bold"), Text(shown(data[name])))
    console().print(grid)


def shown(value: Any) -> str:
    """A member for people: times as a short UTC time, nothing as a dash."""
    if value in (None, "", [], {}):
        return "–"
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(shown(item) for item in value)
        case dict():
            return ", ".join(f"{name}={shown(item)}" for name, item in value.items())
    moment = _moment(str(value))
    return f"{moment:%m-%d %H:%M:%S}" if moment else str(value)


def _moment(text: str) -> datetime | None:
    if len(text) < 20 or text[4:5] != "-" or text[10:11] != "T":
        return None
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except ValueError:
        return None
