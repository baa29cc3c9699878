"""A model's grafts and remedies as its trainer reports them at registration."""

from __future__ import annotations

from collections.abc import Mapping

from django.db.models import F

from apps.accounts.actors import Actor
from apps.adaptations.dispatch import UNDO_SECONDS, request_undo
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.adaptations.recovery import (
    recover_grafts,
    recover_remedies,
    settle_held,
    settle_held_remedy,
)
from apps.audit.services import record
from apps.blueprints.models import KnownRemedy
from apps.recipes.selectors import ancestors_of_run
from apps.rest.clock import now as database_now
from apps.runs.models import Command, Run
from apps.runs.services import issue_command
from apps.violations.models import Violation
from apps.violations.services import record_violation
from esper.contracts import (
    ADAPTATION_ENDED,
    AdaptationState,
    CommandKind,
    Severity,
    ViolationRule,
)
from esper.contracts.protocol import Applied, HeldRemedy

S = AdaptationState
_TOLD_BY_HELLO = (S.IN_DOUBT, S.KEPT, S.ROLLBACK_FAILED)
_WITH_TRAINER = (S.DISPATCHED, S.ACCEPTED, S.PROBATION, S.ROLLING_BACK)


def put_in_doubt(
    run: Run, actor: Actor, reason: str = "the trainer was started again"
) -> list[Adaptation]:
    """What the trainer did meanwhile is unknown until it reports. In a transaction."""
    adaptations = locked_adaptations(run, _WITH_TRAINER)
    for adaptation in adaptations:
        transition(adaptation, S.IN_DOUBT, actor=actor, reason=reason)
    return adaptations


def withdraw_proposals(run: Run, actor: Actor) -> list[Adaptation]:
    """Nobody can approve what an earlier trainer was asked; the new one proposes what still holds.

    In a transaction.
    """
    adaptations = locked_adaptations(run, (S.AWAITING_APPROVAL,))
    for adaptation in adaptations:
        transition(
            adaptation,
            S.SUPERSEDED,
            actor=actor,
            reason="the trainer was started again, and proposes anew",
        )
    return adaptations


def reconcile_grafts(run: Run, reported: Mapping[str, Applied], actor: Actor) -> list[Adaptation]:
    """Settle what is in doubt by the grafts that the model holds. In a transaction.

    Args:
        reported: the trainer's entry for each graft, by the adaptation's uid.
    """
    settled = []
    for adaptation in locked_adaptations(run, _TOLD_BY_HELLO):
        if adaptation.remedy:
            continue
        if adaptation.state == S.IN_DOUBT:
            settled.append(_settle(adaptation, reported.get(adaptation.uid), actor))
        elif adaptation.state == S.ROLLBACK_FAILED:
            if adaptation.uid not in reported:  # else it is taken out as a leftover
                settled.append(settle_missing(adaptation, actor, "graft"))
        elif adaptation.uid in reported:
            note_merged(adaptation, merged=reported[adaptation.uid].merged)
            settled.append(adaptation)  # its checkpoint may be older than the verdict
        elif run.epoch > 1:
            settled.append(_lost_when_kept(adaptation, actor))
    undo_leftovers(run, set(reported), actor)
    if run.restored_at is not None:
        known = set(Adaptation.objects.filter(uid__in=reported).values_list("uid", flat=True))
        unknown = [entry for uid, entry in reported.items() if uid not in known]
        settled += recover_grafts(run, unknown, actor)
    _note_foreign_grafts(run, reported)
    return settled


def reconcile_remedies(
    run: Run, held: Mapping[str, HeldRemedy], step: int, actor: Actor
) -> list[Adaptation]:
    """Settle what is in doubt by the remedies that are in effect. In a transaction.

    Args:
        held: the trainer's entry for each remedy that acts in each step, by its adaptation's uid.
        step: where the trainer goes on: a remedy that changed the run once, before that step, is
            in what it has learned since.
    """
    once = set(KnownRemedy.objects.filter(stays=False).values_list("slug", flat=True))
    settled = []
    for adaptation in locked_adaptations(run, _TOLD_BY_HELLO):
        if not adaptation.remedy:
            continue
        applied_at = adaptation.graft_step
        in_effect = adaptation.uid in held or (
            adaptation.remedy in once and applied_at is not None and applied_at <= step
        )
        if adaptation.state == S.IN_DOUBT:
            settled.append(_settle_remedy(adaptation, held, actor, in_effect=in_effect))
        elif adaptation.state == S.ROLLBACK_FAILED:
            if not in_effect:  # else it is taken out as a leftover
                settled.append(settle_missing(adaptation, actor, "remedy"))
        elif in_effect:
            settled.append(adaptation)
        elif run.epoch > 1:
            reason = "the trainer has started again, or gone on, without this remedy"
            settled.append(transition(adaptation, S.REVERTED, actor=actor, reason=reason))
    undo_leftovers(run, set(held), actor)
    if run.restored_at is not None:
        settled += recover_remedies(run, list(held.values()), actor)
    return settled


