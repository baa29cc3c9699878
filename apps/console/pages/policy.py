"""The safety policy in force, and its versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from apps.accounts.models import User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations.selectors import closed_confidences, policy_standing
from apps.console.drawing import confidence_band
from apps.console.language import in_words
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.policies.models import PolicyState, PolicyVersion, Scope
from apps.policies.services import current_policy
from apps.runs.models import Run
from esper.contracts import RUN_ENDED, Risk, SafetyPolicy
from esper.policy.calibration import FEWEST_CASES, Bin, Calibration, calibration


@page
def policy(request: HttpRequest) -> HttpResponse:
    may_edit: Permission = may(person(request), Act.EDIT_POLICY)

    def current() -> dict[str, Any]:
        version = current_policy()
        values = version.safety_policy()
        return {
            "version": version,
            "policy": values,
            "thresholds": thresholds(values),
            "may_edit": may_edit,
            "risks": list(Risk),
            "band": confidence_band(values),
            "runs": Run.objects.exclude(state__in=RUN_ENDED).only("uid", "name")[:50],
        }

    panels = [
        Panel("current", _("In force"), "console/policy/current.html", current, ("policy",)),
        Panel(
            "calibration",
            _("Whether confidence is right"),
            "console/policy/calibration.html",
            calibration_context,
            ("policy", "adaptation"),
        ),
        Panel(
            "standing",
            _("Who decides"),
            "console/policy/standing.html",
            lambda: {"standing": policy_standing()},
            ("adaptation",),
        ),
        Panel(
            "drafts",
            _("Drafts"),
            "console/policy/drafts.html",
            lambda: {"drafts": drafts(person(request)), "may_edit": may_edit},
            ("policy",),
        ),
        Panel(
            "scopes",
            _("Projects and runs with a policy of their own"),
            "console/policy/scopes.html",
            lambda: {"scopes": narrower_scopes()},
            ("policy",),
        ),
        Panel(
            "history",
            _("Versions"),
            "console/policy/history.html",
            lambda: {"history": policy_history()},
            ("policy",),
        ),
    ]
    return render_page(
        request,
        "console/simple.html",
        title=_("Policy"),
        panels=panels,
        intro=_("Which change is approved by rule, waits for a person, or is refused."),
    )


@dataclass(frozen=True, slots=True)
class BinRow:
    """A bin of confidences, with its point in the diagram: 100 units wide and high."""

    of: Bin
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class ChoiceRow:
    """The closed cases of one blueprint."""

    slug: str
    found: Calibration
    said: float
    kept: float


def calibration_context() -> dict[str, Any]:
    """The installation's own closed cases, all and by blueprint."""
    closed = closed_confidences()
    found = calibration([said for _, said, _ in closed], [kept for _, _, kept in closed])
    return {
        "found": found,
        "fewest": FEWEST_CASES,
        "bins": [
            BinRow(b, 100 * b.said, 100 - 100 * b.came_true, 1.5 + 3 * b.cases / found.cases)
            for b in found.bins
        ],
        "choices": [_choice(slug, closed) for slug in sorted({slug for slug, _, _ in closed})],
    }


def _choice(slug: str, closed: Sequence[tuple[str, float, bool]]) -> ChoiceRow:
    said = [one for name, one, _ in closed if name == slug]
    kept = [one for name, _, one in closed if name == slug]
    return ChoiceRow(slug, calibration(said, kept), sum(said) / len(said), sum(kept) / len(kept))


@dataclass(frozen=True, slots=True)
class Threshold:
    """One threshold of the policy as its page shows it."""

    name: str
    group: str
    text: str
    unit: str
    value: Any
    kind: str  # number, whole, risk


