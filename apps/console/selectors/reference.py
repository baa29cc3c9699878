"""Catalogue, violations, policy and audit, as lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from django.core.paginator import Page, Paginator
from django.db.models import Avg, Count, Q, QuerySet

from apps.accounts.models import ApiToken, User
from apps.accounts.policy import IN_WORDS, Act, may
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.kernels.models import Kernel
from apps.policies.models import PolicyVersion
from apps.violations.models import Violation
from esper.contracts import AdaptationState, SafetyPolicy

PAGE_LENGTH = 50
_BAD_ENDS = (AdaptationState.ROLLED_BACK, AdaptationState.REVERTED, AdaptationState.ROLLBACK_FAILED)


def blueprints() -> QuerySet[Blueprint]:
    """The catalogue with each one's track record."""
    grafted = Q(adaptation__graft_step__isnull=False)
    return Blueprint.objects.annotate(
        used=Count("adaptation", filter=grafted),
        kept=Count("adaptation", filter=grafted & Q(adaptation__state=AdaptationState.KEPT)),
        lost=Count("adaptation", filter=grafted & Q(adaptation__state__in=_BAD_ENDS)),
        mean_reward=Avg("adaptation__reward"),
    )


def blueprint_uses(blueprint: Blueprint) -> list[Adaptation]:
    uses = Adaptation.objects.filter(blueprint=blueprint).select_related("run", "decided_by")
    return list(uses[:20])


def kernels_of(slug: str) -> list[Kernel]:
    return list(Kernel.objects.filter(blueprint_slug=slug)[:20])


@dataclass(frozen=True, slots=True)
class Right:
    """One act in words; ``note`` says where it ends, or whose it is."""

    words: str
    allowed: bool
    note: str = ""


def rights(user: User) -> list[Right]:
    return [_right(user, act) for act in Act]


def _right(user: User, act: Act) -> Right:
    anywhere, own = may(user, act), may(user, act, owner_id=user.pk)
    if anywhere.allowed:
        return Right(IN_WORDS[act], True, "" if own.allowed else "in the runs of others")
    if own.allowed:
        return Right(IN_WORDS[act], True, "in your own runs")
    return Right(IN_WORDS[act], False, anywhere.why)


@dataclass(frozen=True, slots=True)
class ViolationFilter:
    state: str = "open"  # open, acknowledged, all
    severity: str = ""
    rule: str = ""
    run: str = ""


def violations(chosen: ViolationFilter, page: int) -> Page[Violation]:
    rows = Violation.objects.select_related("run", "acknowledged_by")
    if chosen.state == "open":
        rows = rows.filter(acknowledged_at=None)
    elif chosen.state == "acknowledged":
        rows = rows.exclude(acknowledged_at=None)
    if chosen.severity:
        rows = rows.filter(severity=chosen.severity)
    if chosen.rule:
        rows = rows.filter(rule=chosen.rule)
    if chosen.run:
        rows = rows.filter(run__uid=chosen.run)
    return Paginator(rows, PAGE_LENGTH).get_page(page)


@dataclass(frozen=True, slots=True)
class AuditFilter:
    actor: str = ""
    act: str = ""
    object_uid: str = ""
    run: str = ""


def audit_events(chosen: AuditFilter, page: int) -> Page[AuditEvent]:
    """Newest first. The log only grows at its head, so its pages hold still below it."""
    rows = AuditEvent.objects.all()
    if chosen.actor:
        rows = rows.filter(actor__icontains=chosen.actor)
    if chosen.act:
        rows = rows.filter(act__startswith=chosen.act)
    if chosen.object_uid:
        rows = rows.filter(object_uid=chosen.object_uid)
    if chosen.run:
        rows = rows.filter(run_uid=chosen.run)
    return Paginator(rows, PAGE_LENGTH).get_page(page)


@dataclass(frozen=True, slots=True)
class Threshold:
    """One line of the policy; ``unit`` as people write it."""

    name: str
    group: str
    text: str
    unit: str
    value: Any
    kind: str  # number, whole, risk


# (group, what it does, unit); a test compares the names with the fields of SafetyPolicy.
THRESHOLD_NOTES: Mapping[str, tuple[str, str, str]] = {
    "confidence_refuse": ("Confidence", "refuse below", "0 to 1"),
    "confidence_auto": ("Confidence", "act alone from", "0 to 1"),
    "auto_max_risk": ("Confidence", "highest risk that may go alone", ""),
    "min_cases_for_auto": ("Confidence", "ended cases before medium risk may go alone", "cases"),
    "cooldown_layer_steps": ("Cooldown", "rest of a layer after a graft", "steps"),
    "cooldown_run_steps": ("Cooldown", "rest of a run after a graft", "steps"),
    "cooldown_rollback_factor": ("Cooldown", "longer rest after a rollback", "×"),
    "max_in_flight_per_run": ("Limits", "adaptations under way in one run", ""),
    "max_adaptations_per_day": ("Limits", "grafts in one run in a day", ""),
    "max_added_parameters_ratio": ("Limits", "added parameters, share of the model's", "×"),
    "max_memory_mib": ("Limits", "memory of one graft", "MiB"),
    "max_latency_ms": ("Limits", "forward time of one graft", "ms"),
    "evidence_max_age_seconds": ("Limits", "oldest evidence to decide on", "s"),
    "approval_timeout_seconds": ("Time", "a person has this long, then it expires", "s"),
    "dispatch_timeout_seconds": ("Time", "the trainer has this long to answer", "s"),
    "maturity_steps": ("Probation", "no verdict before", "steps"),
    "probation_steps": ("Probation", "verdict after", "steps"),
    "probation_timeout_seconds": ("Probation", "rolled back without a verdict after", "s"),
    "max_loss_increase_ratio": ("Probation", "harmful above, against the forecast", "0 to 1"),
}


def thresholds(policy: SafetyPolicy) -> list[Threshold]:
    values = asdict(policy)
    shown = [field for field in fields(SafetyPolicy) if field.name in THRESHOLD_NOTES]
    return [
        Threshold(
            name=field.name,
            group=THRESHOLD_NOTES[field.name][0],
            text=THRESHOLD_NOTES[field.name][1],
            unit=THRESHOLD_NOTES[field.name][2],
            value=values[field.name],
            kind={"int": "whole", "float": "number"}.get(str(field.type), "risk"),
        )
        for field in shown
    ]


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """A version with what it changed against the one before."""

    version: PolicyVersion
    changes: list[tuple[str, Any, Any]]


def policy_history() -> list[PolicyChange]:
    versions = list(PolicyVersion.objects.select_related("author")[:50])
    return [
        PolicyChange(version, _changes(older, version))
        for version, older in zip(versions, [*versions[1:], None], strict=True)
    ]


def _changes(older: PolicyVersion | None, newer: PolicyVersion) -> list[tuple[str, Any, Any]]:
    if older is None:
        return []
    return [
        (name, older.values.get(name), value)
        for name, value in newer.values.items()
        if older.values.get(name) != value
    ]


def tokens_of(user: User) -> list[ApiToken]:
    """A person's own tokens; those that a run got for itself are not theirs to handle."""
    return list(ApiToken.objects.filter(owner=user, run_uid="", revoked_at=None))
