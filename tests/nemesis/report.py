"""The result of a campaign as a section of ``docs/reliability.md``."""

from __future__ import annotations

import datetime
import os
from collections import Counter

from tests.nemesis.campaign import Result


def describe(result: Result) -> str:
    """A table of what happened, then each violation."""
    plan, now = result.plan, datetime.datetime.now(tz=datetime.UTC)
    settled = "not in time" if result.settled is None else f"{result.settled:.0f} s"
    adaptations = sum(result.ends.values())
    rows = [
        ("measured", f"{now:%Y-%m-%d %H:%M} UTC, {os.cpu_count()} CPUs, seed {plan.seed}"),
        ("duration of the attack", f"{result.seconds:.0f} s"),
        ("trainers", f"{plan.fake} without a model, {plan.real} with one"),
        ("wrong clocks", "every second pair of trainers and one of two web processes, by an hour"),
        ("faults", f"{sum(result.faults.values())}: {_listed(result.faults)}"),
        ("crashes of trainers at a chosen moment", _listed(result.crashes)),
        ("on the trainers' network", _listed(result.network)),
        ("processes started again by the harness", str(result.restarts)),
        ("adaptations", f"{adaptations}: {_listed(result.kinds)}"),
        ("their ends", _listed(result.ends)),
        ("commands; changes applied", f"{result.commands}; {result.applied}"),
        ("answers to people", _listed(result.answers)),
        ("answers 500", str(len(result.errors))),
        ("all had an end after", settled),
        ("**violations**", f"**{len(result.violations)}**"),
    ]
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    found = ["", *(f"- {violation}" for violation in result.violations)]
    return "\n".join([*lines, *(found if result.violations else ()), *_quoted(result)])


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common() if count) or "–"


def _quoted(result: Result) -> list[str]:
    return [f"- answer 500: `{error}`" for error in result.errors[:5]]
