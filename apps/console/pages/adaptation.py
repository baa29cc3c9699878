"""One adaptation's page: before, during and after the decision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db.models import Q, QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import gettext_noop

from apps.accounts.models import User
from apps.adaptations import services as adaptations
from apps.adaptations.models import Adaptation, Remedy, ShadowTrial
from apps.adaptations.selectors import running_test
from apps.audit.models import AuditEvent
from apps.blueprints.models import KnownRemedy
from apps.console.curves import decision_curves, expected, probation
from apps.console.drawing import Bar, Fall, Sketch, signed_bar, sketch, waterfall
from apps.console.language import as_written
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.kernels.selectors import speed_up_of
from apps.notifications.services import run_topic
from apps.rest.problems import Problem
from apps.runs.models import Command
from apps.violations.models import Violation
from esper.contracts import SIGNAL_NOTES, AdaptationState, RejectReason, Signal
from esper.contracts.percent import signed

_A = AdaptationState
EVENTS = ("adaptation", "run.command", "switch", "freeze", "remedy", "kernel")


@page
def adaptation(request: HttpRequest, uid: str) -> HttpResponse:
    found = get_adaptation(uid)
    if found is None:
        raise Http404("there is no such adaptation")
    return render_page(
        request,
        "console/adaptation.html",
        title=f"A-{found.number}",
        panels=_adaptation_panels(person(request), found),
        topics=[run_topic(found.run.uid)],
        adaptation=found,
        run=found.run,
    )


def _adaptation_panels(user: User, found: Adaptation) -> list[Panel]:
    shown = _panels_of_all(user, found)
    if found.remedy:
        return [*shown, *_panels_of_remedy(found)]
    return [*shown, *_panels_of_graft(user, found)]


def _panels_of_all(user: User, found: Adaptation) -> list[Panel]:
    live, pending = _pace(found), found.state == AdaptationState.AWAITING_APPROVAL
    return [
        _panel("head", _("Adaptation"), lambda: {"steps_ago": _steps_ago(found)}, live),
        _panel("curves", _("Around the question"), lambda: _curves(found), live),
        _panel("checks", _("Checks"), lambda: _checks(found)),
        _panel("undo", _("Undo plan"), lambda: _undo(found), fold=pending),
        _panel("progress", _("Progress and history"), lambda: _course(found), fold=pending),
        _panel("acts", _("Your decision"), lambda: _acts(found, user), live),
        _panel("more", _(MORE), lambda: _more(found, user) if pending else {}, fold=True),
        # Also while it waits: an open page shows what comes of it without being loaded again.
        _panel("outcome", _("Outcome"), lambda: _outcome(found), fold=pending),
    ]


def _panels_of_remedy(found: Adaptation) -> list[Panel]:
    title = _("What was found") if found.found else _("Why it was asked for")
    return [
        _panel("why", title, lambda: _finding_of(found), _pace(found), template="finding"),
        _panel("change", _("What changes"), lambda: _remedy_of(found), template="remedy"),
    ]


def _panels_of_graft(user: User, found: Adaptation) -> list[Panel]:
    live, pending = _pace(found), found.state == AdaptationState.AWAITING_APPROVAL
    shown = [
        _panel("why", _("Why it was proposed"), lambda: reasons_context(found.reasons)),
        _panel("change", _("What changes"), lambda: _graft_of(found)),
        _panel("evidence", _("Evidence: at proposal and now"), lambda: _evidence(found), live),
        _panel("forecast", _("If approved, if rejected"), lambda: {"expected": expected(found)}),
        _panel("shadow", _("In shadow"), lambda: shadow_context(found, user), live),
        _panel("whynot", _("Why not another blueprint"), lambda: rivals(found), fold=pending),
    ]
    if found.graft_step is not None:
        shown.append(_panel("probation", _("Probation"), lambda: _probation(found), live))
    return shown


def _panel(
    name: str,
    title: str,
    build: Callable[[], dict[str, Any]],
    every: int = 0,
    *,
    fold: bool = False,
    template: str = "",
) -> Panel:
    path = f"console/adaptation/{template or name}.html"
    return Panel(name, title, path, build, EVENTS, every, fold)


def _pace(found: Adaptation) -> int:
    """Seconds between two fetches of what changes by itself."""
    return 0 if found.ended else 5


def _curves(found: Adaptation) -> dict[str, Any]:
    return {"curves": decision_curves(found)}


def _undo(found: Adaptation) -> dict[str, Any]:
    return {"plan": adaptations.undo_plan(found)}


def _course(found: Adaptation) -> dict[str, Any]:
    """What has happened to it so far."""
    events = history(found)
    return {
        "stages": stages(found, events),
        "events": events,
        "remedies": remedies_of(found),
        "speed_up": speed_up_of(found.uid),
    }


def _graft_of(found: Adaptation) -> dict[str, Any]:
    policy = found.safety_policy.safety_policy()
    return {
        "sketch": graft_sketch(found),
        "policy": policy,
        "most_parameters": policy.most_added_parameters(found.run.model_parameters),
        "record": track_record(grafts_of(found.grafted_blueprint.pk)),
        "pause": adaptations.pause_forecast(found),
        "parameter_share": _share(found.forecast_parameters, found.run.model_parameters),
    }


def _evidence(found: Adaptation) -> dict[str, Any]:
    now = adaptations.evidence_now(found)
    drift = adaptations.evidence_drift(found)
    if drift is not None and math.isinf(drift):  # the loss is no longer a number
        drift = 99.0
    return {
        **evidence_parts(found, now),
        "derived": derived_numbers(found.evidence),
        "drift": drift,
        "drift_width": 0 if drift is None else min(100, round(100 * drift)),
        "now_step": now.get("step"),
        "decided": found.decided_evidence is not None,
    }


def shadow_context(found: Adaptation, user: User) -> dict[str, Any]:
    """What trials on copies of the run have shown, and whether this person may ask for one."""
    permission = adaptations.may_shadow(found, user)
    smallest = found.safety_policy.safety_policy().min_gain_ratio
    return {
        "trials": [(trial, told_by(trial, smallest)) for trial in adaptations.trials_of(found)],
        "may_shadow": permission.allowed,
        "sizes": list(adaptations.waiting_variants(found)) if permission.allowed else [],
        "why": "" if permission.code == "decision-not-pending" else permission.why,
    }


def _gain(share: float) -> str:
    return as_written(signed(share))


def told_by(trial: ShadowTrial, smallest: float) -> tuple[str, str]:
    """What a trial has shown, in two parts: the answer and the numbers; empty before its end."""
    if trial.state != "done":
        return "", ""
    gain = _("unknown") if trial.gain is None else _gain(trial.gain)
    if trial.low is None or trial.high is None:
        return _("Nothing is shown:"), _(
            "gain of the held-out loss %(gain)s, too few looks to bound it"
        ) % {"gain": gain}
    answer = _("Nothing is shown:")
    if trial.low > smallest:
        answer = _("It helps:")
    elif trial.high < smallest:
        answer = _("It does not help:")
    return answer, _("gain of the held-out loss %(gain)s (95%%: %(low)s to %(high)s)") % {
        "gain": gain,
        "low": _gain(trial.low),
        "high": _gain(trial.high),
    }


MORE = gettext_noop("Dry run, edit, assign, snooze")
SNOOZE_MINUTES = (5, 10, 30, 60, 240)


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that the approver may change; ``kind`` is number, flag or text."""

    name: str
    value: Any

    @property
    def kind(self) -> str:
        if isinstance(self.value, bool):
            return "flag"
        return "number" if isinstance(self.value, int | float) else "text"

    @property
    def shown(self) -> str:
        """As it is typed, without separators."""
        if isinstance(self.value, bool):
            return _("yes") if self.value else _("no")
        return str(self.value)


