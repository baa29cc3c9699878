"""Checks the rules, and keeps which of them hold: findings open, are updated, and resolve.

check       each rule reads the observation; what was not measured is unknown, never a finding
explain     evidence that another open finding explains is not reported twice
open        after the rule's number of checks in a row with evidence
update      the newest evidence of an open finding
resolve     after the rule's number of checks in a row without evidence
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from graphlib import TopologicalSorter

from esper.contracts import Finding, Severity
from esper.diagnosis.base import Evidence, Memory, RemedySlug, Rule
from esper.diagnosis.observation import Observation, Unknown
from esper.diagnosis.registry import list_rules
from esper.fail_closed import is_the_scripts

logger = logging.getLogger("esper")


class Change(StrEnum):
    """What became of a finding in one check."""

    OPENED = "opened"
    UPDATED = "updated"
    RESOLVED = "resolved"


@dataclass(frozen=True, slots=True)
class Diagnosed:
    """One finding of a rule.

    Attributes:
        rule: which.
        evidence: the newest.
        since_step: the first step of which it is known.
        opened_step: when it was found.
        resolved_step: when it was over; -1: it is open.
    """

    rule: Rule
    evidence: Evidence
    since_step: int
    opened_step: int
    resolved_step: int = -1

    @property
    def severity(self) -> Severity:
        return self.evidence.severity or self.rule.severity

    @property
    def remedies(self) -> tuple[RemedySlug, ...]:
        """Those that answer it, the mildest first."""
        return (RemedySlug.TELL,) if self.evidence.only_tell else tuple(self.rule.remedies)

    def finding(self) -> Finding:
        """As people, the page and the server get it."""
        return Finding(
            rule=self.rule.violation,
            layer=self.evidence.began_at,
            severity=self.severity,
            observed=self.evidence.observed,
            limit=self.evidence.limit,
            remedy=self.evidence.advice or self.rule.advice,
            slug=self.rule.slug,
            since_step=self.since_step,
            resolved_step=self.resolved_step,
            remedies=tuple(map(str, self.remedies)),
        )


@dataclass(slots=True)
class _State:
    memory: Memory = field(default_factory=Memory)
    with_evidence: int = 0
    without: int = 0
    first_step: int = 0
    diagnosed: Diagnosed | None = None


class Diagnosis:
    """The open findings of one run.

    Args:
        rules: those that are checked; None: the whole catalogue.

    Attributes:
        open: findings that are open, oldest first.
        unknown: slug -> why a rule could not be checked the last time.
        failed: rules that raised an error, and are not checked any more.
    """

    def __init__(self, rules: Iterable[Rule] | None = None) -> None:
        self._rules = causes_first(list_rules() if rules is None else rules)
        self._states = {rule.slug: _State() for rule in self._rules}
        self.open: tuple[Diagnosed, ...] = ()
        self.unknown: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    @property
    def is_unsure(self) -> bool:
        """A rule has seen a fault begin or end, and waits to see it again."""
        states = self._states.values()
        return any(s.with_evidence if s.diagnosed is None else s.without for s in states)

    def check(
        self, observation: Observation, *, every_step_only: bool = False
    ) -> list[tuple[Change, Diagnosed]]:
        """Checks the rules on what is known now.

        Args:
            every_step_only: only those that are checked in each step.
        """
        changes = []
        for rule in self._rules:
            if rule.slug in self.failed or (every_step_only and not rule.every_step):
                continue
            change = self._check(rule, observation)
            if change is not None:
                changes.append(change)
        if changes:
            self._list_open()
        return changes

    def _list_open(self) -> None:
        """At a change, because several parts ask in each step which findings are open."""
        found = [s.diagnosed for s in self._states.values() if s.diagnosed is not None]
        self.open = tuple(sorted(found, key=lambda diagnosed: diagnosed.opened_step))

    def _check(self, rule: Rule, observation: Observation) -> tuple[Change, Diagnosed] | None:
        state = self._states[rule.slug]
        state.memory.is_open = state.diagnosed is not None
        try:
            evidence = rule.check(observation, state.memory)
        except Unknown as reason:
            self.unknown[rule.slug] = str(reason)
            return None
        except Exception as error:
            if is_the_scripts(error):
                raise
            # One rule that fails must not cost the others.
            self.failed[rule.slug] = f"{type(error).__name__}: {error}"
            logger.debug("the rule %s failed", rule.slug, exc_info=error)
            return None
        self.unknown.pop(rule.slug, None)
        if evidence is None:
            return self._without(state, observation.step)
        if state.diagnosed is None and self._is_explained(rule):
            state.with_evidence = 0
            return None
        return self._with(rule, state, evidence, observation.step)

    def _is_explained(self, rule: Rule) -> bool:
        causes = (self._states[s].diagnosed for s in rule.explained_by if s in self._states)
        # A note may be there for another reason, and nothing answers it.
        return any(cause and cause.severity is not Severity.INFO for cause in causes)

    def _with(
        self, rule: Rule, state: _State, evidence: Evidence, step: int
    ) -> tuple[Change, Diagnosed] | None:
        state.without = 0
        if not state.with_evidence:
            state.first_step = step
        state.with_evidence += 1
        old = state.diagnosed
        if old is None:
            if state.with_evidence < rule.opens_after and not evidence.certain:
                return None
            since = state.first_step if evidence.since_step is None else evidence.since_step
            state.diagnosed = Diagnosed(rule, evidence, since, step)
            return Change.OPENED, state.diagnosed
        evidence = _from_where_it_began(evidence, old.evidence.began_at)
        if evidence == old.evidence:
            return None
        state.diagnosed = replace(old, evidence=evidence)
        return Change.UPDATED, state.diagnosed

    def _without(self, state: _State, step: int) -> tuple[Change, Diagnosed] | None:
        state.with_evidence = 0
        state.without += 1
        old = state.diagnosed
        if old is None or state.without < old.rule.closes_after:
            return None
        state.diagnosed = None
        return Change.RESOLVED, replace(old, resolved_step=step)


def _from_where_it_began(evidence: Evidence, began: str) -> Evidence:
    """Where it began stays as it was found: later it has often spread to other layers."""
    if not began or evidence.began_at == began:
        return evidence
    observed = evidence.observed
    if evidence.began_at:
        observed = f"{observed}; it was first seen at {began}"
    return replace(evidence, began_at=began, observed=observed)


def causes_first(rules: Iterable[Rule]) -> list[Rule]:
    """The rules in an order in which each one comes after those that explain it."""
    by_slug = {rule.slug: rule for rule in rules}
    graph = {slug: sorted(rule.explained_by) for slug, rule in sorted(by_slug.items())}
    order: Iterable[str] = TopologicalSorter(graph).static_order()
    return [by_slug[slug] for slug in order if slug in by_slug]
