"""Grafts and remedies that a trainer holds, and that a database restored from a backup has lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.db import IntegrityError, transaction

from apps.accounts.actors import Actor
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import RECOVERED, Adaptation
from apps.audit.services import record
from apps.blueprints.models import Blueprint, KnownRemedy
from apps.policies.services import current_policy
from apps.rest.clock import now as database_now
from apps.runs.models import Run
from apps.violations.services import record_violation
from esper.contracts import (
    ADAPTATION_ENDED,
    AdaptationState,
    AdaptationType,
    BlueprintCategory,
    Severity,
    ViolationRule,
)
from esper.contracts.protocol import Applied, HeldRemedy

S = AdaptationState
_TYPES = {
    BlueprintCategory.TRANSFORMER: AdaptationType.ADD_ATTENTION,
    BlueprintCategory.MIXTURE_OF_EXPERTS: AdaptationType.ADD_MOE,
    BlueprintCategory.EFFICIENCY: AdaptationType.ADD_EFFICIENCY,
    BlueprintCategory.ROUTING: AdaptationType.ADD_ROUTING,
    BlueprintCategory.DIAGNOSTICS: AdaptationType.ADD_DIAGNOSTIC,
}
_RESTORED = "the database was restored from an older backup"
_REASON = f"the trainer holds this graft; {_RESTORED}"
_HELD = f"the trainer holds this remedy; {_RESTORED}"
_LOST_VERDICT = "the trainer was told that it is kept; the verdict was lost with the database"


def recover_grafts(run: Run, entries: Sequence[Applied], actor: Actor) -> list[Adaptation]:
    """Give each of these grafts an adaptation again, so that it is judged and can be taken out.

    One that was kept stays kept; another goes on with its probation. Left out, for the caller to
    mention: a blueprint that the catalogue does not have, a layer with another adaptation under
    way. In a transaction.
    """
    blueprints = Blueprint.objects.in_bulk({one.blueprint for one in entries}, field_name="slug")
    recovered = []
    for entry in entries:
        blueprint = blueprints.get(entry.blueprint)
        adaptation = _write(run, entry, blueprint) if blueprint is not None else None
        if adaptation is None:
            continue
        _announce(adaptation, actor, _REASON)
        settle_held(adaptation, entry, actor, _REASON)
        _note(adaptation, f"{entry.blueprint} at {entry.layer}", entry.step)
        recovered.append(adaptation)
    return recovered


def settle_held(adaptation: Adaptation, entry: Applied, actor: Actor, reason: str) -> Adaptation:
    """From ``in_doubt`` to probation, and to kept where the trainer was told so before the loss."""
    now = database_now()
    transition(
        adaptation,
        S.PROBATION,
        actor=actor,
        reason=reason,
        graft_step=entry.step,
        grafted_at=adaptation.grafted_at or now,
    )
    if adaptation.run.restored_at is not None and (entry.kept or entry.merged):
        transition(
            adaptation,
            S.KEPT,
            actor=actor,
            reason=_LOST_VERDICT,
            kept_at=adaptation.kept_at or now,
            merged_at=now if entry.merged else None,
        )
    return adaptation


def _write(run: Run, entry: Applied, blueprint: Blueprint) -> Adaptation | None:
    try:
        with transaction.atomic():
            return Adaptation.objects.create(
                **_common(run, entry),
                since=entry.since,
                adaptation_type=_TYPES[BlueprintCategory(blueprint.category)],
                blueprint=blueprint,
                risk=blueprint.risk,
                forecast_parameters=0,
            )
    except IntegrityError:
        return None


def recover_remedies(run: Run, entries: Sequence[HeldRemedy], actor: Actor) -> list[Adaptation]:
    """The same for remedies that are in force. In a transaction.

    Left out: one that the catalogue does not have, and one of another run.
    """
    known = KnownRemedy.objects.in_bulk({one.remedy for one in entries}, field_name="slug")
    taken = set(
        Adaptation.objects.filter(uid__in=[one.adaptation for one in entries]).values_list(
            "uid", flat=True
        )
    )
    recovered = []
    for entry in entries:
        remedy = known.get(entry.remedy)
        if remedy is None or entry.adaptation in taken:
            continue
        adaptation = _write_remedy(run, entry, remedy)
        _announce(adaptation, actor, _HELD)
        settle_held_remedy(adaptation, entry, actor, _HELD)
        place = f"at {entry.layer}" if entry.layer else "for the whole run"
        _note(adaptation, f"{entry.remedy} {place}", entry.step)
        recovered.append(adaptation)
    return recovered


def settle_held_remedy(
    adaptation: Adaptation, entry: HeldRemedy | None, actor: Actor, reason: str
) -> Adaptation:
    """From ``in_doubt`` to probation, and to kept where its result was known before the loss.

    Args:
        entry: None for one that changed the run once, before the step where the trainer goes on.
    """
    now = database_now()
    transition(
        adaptation,
        S.PROBATION,
        actor=actor,
        reason=reason,
        graft_step=adaptation.graft_step if entry is None else entry.step,
        grafted_at=adaptation.grafted_at or now,
    )
    if adaptation.run.restored_at is not None and entry is not None and entry.kept:
        transition(adaptation, S.KEPT, actor=actor, reason=_LOST_VERDICT, kept_at=now)
    return adaptation


def _write_remedy(run: Run, entry: HeldRemedy, remedy: KnownRemedy) -> Adaptation:
    config = {**remedy.settings, **entry.config}
    same = Adaptation.objects.filter(run=run, finding=entry.finding)
    answered = same.exclude(state__in=ADAPTATION_ENDED).exists()  # one at a time answers a finding
    return Adaptation.objects.create(
        **_common(run, entry),
        remedy=remedy.slug,
        in_words=remedy.in_words(config),
        config=config,
        risk=remedy.risk,
        finding="" if answered else entry.finding,
    )


def _common(run: Run, entry: Applied | HeldRemedy) -> dict[str, Any]:
    """What a recovered graft and a recovered remedy have alike."""
    return {
        "uid": entry.adaptation,
        "run": run,
        "run_epoch": run.epoch,
        "idempotency_key": f"recovered:{entry.adaptation}",
        "layer": entry.layer,
        "policy": RECOVERED,
        "safety_policy": current_policy(run),
        "proposed_step": max(entry.step, 0),
        "state": S.IN_DOUBT,
    }


def _announce(adaptation: Adaptation, actor: Actor, reason: str) -> None:
    record(
        actor=actor,
        act="adaptation.recovered",
        object_kind="adaptation",
        object_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        reason=reason,
        data={
            "number": adaptation.number,
            "layer": adaptation.layer,
            "blueprint": "" if adaptation.remedy else adaptation.slug,
            "remedy": adaptation.remedy,
            "to": str(adaptation.state),
            "version": adaptation.version,
        },
    )


def _note(adaptation: Adaptation, what: str, step: int) -> None:
    state = adaptation.state.replace("_", " ")
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.COMMAND,
        severity=Severity.SERIOUS,
        observed=what[:200],
        limit="what the database knows",
        text=f"The trainer holds {what}, which the restored database does not know: who approved "
        "it is lost.",
        action=f"It is recorded as A-{adaptation.number} ({state}). Take it out on its page if it "
        "is unwanted.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=step if step >= 0 else None,
    )