# (group, meaning, unit). A test compares the names with the fields of SafetyPolicy.
THRESHOLD_NOTES: Mapping[str, tuple[str, str, str]] = {
    "confidence_refuse": (
        gettext_noop("Confidence"),
        gettext_noop("refuse below"),
        gettext_noop("0 to 1"),
    ),
    "confidence_auto": (
        gettext_noop("Confidence"),
        gettext_noop("approve automatically from"),
        gettext_noop("0 to 1"),
    ),
    "auto_max_risk": (
        gettext_noop("Confidence"),
        gettext_noop("highest risk that is approved automatically"),
        "",
    ),
    "min_cases_for_auto": (
        gettext_noop("Confidence"),
        gettext_noop("ended cases before medium risk is automatic"),
        "cases",
    ),
    "approvals_for_high_risk": (
        gettext_noop("Confidence"),
        gettext_noop("different people who approve a high risk"),
        "people",
    ),
    "cooldown_layer_steps": (
        gettext_noop("Cooldown"),
        gettext_noop("pause of a layer after a graft"),
        gettext_noop("steps"),
    ),
    "cooldown_run_steps": (
        gettext_noop("Cooldown"),
        gettext_noop("pause of a run after a graft"),
        gettext_noop("steps"),
    ),
    "cooldown_rollback_factor": (
        gettext_noop("Cooldown"),
        gettext_noop("factor for the pause after a rollback"),
        "×",
    ),
    "cooldown_refused_seconds": (
        gettext_noop("Cooldown"),
        gettext_noop("pause of a layer after a refusal"),
        "s",
    ),
    "max_in_flight_per_run": (
        gettext_noop("Limits"),
        gettext_noop("adaptations in progress in one run"),
        "",
    ),
    "max_plan_changes": (
        gettext_noop("Limits"),
        gettext_noop("changes that one plan may hold; 1: no plans"),
        "",
    ),
    "max_adaptations_per_day": (
        gettext_noop("Limits"),
        gettext_noop("grafts in one run per day"),
        "",
    ),
    "max_added_parameters_ratio": (
        gettext_noop("Limits"),
        gettext_noop("added parameters, share of the model's"),
        "×",
    ),
    "max_memory_mib": (gettext_noop("Limits"), gettext_noop("memory of one graft"), "MiB"),
    "max_latency_ms": (gettext_noop("Limits"), gettext_noop("forward time of one graft"), "ms"),
    "evidence_max_age_seconds": (
        gettext_noop("Limits"),
        gettext_noop("oldest evidence that is accepted"),
        "s",
    ),
    "approval_timeout_seconds": (
        gettext_noop("Time"),
        gettext_noop("a person's time to decide before it expires"),
        "s",
    ),
    "dispatch_timeout_seconds": (
        gettext_noop("Time"),
        gettext_noop("the trainer's time to answer"),
        "s",
    ),
    "maturity_steps": (
        gettext_noop("Probation"),
        gettext_noop("warm-up of a new graft; nothing of it counts"),
        gettext_noop("steps"),
    ),
    "probation_steps": (
        gettext_noop("Probation"),
        gettext_noop("taken out without a shown gain after"),
        gettext_noop("steps"),
    ),
    "probation_looks": (
        gettext_noop("Probation"),
        gettext_noop("evaluations with and without the graft, at most"),
        "",
    ),
    "probation_cost_ratio": (
        gettext_noop("Probation"),
        gettext_noop("share of the time for these evaluations"),
        gettext_noop("0 to 1"),
    ),
    "min_gain_ratio": (
        gettext_noop("Probation"),
        gettext_noop("smallest gain that matters, share of the loss"),
        gettext_noop("0 to 1"),
    ),
    "probation_timeout_seconds": (
        gettext_noop("Probation"),
        gettext_noop("rolled back without a verdict after"),
        "s",
    ),
    "max_loss_increase_ratio": (
        gettext_noop("Probation"),
        gettext_noop("harmful loss increase over the forecast"),
        gettext_noop("0 to 1"),
    ),
    "error_budget_ratio": (
        gettext_noop("Limits"),
        gettext_noop("error budget of a run, share of the loss"),
        gettext_noop("0 to 1"),
    ),
}


