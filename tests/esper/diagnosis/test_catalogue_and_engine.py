"""The catalogue is complete, and findings open, are updated and resolve."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from esper.contracts import Finding, Severity, wire
from esper.diagnosis import (
    Change,
    Diagnosis,
    Evidence,
    Memory,
    Observation,
    RemedySlug,
    Rule,
    Unknown,
    discover,
    get_rule,
    list_rules,
)
from esper.exceptions import ConfigurationError


@pytest.mark.parametrize("rule", list_rules(), ids=lambda rule: rule.slug)
def test_a_rule_says_what_a_person_needs(rule: Rule) -> None:
    assert rule.title
    assert rule.symptom.endswith(".")
    assert rule.false_alarm.endswith(".")
    assert rule.advice.endswith(".")
    assert rule.remedies
    assert set(rule.remedies) <= set(RemedySlug)
    assert all(limit.source and limit.unit for limit in rule.thresholds)
    assert get_rule(rule.slug) is rule


@pytest.mark.parametrize("rule", list_rules(), ids=lambda rule: rule.slug)
def test_a_rule_finds_nothing_where_nothing_was_measured(rule: Rule) -> None:
    diagnosis = Diagnosis([rule])
    for step in range(1, 60):
        assert diagnosis.check(Observation(step=step)) == []
    assert diagnosis.failed == {}


def test_a_file_with_another_rule_is_refused() -> None:
    module = ModuleType("esper.diagnosis.rules.something")
    with pytest.raises(ConfigurationError, match="something"):
        discover([module])


class Falling(Rule):
    """A loss below zero, for these tests."""

    slug = "falling"
    title = "Falling"
    symptom = "The loss is below zero."
    severity = Severity.CAUTION
    false_alarm = "None."
    advice = "Nothing."
    opens_after = 2
    closes_after = 2

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        loss = observation.loss
        return Evidence(f"the loss is {loss}", "0", began_at=f"layer {loss}") if loss < 0 else None


class Following(Falling):
    """A consequence of the other."""

    slug = "following"
    explained_by = frozenset({"falling"})


class Broken(Falling):
    """A rule with a bug."""

    slug = "broken"

    def check(self, observation: Observation, memory: Memory) -> Evidence | None:
        raise ZeroDivisionError("a bug")


def check(diagnosis: Diagnosis, step: int, loss: float | None) -> list[tuple[Change, str]]:
    losses = np.array([] if loss is None else [loss])
    seen = Observation(step=step, losses=losses, loss_steps=np.arange(len(losses)))
    return [(change, found.rule.slug) for change, found in diagnosis.check(seen)]


def test_a_finding_opens_is_updated_and_resolves_with_hysteresis() -> None:
    diagnosis = Diagnosis([Falling()])
    assert check(diagnosis, 1, -1.0) == []
    assert check(diagnosis, 2, -1.0) == [(Change.OPENED, "falling")]
    assert check(diagnosis, 3, -1.0) == []
    assert check(diagnosis, 4, -2.0) == [(Change.UPDATED, "falling")]
    (found,) = diagnosis.open
    assert (found.since_step, found.opened_step) == (1, 2)
    assert found.evidence.began_at == "layer -1.0"
    assert found.evidence.observed == "the loss is -2.0; it was first seen at layer -1.0"
    assert check(diagnosis, 5, 1.0) == []
    assert check(diagnosis, 6, -2.0) == []
    assert check(diagnosis, 7, 1.0) == []
    assert check(diagnosis, 8, 1.0) == [(Change.RESOLVED, "falling")]
    assert diagnosis.open == ()


def test_what_is_unknown_neither_opens_nor_resolves() -> None:
    diagnosis = Diagnosis([Falling()])
    check(diagnosis, 1, -1.0)
    check(diagnosis, 2, -1.0)
    for step in range(3, 20):
        assert check(diagnosis, step, None) == []
    assert len(diagnosis.open) == 1
    assert "no training loss" in diagnosis.unknown["falling"]


def test_a_consequence_is_not_reported_beside_its_cause() -> None:
    diagnosis = Diagnosis([Following(), Falling()])
    check(diagnosis, 1, -1.0)
    assert check(diagnosis, 2, -1.0) == [(Change.OPENED, "falling")]
    assert check(diagnosis, 3, -1.0) == []


def test_a_rule_that_fails_costs_no_other() -> None:
    diagnosis = Diagnosis([Broken(), Falling()])
    check(diagnosis, 1, -1.0)
    assert check(diagnosis, 2, -1.0) == [(Change.OPENED, "falling")]
    assert diagnosis.failed == {"broken": "ZeroDivisionError: a bug"}


def test_a_finding_crosses_the_wire_and_an_old_one_is_still_read() -> None:
    diagnosis = Diagnosis([Falling()])
    check(diagnosis, 1, -1.0)
    check(diagnosis, 2, -1.0)
    finding = diagnosis.open[0].finding()
    sent = wire.to_wire(finding)
    assert wire.from_wire(Finding, sent) == finding
    old = {k: sent[k] for k in ("rule", "layer", "severity", "observed", "limit", "remedy")}
    read = wire.from_wire(Finding, old)
    assert (read.slug, read.since_step, read.resolved_step, read.remedies) == ("", -1, -1, ())


def test_unknown_is_no_error_of_a_user() -> None:
    assert not issubclass(Unknown, ConfigurationError)
