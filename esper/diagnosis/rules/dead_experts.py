from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping

from esper.contracts import Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule, Threshold
from esper.diagnosis.facts import Gradients
from esper.diagnosis.observation import Observation, Unknown

READINGS = 8
STEPS = 35
SIBLINGS = 4


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
        if all(row.norm > 0 for row in readings[-1].rows):
            return None
        alive = [_alive(reading) for reading in readings]
        shapes = {tensor.name: tensor.shape for tensor in observation.tensors}
        groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
        for name, parts in sorted(_numbered(shapes).items()):
            if any(name in reading for reading in alive):
                groups[name.rpartition(".")[0], *parts].append(name)
        for (group, *_), names in groups.items():
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


def _numbered(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[tuple[object, ...]]]:
    """Numbered module -> its tensors' own names and shapes: equal ones are siblings."""
    found: dict[str, list[tuple[object, ...]]] = defaultdict(list)
    for name, shape in shapes.items():
        for module, rest in _modules_of(name):
            found[module].append((rest, *shape))
    return found


def _alive(reading: Gradients) -> dict[str, bool]:
    """Numbered module -> one of its tensors has a gradient above zero."""
    found: dict[str, bool] = {}
    for row in reading.rows:
        for name, _ in _modules_of(row.name):
            found[name] = found.get(name, False) or (not math.isnan(row.norm) and row.norm > 0)
    return found


def _modules_of(parameter: str) -> Iterator[tuple[str, str]]:
    """(numbered module, name in it) of each level: an expert may itself be a Sequential."""
    parts = parameter.split(".")
    for place, part in enumerate(parts[:-1]):
        if place and part.isdigit():
            yield ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])
