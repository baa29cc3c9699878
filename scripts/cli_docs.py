"""Write ``docs/reference/cli.md`` from the command ``esper``.

python -m scripts.cli_docs            write
python -m scripts.cli_docs --check    exit 1 where the file differs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from launcher.command import cli
from scripts.generated_page import write_or_check

TARGET = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"
WIDTH = 88
HEADER = """# Command line

Written by `python -m scripts.cli_docs` from the commands' own help. In a clone, `./up` creates
`.venv` and then runs `esper up`.
"""


def render() -> str:
    """The whole file."""
    parts = [HEADER]
    for context in _contexts(cli, "esper", None):
        if context.parent is not None:
            parts.append(f"## {context.command_path}\n")
        parts.append(f"```text\n{context.get_help()}\n```\n")
    return "\n".join(parts)


def _contexts(
    command: click.Command, name: str, parent: click.Context | None
) -> Iterator[click.Context]:
    """Of the command and of those below it."""
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    context.terminal_width = WIDTH
    yield context
    if isinstance(command, click.Group):
        for below in sorted(command.commands):
            if not command.commands[below].hidden:
                yield from _contexts(command.commands[below], below, context)


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, render, __doc__))