def _settle_remedy(
    adaptation: Adaptation, held: Mapping[str, HeldRemedy], actor: Actor, *, in_effect: bool
) -> Adaptation:
    if not in_effect:
        return settle_missing(adaptation, actor, "remedy")
    if undo_was_requested(adaptation):
        return _undo_held(adaptation, actor, "remedy")
    entry = held.get(adaptation.uid)
    return settle_held_remedy(adaptation, entry, actor, "the trainer holds this remedy")


def note_merged(adaptation: Adaptation, *, merged: bool) -> None:
    """A merged graft stays kept, but cannot be taken out. In a transaction."""
    if merged != (adaptation.merged_at is not None):
        Adaptation.objects.filter(pk=adaptation.pk).update(
            version=F("version") + 1, merged_at=database_now() if merged else None
        )
        adaptation.refresh_from_db()


def _note_foreign_grafts(run: Run, reported: Mapping[str, Applied]) -> None:
    """Record grafts in the model that belong to another run, or that cannot be recovered.

    Those of the runs that a branch began from are its own from its first step on.
    """
    lineage = [run.uid, *ancestors_of_run(run.uid)]
    known = Adaptation.objects.filter(run__uid__in=lineage, uid__in=reported).values_list(
        "uid", flat=True
    )
    unknown = [entry for uid, entry in reported.items() if uid not in set(known)]
    if not unknown:
        return
    named = ", ".join(f"{entry.blueprint} at {entry.layer}" for entry in unknown[:5])
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    observed = f"{named}{more}"[:200]
    rule = ViolationRule.COMMAND
    if Violation.objects.filter(run=run, rule=rule, observed=observed, acknowledged_at=None):
        return  # reported before: a hello is repeated until it is answered
    record_violation(
        run=run,
        rule=rule,
        severity=Severity.SERIOUS,
        observed=observed,
        limit="grafts of this run",
        text=f"The trainer holds grafts that this run never had: {named}{more}.",
        action="Nothing was changed: they came with its checkpoint, and this server neither judges "
        "nor undoes them. Remove them in the script if they are unwanted.",
        layer=unknown[0].layer,
    )


def _settle(adaptation: Adaptation, reported: Applied | None, actor: Actor) -> Adaptation:
    if reported is None:
        return settle_missing(adaptation, actor, "graft")
    if undo_was_requested(adaptation):
        return _undo_held(adaptation, actor, "graft")
    return settle_held(adaptation, reported, actor, "the trainer holds this graft")


def settle_missing(adaptation: Adaptation, actor: Actor, what: str) -> Adaptation:
    """The trainer reports that the model does not hold it. In a transaction."""
    if adaptation.grafted_at is None:
        reason = f"the trainer does not hold this {what}"
        return transition(adaptation, S.NOT_APPLIED, actor=actor, reason=reason)
    end = S.REVERTED if adaptation.kept_at else S.ROLLED_BACK
    reason = f"the trainer has started again, or gone on, without this {what}"
    return transition(adaptation, end, actor=actor, reason=reason)


def _undo_held(adaptation: Adaptation, actor: Actor, what: str) -> Adaptation:
    reason = f"the trainer still holds this {what}"
    transition(adaptation, S.ROLLING_BACK, actor=actor, reason=reason)
    request_undo(adaptation, reason="its rollback was requested before the restart")
    return adaptation


def undo_was_requested(adaptation: Adaptation) -> bool:
    """In any start of its run."""
    return Command.objects.filter(adaptation_uid=adaptation.uid, kind=CommandKind.UNDO).exists()


def _lost_when_kept(adaptation: Adaptation, actor: Actor) -> Adaptation:
    reason = "the trainer was restarted from a state before this graft"
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.COMMAND,
        severity=Severity.CAUTION,
        observed="not in the model",
        limit="kept",
        text=f"The kept graft of {adaptation.layer} is not in the restarted model.",
        action="The adaptation is recorded as reverted; nothing was grafted again.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
    )
    return transition(adaptation, S.REVERTED, actor=actor, reason=reason)


def undo_leftovers(run: Run, uids: set[str], actor: Actor) -> None:
    """Take back what is in the model although its adaptation has ended otherwise.

    They were in the checkpoint that the trainer resumed, or it grafted them too late.
    """
    wrong = Adaptation.objects.filter(run=run, uid__in=uids).filter(
        state__in=ADAPTATION_ENDED - {S.KEPT}
    )
    for adaptation in wrong:
        issue_command(
            run=run,
            kind=CommandKind.UNDO,
            adaptation_uid=adaptation.uid,
            layer=adaptation.layer,
            payload={"hard": False, "reason": f"the adaptation is {adaptation.state}"},
            ttl_seconds=UNDO_SECONDS,
        )
        record(
            actor=actor,
            act="adaptation.leftover_undone",
            object_kind="adaptation",
            object_uid=adaptation.uid,
            run_uid=run.uid,
            reason="the model holds a change whose adaptation has ended",
        )


def locked_adaptations(run: Run, states: tuple[AdaptationState, ...]) -> list[Adaptation]:
    return list(
        Adaptation.objects.select_for_update().filter(run=run, state__in=states).order_by("id")
    )
