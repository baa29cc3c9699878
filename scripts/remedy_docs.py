"""Write ``docs/reference/remedies.md`` from the catalogue of remedies.

python -m scripts.remedy_docs            write
python -m scripts.remedy_docs --check    exit 1 where the file differs
"""

from __future__ import annotations

import sys
from pathlib import Path

from esper.diagnosis import list_rules
from esper.remedies import Remedy, list_remedies
from scripts.generated_page import write_or_check

TARGET = Path(__file__).resolve().parents[1] / "docs" / "reference" / "remedies.md"
HEADER = """# Remedies

Written by `python -m scripts.remedy_docs`; a test compares it with the code.

Each remedy is one file in `esper/remedies/catalog`. `session.remedy(name, layer, **settings)`
applies one between two steps and returns a receipt. `session.undo(receipt)` restores the run as it
was before, to the bit; `session.undo(receipt, hard=False)` only ends what the remedy does in each
step.

A remedy that answers an open [finding](findings.md) is applied by rule in the mode `automatic`, at
most twice for one kind of finding before a person is asked. In `supervised` it waits in
`session.proposed_remedies` for `session.approve`. In `observe` it only says what Esper would do.
"""


def render() -> str:
    """The whole file."""
    known = list_remedies()
    index = ["| remedy | risk | changes weights | what it is for |", "|---|---|---|---|"]
    index += [
        f"| [{r.slug}](#{r.slug}) | {r.risk} | {'yes' if r.changes_weights else 'no'} | {r.when} |"
        for r in known
    ]
    return "\n".join([HEADER, *index, "", *map(_section, known)])


def _section(remedy: Remedy) -> str:
    answers = [rule.slug for rule in list_rules() if remedy.slug in map(str, rule.remedies)]
    settings = ", ".join(f"`{name}={value}`" for name, value in remedy.default_config().items())
    scopes = {"run": "the whole run", "layer": "one layer", "both": "the whole run, or one layer"}
    lines = [
        f"## {remedy.slug}",
        "",
        f"**{remedy.title}** · for {scopes[remedy.scope]} · "
        f"{'in force until it is undone' if remedy.stays else 'changes the run once'}",
        "",
        remedy.idea,
        "",
        f"- For: {remedy.when}",
        f"- Settings: {settings or 'none'}",
        f"- Needs a batch of inputs: {'yes, `sample=`' if remedy.needs_sample else 'no'}",
        f"- Source: {remedy.source}",
    ]
    if answers:
        lines.append(f"- Answers: {', '.join(f'[{s}](findings.md#{s})' for s in answers)}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, render, __doc__))
