from __future__ import annotations

import math
import re
from collections import defaultdict

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.observation import Gradients, Observation, Unknown

READINGS = 8
STEPS = 40
SIBLINGS = 4
NUMBERED = re.compile(r"^(.*)\.(\d+)\.(.+)$")


class DeadExperts(Rule):
    """Some of several parallel modules are never chosen, so they do not learn."""

    slug = "dead_experts"
    title = "Dead experts"
    symptom = (
        "Some of several equal modules had no gradient at all in eight readings, the rest had one."
    )
    thresholds = (
        Threshold("readings without a gradient", READINGS, "in a row", "chosen"),
        Threshold("equal modules beside one another", SIBLINGS, "modules", "chosen"),
    )
    severity = Severity.CAUTION
    false_alarm = "Modules of which each serves one kind of batch that has not come for a while."
    advice = "Add a loss that balances the router, or noise to its choice."
    remedies = (RemedySlug.RECYCLE, RemedySlug.TELL)
    opens_after = 2

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        readings = list(observation.gradients)[-READINGS:]
        if len(readings) < READINGS or readings[-1].step - readings[0].step < STEPS:
            raise Unknown("too few readings of the gradients")
        alive = [_alive(reading) for reading in readings]
        members = {name for reading in alive for name in reading}
        groups: dict[str, list[str]] = defaultdict(list)
        for name in sorted(members):
            groups[name.rpartition(".")[0]].append(name)
        for group, names in groups.items():
            dead = [name for name in names if not any(reading.get(name) for reading in alive)]
            if len(names) < SIBLINGS or not dead or len(dead) == len(names):
                continue
            return Evidence(
                observed=f"{len(dead)} of {len(names)} modules of {group} had no gradient in "
                f"{READINGS} readings: {', '.join(d.rpartition('.')[2] for d in dead)}",
                limit="a gradient in each of them",
                signal="grad",
                value=len(dead) / len(names),
                began_at=dead[0],
                since_step=readings[0].step,
            )
        return None


def _alive(reading: Gradients) -> dict[str, bool]:
    """Numbered module -> one of its tensors has a gradient above zero."""
    found: dict[str, bool] = {}
    for row in reading.rows:
        match = NUMBERED.match(row.name)
        if match:
            name = f"{match[1]}.{match[2]}"
            found[name] = found.get(name, False) or (not math.isnan(row.norm) and row.norm > 0)
    return found