def _more(found: Adaptation, user: User) -> dict[str, Any]:
    """The ways to decide besides yes and no."""
    try:
        dry = adaptations.dry_run(found, user)
    except Problem:  # the catalogue has lost the remedy
        dry = None
    rows = check_rows([asdict(check) for check in dry.checks]) if dry else []
    left = found.deadline_at - timezone.now() if found.deadline_at else None
    return {
        **_acts(found, user),
        "settings": [Setting(*pair) for pair in adaptations.editable_settings(found).items()],
        "dry": dry,
        "rows": rows,
        "failing": [row for row in rows if row.verdict != "passed"],
        "approvers": adaptations.approvers_of(found),
        "snoozed_until": adaptations.snoozed_until(found, user),
        "snooze_choices": [
            minutes
            for minutes in SNOOZE_MINUTES
            if left is None or timedelta(minutes=minutes) < left
        ],
    }


def _probation(found: Adaptation) -> dict[str, Any]:
    return {"probation": probation(found), "test": running_test(found)}


def _checks(found: Adaptation) -> dict[str, Any]:
    rows = check_rows(found.checks)
    return {
        "rows": rows,
        "open_rows": [row for row in rows if row.verdict != "passed"],
        "passed": [row for row in rows if row.verdict == "passed"],
    }


