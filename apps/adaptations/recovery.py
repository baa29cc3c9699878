"""Grafts that a trainer holds, and that a database restored from a backup has lost."""

from __future__ import annotations

from collections.abc import Sequence

from django.db import IntegrityError, transaction
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import RECOVERED, Adaptation
from apps.audit.services import record
from apps.blueprints.models import Blueprint
from apps.policies.services import current_policy
from apps.runs.models import Run
from apps.violations.services import record_violation
from esper.contracts import (
    AdaptationState,
    AdaptationType,
    BlueprintCategory,
    Severity,
    ViolationRule,
)
from esper.contracts.protocol import Applied

S = AdaptationState
_TYPES = {
    BlueprintCategory.TRANSFORMER: AdaptationType.ADD_ATTENTION,
    BlueprintCategory.MIXTURE_OF_EXPERTS: AdaptationType.ADD_MOE,
    BlueprintCategory.EFFICIENCY: AdaptationType.ADD_EFFICIENCY,
    BlueprintCategory.ROUTING: AdaptationType.ADD_ROUTING,
    BlueprintCategory.DIAGNOSTICS: AdaptationType.ADD_DIAGNOSTIC,
}
_REASON = "the trainer holds this graft; the database was restored from an older backup"


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
        _announce(adaptation, actor)
        settle_held(adaptation, entry, actor, _REASON)
        _note(adaptation, entry)
        recovered.append(adaptation)
    return recovered


def settle_held(adaptation: Adaptation, entry: Applied, actor: Actor, reason: str) -> Adaptation:
    """From ``in_doubt`` to probation, and to kept where the trainer was told so before the loss."""
    now = timezone.now()
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
            reason="the trainer was told that it is kept; the verdict was lost with the database",
            kept_at=adaptation.kept_at or now,
            merged_at=now if entry.merged else None,
        )
    return adaptation


def _write(run: Run, entry: Applied, blueprint: Blueprint) -> Adaptation | None:
    try:
        with transaction.atomic():
            return Adaptation.objects.create(
                uid=entry.adaptation,
                run=run,
                run_epoch=run.epoch,
                idempotency_key=f"recovered:{entry.adaptation}",
                layer=entry.layer,
                adaptation_type=_TYPES[BlueprintCategory(blueprint.category)],
                blueprint=blueprint,
                risk=blueprint.risk,
                forecast_parameters=0,
                policy=RECOVERED,
                safety_policy=current_policy(run),
                proposed_step=max(entry.step, 0),
                state=S.IN_DOUBT,
            )
    except IntegrityError:
        return None


def _announce(adaptation: Adaptation, actor: Actor) -> None:
    record(
        actor=actor,
        act="adaptation.recovered",
        object_kind="adaptation",
        object_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        reason=_REASON,
        data={
            "number": adaptation.number,
            "layer": adaptation.layer,
            "blueprint": adaptation.slug,
            "to": str(adaptation.state),
            "version": adaptation.version,
        },
    )


def _note(adaptation: Adaptation, entry: Applied) -> None:
    state = adaptation.state.replace("_", " ")
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.COMMAND,
        severity=Severity.SERIOUS,
        observed=f"{entry.blueprint} at {entry.layer}"[:200],
        limit="grafts that the database knows",
        text=f"The trainer holds {entry.blueprint} at {entry.layer}, which the restored database "
        "does not know: who approved it is lost.",
        action=f"It is recorded as A-{adaptation.number} ({state}). Take it out on its page if it "
        "is unwanted.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=entry.step if entry.step >= 0 else None,
    )
