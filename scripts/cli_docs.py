"""Write ``docs/reference/cli.md`` from the command ``esper``.

python -m scripts.cli_docs            write
python -m scripts.cli_docs --check    exit 1 where the file differs
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from launcher.command import cli

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    text = render()
    if check:
        return int(text != TARGET.read_text(encoding="utf-8"))
    TARGET.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
