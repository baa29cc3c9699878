"""Write ``docs/reference/findings.md`` from the rules of the diagnosis.

python -m scripts.rule_docs            write
python -m scripts.rule_docs --check    exit 1 where the file differs
"""

from __future__ import annotations

import sys
from pathlib import Path

from esper.diagnosis import RemedySlug, Rule, list_rules
from scripts.generated_page import write_or_check

TARGET = Path(__file__).resolve().parents[1] / "docs" / "reference" / "findings.md"
HEADER = """# Findings

Written by `python -m scripts.rule_docs`; a test compares it with the code.

Each rule of the diagnosis is one file in `esper/diagnosis/rules`. It reads what the session has
measured. What was not measured is unknown, and never a finding. A finding opens with its evidence,
is updated, and is resolved when the evidence is gone. `session.findings()` returns the open ones,
`session.findings(resolved=True)` those that are over.
"""


def render() -> str:
    """The whole file."""
    rules = list_rules()
    index = ["| rule | severity | symptom |", "|---|---|---|"]
    index += [f"| [{r.slug}](#{r.slug}) | {r.severity} | {r.symptom} |" for r in rules]
    known = ", ".join(f"`{remedy}`" for remedy in RemedySlug)
    remedies = f"Remedies, cheapest and most reversible first: {known}.\n"
    return "\n".join([HEADER, remedies, *index, "", *map(_section, rules)])


def _section(rule: Rule) -> str:
    pace = "in each step" if rule.every_step else "at the planned steps"
    lines = [
        f"## {rule.slug}",
        "",
        f"**{rule.title}** · {rule.severity} · checked {pace}, opens after {rule.opens_after}, "
        f"resolves after {rule.closes_after}",
        "",
        (rule.__doc__ or "").strip(),
        "",
        f"- Seen: {rule.symptom}",
        f"- To do: {rule.advice}",
        f"- Remedies: {', '.join(f'`{remedy}`' for remedy in rule.remedies)}",
        f"- A false alarm looks like: {rule.false_alarm}",
    ]
    if rule.explained_by:
        others = ", ".join(f"[{slug}](#{slug})" for slug in sorted(rule.explained_by))
        lines.append(f"- Not reported while one of these is open: {others}")
    lines += ["", "| limit | value | unit | source |", "|---|---|---|---|"]
    lines += [f"| {t.name} | {t.value:g} | {t.unit} | {t.source} |" for t in rule.thresholds]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, render, __doc__))