def thresholds(policy: SafetyPolicy) -> list[Threshold]:
    values = asdict(policy)
    groups = list(dict.fromkeys(group for group, *_ in THRESHOLD_NOTES.values()))
    shown = sorted(  # a group stands together, wherever its fields are declared
        (field for field in fields(SafetyPolicy) if field.name in THRESHOLD_NOTES),
        key=lambda field: groups.index(THRESHOLD_NOTES[field.name][0]),
    )
    return [
        Threshold(
            name=field.name,
            group=_(THRESHOLD_NOTES[field.name][0]),
            text=_(THRESHOLD_NOTES[field.name][1]),
            unit=in_words(THRESHOLD_NOTES[field.name][2]),
            value=values[field.name],
            kind={"int": "whole", "float": "number"}.get(str(field.type), "risk"),
        )
        for field in shown
    ]


@dataclass(frozen=True, slots=True)
class PolicyChange:
    """A version with its changes against the version before."""

    version: PolicyVersion
    changes: list[tuple[str, Any, Any]]


def policy_history() -> list[PolicyChange]:
    versions = list(PolicyVersion.objects.select_related("author")[:50])
    found = []
    for place, version in enumerate(versions):
        scope = (version.scope, version.target)
        earlier = [one for one in versions[place + 1 :] if one.state != PolicyState.WITHDRAWN]
        same = [one for one in earlier if (one.scope, one.target) == scope]
        wider = [one for one in earlier if one.scope == Scope.GLOBAL]
        found.append(PolicyChange(version, _changes(next(iter(same or wider), None), version)))
    return found


@dataclass(frozen=True, slots=True)
class BacktestRow:
    """How many past grafts get one answer, now and with a draft."""

    answer: str
    before: int
    after: int
    ends: str  # how those ended that would get this answer anew


@dataclass(frozen=True, slots=True)
class Draft:
    """A version that waits for a second person."""

    version: PolicyVersion
    changes: list[tuple[str, Any, Any]]
    rows: list[BacktestRow]
    own: bool  # the person who looks wrote it


ANSWERS = {
    "alone": gettext_noop("approved alone"),
    "asks": gettext_noop("a person is asked"),
    "refused": gettext_noop("refused"),
}


def drafts(viewer: User) -> list[Draft]:
    waiting = PolicyVersion.objects.filter(state=PolicyState.DRAFT).select_related("author")
    base = current_policy()
    return [
        Draft(
            version,
            _changes(_before(version, base), version),
            _rows(version.backtest),
            version.author_id == viewer.pk,
        )
        for version in waiting[:20]
    ]


def _before(version: PolicyVersion, base: PolicyVersion) -> PolicyVersion:
    same = PolicyVersion.objects.filter(
        scope=version.scope, target=version.target, state=PolicyState.IN_FORCE
    )
    return same.first() or base


def _rows(backtest: Mapping[str, Any]) -> list[BacktestRow]:
    if not backtest.get("cases"):
        return []
    return [
        BacktestRow(
            _(text),
            backtest["before"].get(answer, 0),
            backtest["after"].get(answer, 0),
            ", ".join(
                f"{count} {in_words(end.replace('_', ' '))}"
                for end, count in sorted(backtest["newly"].get(answer, {}).items())
            ),
        )
        for answer, text in ANSWERS.items()
    ]


@dataclass(frozen=True, slots=True)
class NarrowerScope:
    """A project or run with a policy of its own, and which of its values that sets."""

    version: PolicyVersion
    stricter: list[tuple[str, Any]]


def narrower_scopes() -> list[NarrowerScope]:
    rows = PolicyVersion.objects.filter(state=PolicyState.IN_FORCE).exclude(scope=Scope.GLOBAL)
    return [
        NarrowerScope(
            row,
            [(name, row.values[name]) for name, own in row.sources.items() if own == row.scope],
        )
        for row in rows.select_related("author")[:50]
    ]


def _changes(older: PolicyVersion | None, newer: PolicyVersion) -> list[tuple[str, Any, Any]]:
    if older is None:
        return []
    return [
        (name, older.values.get(name), value)
        for name, value in newer.values.items()
        if older.values.get(name) != value
    ]