RIVALS_SHOWN = 3
REASONS_SHOWN = 5
EVIDENCE_SHOWN = 7


def rivals(found: Adaptation) -> dict[str, Any]:
    """The blueprints that were considered first, and the others to unfold."""
    return {"rivals": found.why_not[:RIVALS_SHOWN], "others": found.why_not[RIVALS_SHOWN:]}


def _finding_of(found: Adaptation) -> dict[str, Any]:
    """The finding as it was proposed on, and what is known of it now."""
    findings = Violation.objects.filter(run=found.run, finding=found.finding)
    return {
        "finding": found.found,
        "known": findings.order_by("-id").first() if found.finding else None,
        "loss_then": _number(found.evidence.get("loss")),
    }


def _remedy_of(found: Adaptation) -> dict[str, Any]:
    earlier = Adaptation.objects.filter(remedy=found.remedy).exclude(graft_step=None)
    return {
        "known": KnownRemedy.objects.filter(slug=found.remedy).first(),
        "record": track_record(earlier.exclude(pk=found.pk)),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _steps_ago(found: Adaptation) -> int:
    return max(0, found.run.step - found.proposed_step)


def _outcome(found: Adaptation) -> dict[str, Any]:
    return {
        "commands": command_log(found),
        "falls": reward_falls(found),
        "speed_up": speed_up_of(found.uid),
    }


_WHILE_PENDING = ("approve", "reject", "claim", "extend")
_AFTERWARDS = ("cancel", "rollback")


def _acts(found: Adaptation, user: User) -> dict[str, Any]:
    """Which buttons the person gets, and why the other buttons are missing."""
    answers = adaptations.permissions(found, user)
    pending = found.state == AdaptationState.AWAITING_APPROVAL
    shown = _WHILE_PENDING if pending else _AFTERWARDS
    refusals = [
        answers[name].why
        for name in shown
        if not answers[name].allowed and answers[name].code != "decision-not-pending"
    ]
    return {
        "may": {name: permission.allowed for name, permission in answers.items()},
        "whys": _joined(refusals),
        "pending": pending,
        "votes": adaptations.votes_of(found),
        "reject_reasons": list(RejectReason),
        "claimed_by_me": found.claimed_by_id == user.pk,
    }


def _joined(refusals: list[str]) -> list[str]:
    """ "Only x may approve." and "Only x may reject." joined into one sentence."""
    joined = _("%(who)s may %(acts)s.")
    verbs: dict[str, list[str]] = {}
    for sentence in dict.fromkeys(refusals):
        start, _may, verb = sentence.rpartition(_(" may "))
        verbs.setdefault(start, []).append(verb.removesuffix(".") if start else sentence)
    return [
        joined % {"who": start, "acts": ", ".join(words)} if start else " ".join(words)
        for start, words in verbs.items()
    ]


def get_adaptation(uid: str) -> Adaptation | None:
    return (
        Adaptation.objects.select_related(
            "run__owner",
            "blueprint",
            "safety_policy",
            "proposed_by",
            "decided_by",
            "claimed_by",
            "assigned_to",
            "escalated_by",
            "taken_back_by",
            "job",
            "kernel",
        )
        .filter(uid=uid)
        .first()
    )


@dataclass(frozen=True, slots=True)
class ReasonRow:
    text: str
    signal: str
    observed: float | None
    weight: float
    bar: Bar


def reasons_context(reasons: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was seen has no weight; the other rows are the parts of the confidence."""
    rows = reason_rows(reasons)
    weighed = [row for row in rows if row.weight]
    return {
        "rows": weighed[:REASONS_SHOWN],
        "smaller": weighed[REASONS_SHOWN:],
        "together": sum(row.weight for row in weighed[REASONS_SHOWN:]),
        "because": [row for row in rows if not row.weight],
        "total": sum(row.weight for row in weighed),
    }


def reason_rows(reasons: Sequence[Mapping[str, Any]]) -> list[ReasonRow]:
    """The reasons for and against, the largest weight first."""
    weights = [_number(reason.get("weight")) or 0.0 for reason in reasons]
    largest = max((abs(weight) for weight in weights), default=0.0)
    rows = [
        ReasonRow(
            text=str(reason.get("text") or reason.get("signal", "")),
            signal=str(reason.get("signal", "")),
            observed=_number(reason.get("observed")),
            weight=weight,
            bar=signed_bar(weight, largest),
        )
        for reason, weight in zip(reasons, weights, strict=True)
    ]
    return sorted(rows, key=lambda row: abs(row.weight), reverse=True)


def _number(value: Any) -> float | None:
    """A number of the wire; unknown when it is not finite (it may be ``"nan"``)."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True, slots=True)
class EvidenceRow:
    """One signal at the proposal and now, with the median of the run's layers."""

    name: str
    then: float | None
    now: float | None
    others: float | None  # the median of all layers, then
    unit: str
    note: str

    @property
    def change(self) -> float | None:
        if self.then is None or self.now is None:
            return None
        return self.now - self.then


_NOTES = {str(signal): note for signal, note in SIGNAL_NOTES.items()}
_FIRST = (str(Signal.HEALTH), "loss")


def evidence_rows(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[EvidenceRow]:
    """The signals that are still measured: health and loss first, then by name."""
    names = sorted(
        (name for name in then if name in now or name in _NOTES or name in _FIRST),
        key=lambda name: (name not in _FIRST, name),
    )
    return [
        EvidenceRow(
            name=name,
            then=_number(then[name]),
            now=_number(now.get(name)),
            others=_number(then.get(f"{name}_median")),
            unit=_NOTES.get(name, ("", ""))[0],
            note=_NOTES.get(name, ("", ""))[1],
        )
        for name in names
    ]


def evidence_parts(found: Adaptation, now: Mapping[str, Any]) -> dict[str, list[EvidenceRow]]:
    """Health, loss and the signals that the reasons name; the others are folded."""
    named = {*_FIRST, *(str(reason.get("signal", "")) for reason in found.reasons)}
    rows = evidence_rows(found.evidence, now)
    first = [row for row in rows if row.name in named][:EVIDENCE_SHOWN]
    return {"rows": first, "others": [row for row in rows if row not in first]}


def derived_numbers(then: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    """The rest of the stored evidence: values that the policy derived from the signals."""
    shown = {row.name for row in evidence_rows(then, {})}
    return [
        (name, _number(then[name]))
        for name in sorted(then)
        if name not in shown and not name.endswith("_median")
    ]


@dataclass(frozen=True, slots=True)
class CheckRow:
    rule: str
    text: str
    observed: str
    limit: str
    hard: bool
    verdict: str  # passed, failed, unknown

    @property
    def shape(self) -> str:
        return {"passed": "check", "failed": "cross"}.get(self.verdict, "question")

    @property
    def tone(self) -> str:
        if self.verdict == "passed":
            return "good"
        return "serious" if self.hard else "caution"


_VERDICTS = {True: "passed", False: "failed"}


def check_rows(checks: Sequence[Mapping[str, Any]]) -> list[CheckRow]:
    """Checks that did not pass come first."""
    rows = [
        CheckRow(
            rule=str(check.get("rule", "")),
            text=str(check.get("text", "")),
            observed=str(check.get("observed", "")),
            limit=str(check.get("limit", "")),
            hard=bool(check.get("hard", True)),
            verdict=_VERDICTS.get(check.get("passed"), "unknown"),  # type: ignore[arg-type]
        )
        for check in checks
    ]
    return sorted(rows, key=lambda row: row.verdict == "passed")


def graft_sketch(adaptation: Adaptation) -> Sketch:
    """The layer between its neighbours in the layer graph."""
    layers = adaptation.run.layers
    own: Mapping[str, Any] = next(
        (layer for layer in layers if layer["name"] == adaptation.layer), {}
    )
    start = adaptation.since or adaptation.layer
    before = next((layer["name"] for layer in layers if start in layer.get("feeds", ())), "input")
    feeds = own.get("feeds") or ["output"]
    return sketch(
        f"{adaptation.since} … {adaptation.layer}" if adaptation.since else adaptation.layer,
        adaptation.grafted_blueprint.slug,
        adaptation.grafted_blueprint.kind,
        before=before,
        after=str(feeds[0]),
    )


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of an adaptation; ``progress`` is yes, now, bad or empty."""

    name: str
    progress: str
    at: datetime | None
    took_ms: float | None


# Name of the stage, the states that end it, the states in which it is in progress.
_STAGES: tuple[tuple[str, frozenset[AdaptationState], frozenset[AdaptationState]], ...] = (
    (gettext_noop("Proposed"), frozenset({_A.PROPOSED}), frozenset()),
    (
        gettext_noop("Decided"),
        frozenset({_A.APPROVED, _A.REJECTED}),
        frozenset({_A.AWAITING_APPROVAL}),
    ),
    (
        gettext_noop("Compiled"),
        frozenset({_A.COMPILED}),
        frozenset({_A.COMPILE_QUEUED, _A.COMPILING}),
    ),
    (gettext_noop("Sent"), frozenset({_A.DISPATCHED}), frozenset({_A.COMPILED})),
    (
        gettext_noop("Grafted"),
        frozenset({_A.PROBATION}),
        frozenset({_A.DISPATCHED, _A.ACCEPTED, _A.IN_DOUBT}),
    ),
    (
        gettext_noop("Judged"),
        frozenset({_A.KEPT, _A.ROLLED_BACK, _A.REVERTED}),
        frozenset({_A.PROBATION, _A.ROLLING_BACK}),
    ),
)


# Nothing is compiled.
_REMEDY_STAGES = tuple(
    (gettext_noop("Applied") if name == "Grafted" else name, ends, working)
    for name, ends, working in _STAGES
    if name != "Compiled"
)


def stages(adaptation: Adaptation, events: Sequence[AuditEvent]) -> list[Stage]:
    """The stages with the time at which each was reached, from the audit log."""
    reached: dict[str, datetime] = {}
    for event in sorted(events, key=lambda event: event.id):
        reached.setdefault(event.act.removeprefix("adaptation."), event.at)
    rows: list[Stage] = []
    before: datetime | None = None
    for name, ends, working in _REMEDY_STAGES if adaptation.remedy else _STAGES:
        at = next((reached[state] for state in sorted(ends) if state in reached), None)
        took = (at - before).total_seconds() * 1000 if at and before else None
        rows.append(Stage(_(name), _progress(adaptation, at, working, rows), at, took))
        before = at or before
    return rows


def _progress(
    adaptation: Adaptation,
    at: datetime | None,
    working: frozenset[AdaptationState],
    before: Sequence[Stage],
) -> str:
    if at is not None:
        return "yes"
    if adaptation.state in working:
        return "now"
    # The adaptation ended before its last stage: mark the first stage that it did not reach.
    first_open = all(stage.progress == "yes" for stage in before)
    return "bad" if adaptation.ended and first_open else ""


def history(adaptation: Adaptation) -> list[AuditEvent]:
    """The adaptation's audit events, oldest first."""
    return list(AuditEvent.objects.filter(object_uid=adaptation.uid).order_by("id")[:200])


def remedies_of(adaptation: Adaptation) -> list[Remedy]:
    """What the training script itself did to this graft, oldest first."""
    found = Remedy.objects.filter(adaptation=adaptation).select_related("undoes")
    return list(found.order_by("id"))


def command_log(adaptation: Adaptation) -> list[Command]:
    """The commands about it with the trainer's answers."""
    return list(Command.objects.filter(adaptation_uid=adaptation.uid).order_by("seq"))


@dataclass(frozen=True, slots=True)
class TrackRecord:
    """How earlier grafts of this blueprint, or uses of this remedy, ended, as counts."""

    kept: int
    rolled_back: int

    @property
    def cases(self) -> int:
        return self.kept + self.rolled_back


def grafts_of(blueprint_id: int) -> QuerySet[Adaptation]:
    return Adaptation.objects.filter(blueprint_id=blueprint_id).exclude(graft_step=None)


def track_record(ended: QuerySet[Adaptation]) -> TrackRecord:
    return TrackRecord(
        kept=ended.filter(state=_A.KEPT).count(),
        rolled_back=ended.filter(
            Q(state=_A.ROLLED_BACK) | Q(state=_A.REVERTED) | Q(state=_A.ROLLBACK_FAILED)
        ).count(),
    )


def reward_falls(adaptation: Adaptation) -> list[Fall]:
    terms = adaptation.reward_terms or {}
    return waterfall({name: _number(value) or 0.0 for name, value in terms.items()})
