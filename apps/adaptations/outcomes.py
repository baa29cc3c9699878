"""What the trainer's reports mean for adaptations: grafted, refused, taken out, closed."""

from __future__ import annotations

from dataclasses import replace

from apps.accounts.actors import Actor
from apps.adaptations.compiled_kernels import note_answer, request_speed_up
from apps.adaptations.dispatch import leave_in_doubt, request_undo
from apps.adaptations.lifecycle import LEAVES_A_REST, transition
from apps.adaptations.models import Adaptation
from apps.adaptations.reconciliation import (
    locked_adaptations,
    settle_missing,
    undo_leftovers,
    undo_was_requested,
)
from apps.adaptations.shadows import note_shadow
from apps.recipes.selectors import ancestors_of_run
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem, not_found
from apps.runs.models import Command, Run
from apps.runs.services import lock_run, note_taken_back
from apps.violations.services import record_violation
from apps.workers.services import cancel_job
from esper.contracts import (
    ADAPTATION_ENDED,
    AdaptationState,
    Certificate,
    CommandAck,
    CommandKind,
    CommandState,
    RefusalCode,
    Severity,
    ViolationRule,
)

S = AdaptationState
_REFUSAL_RULES = {
    RefusalCode.BAD_SIGNATURE: ViolationRule.SIGNATURE,
    RefusalCode.BAD_DIGEST: ViolationRule.SIGNATURE,
    RefusalCode.CERTIFICATE_FAILED: ViolationRule.CERTIFICATE,
    RefusalCode.INCOMPATIBLE_LAYER: ViolationRule.COMPATIBILITY,
    RefusalCode.UNKNOWN_BLUEPRINT: ViolationRule.COMPATIBILITY,
}
_ABOUT_HELD = (CommandKind.UNDO, CommandKind.REPORT_HELD)
# The states in which an answer to an undo says something new.
_UNDO_COUNTS = {
    CommandState.APPLIED: {S.ROLLING_BACK, S.IN_DOUBT, S.ROLLBACK_FAILED, S.PROBATION, S.KEPT},
    CommandState.REFUSED: {S.ROLLING_BACK, S.IN_DOUBT, S.ROLLBACK_FAILED},
    CommandState.FAILED: {S.ROLLING_BACK, S.IN_DOUBT},
}
# Another refusal of an undo does not say whether the model holds the change. A trainer that cannot
# read an undo cannot take anything out.
_SETTLES_UNDO = frozenset({RefusalCode.NOT_GRAFTED, RefusalCode.MERGED, RefusalCode.MALFORMED})


def follow_answer(command: Command, ack: CommandAck, actor: Actor) -> None:
    """Move the adaptation that ``command`` is about. In a transaction."""
    if command.kind in (CommandKind.GRAFT, CommandKind.REMEDY):
        _after_applying(command, ack, actor)
    elif command.kind == CommandKind.UNDO:
        _after_undo(command, ack, actor)
    elif command.kind == CommandKind.REPORT_HELD:
        _after_question(command, ack, actor)
    elif command.kind == CommandKind.SPEED_UP:
        note_answer(command, ack)
    elif command.kind == CommandKind.SHADOW:
        note_shadow(command, ack)


def _after_applying(command: Command, ack: CommandAck, actor: Actor) -> None:
    adaptation = _adaptation(command)
    if adaptation is None:
        return
    if ack.state is CommandState.APPLIED and adaptation.state in ADAPTATION_ENDED - {S.KEPT}:
        # The answer came after the deadline: it is in effect, and would never be judged.
        undo_leftovers(command.run, {adaptation.uid}, actor)
    if adaptation.state not in (S.DISPATCHED, S.ACCEPTED, S.IN_DOUBT):
        return
    if ack.state is CommandState.REFUSED:
        _record_refusal(adaptation, ack)
        reason = ack.reason if adaptation.remedy else f"{ack.code}: {ack.reason}"
        transition(adaptation, S.NOT_APPLIED, actor=actor, reason=reason)
        return
    if adaptation.state != S.ACCEPTED:
        transition(adaptation, S.ACCEPTED, actor=actor)
    if ack.state is CommandState.FAILED:
        _record_refusal(adaptation, ack)
        transition(
            adaptation,
            S.APPLY_FAILED,
            actor=actor,
            reason=ack.reason,
            certificate=ack.certificate.to_wire() if ack.certificate else None,
        )
    elif ack.state is CommandState.APPLIED:
        _begin_probation(adaptation, ack, actor)


def _begin_probation(adaptation: Adaptation, ack: CommandAck, actor: Actor) -> None:
    transition(
        adaptation,
        S.PROBATION,
        actor=actor,
        graft_step=ack.step,
        grafted_at=database_now(),
        pause_ms=ack.pause_ms,
        certificate=ack.certificate.to_wire() if ack.certificate else None,
        digest_before=ack.digest_before,
        digest_after=ack.digest_after,
        details=ack.details,
    )
    if ack.certificate is not None and not _holds(ack.certificate):
        _undo_uncertified(adaptation, ack.certificate, actor)
    elif not adaptation.remedy:
        request_speed_up(adaptation)


def _holds(certificate: Certificate) -> bool:
    """Whether it agrees with itself: a graft that changed the model must not be certified."""
    properties = certificate.preserving and certificate.live and certificate.rng_neutral
    return certificate.passed and properties and certificate.max_abs_diff <= certificate.tolerance


def _undo_uncertified(adaptation: Adaptation, certificate: Certificate, actor: Actor) -> None:
    """Take out a graft that must not be in the model, before its probation."""
    reason = "; ".join(certificate.failures) or "the certificate contradicts itself"
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.CERTIFICATE,
        severity=Severity.SERIOUS,
        observed=reason,
        limit="a passing certificate",
        text=f"The trainer grafted {adaptation.layer} although its certificate fails: {reason}",
        action="The server has commanded the trainer to remove the graft.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=adaptation.graft_step,
    )
    transition(adaptation, S.ROLLING_BACK, actor=actor, reason=f"certificate failed: {reason}")
    request_undo(adaptation, reason=f"certificate failed: {reason}")


def _record_refusal(adaptation: Adaptation, ack: CommandAck) -> None:
    code = RefusalCode(ack.code) if ack.code in set(RefusalCode) else None
    rule = _REFUSAL_RULES.get(code, ViolationRule.COMMAND) if code else ViolationRule.COMMAND
    serious = rule in (ViolationRule.SIGNATURE, ViolationRule.CERTIFICATE)
    if adaptation.remedy and not serious:
        return  # that a remedy does not fit this run is an answer, and breaks no limit
    record_violation(
        run=adaptation.run,
        rule=rule,
        severity=Severity.SERIOUS if serious else Severity.CAUTION,
        observed=ack.reason or ack.code,
        limit="verified, compatible, function-preserving",
        text=f"The trainer did not apply {adaptation.title}: {ack.reason or ack.code}",
        action="The model was not changed.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=ack.step if ack.step >= 0 else None,
    )


def _after_undo(command: Command, ack: CommandAck, actor: Actor) -> None:
    """Late answers count: whatever was thought meanwhile, the trainer says what it has done."""
    adaptation = _adaptation(command)
    if adaptation is None:
        return
    if ack.state is CommandState.APPLIED:
        _note_taken_back(adaptation, ack)
    elif _answered_later(command):
        return
    if adaptation.state in LEAVES_A_REST:
        _after_undo_of_rest(adaptation, ack, actor)
        return
    if adaptation.state not in _UNDO_COUNTS.get(ack.state, frozenset()):
        return
    if ack.state is CommandState.REFUSED and ack.code not in _SETTLES_UNDO:
        _ask_after_refused_undo(adaptation, actor, ack)
        return
    if adaptation.state != S.ROLLING_BACK:
        reason = "the trainer has answered that it was told to take it out"
        transition(adaptation, S.ROLLING_BACK, actor=actor, reason=reason)
    if ack.state is CommandState.APPLIED:
        hard = command.payload.get("hard") is True
        _rolled_back(adaptation, ack, actor, command.payload.get("reason", ""), hard=hard)
    elif ack.code == RefusalCode.NOT_GRAFTED:
        reason = "it had been taken back already"
        _rolled_back(adaptation, ack, actor, reason, hard=False)
    elif ack.code == RefusalCode.MERGED:
        _merged_meanwhile(adaptation, actor, ack)
    else:
        quarantine(adaptation, actor, ack.reason or ack.code)


def _note_taken_back(adaptation: Adaptation, ack: CommandAck) -> None:
    """Old trainers do not say it; what they took back goes on counting."""
    back_to = ack.details.get("back_to_step")
    if isinstance(back_to, int):
        run = lock_run(adaptation.run_id)
        note_taken_back(run, epoch=run.epoch, after_step=back_to, up_to_step=ack.step)


def _answered_later(command: Command) -> bool:
    """A later command about the same adaptation was answered first: what is said now is older."""
    later = Command.objects.filter(
        run=command.run, adaptation_uid=command.adaptation_uid, seq__gt=command.seq
    )
    answered = (CommandState.APPLIED, CommandState.REFUSED, CommandState.FAILED)
    return later.filter(kind__in=_ABOUT_HELD, state__in=answered).exists()


def _after_undo_of_rest(adaptation: Adaptation, ack: CommandAck, actor: Actor) -> None:
    """It had ended, and the model held it nevertheless: that it stays there must be known."""
    if ack.state is CommandState.FAILED or ack.code == RefusalCode.MERGED:
        quarantine(adaptation, actor, ack.reason or ack.code)


def _ask_after_refused_undo(adaptation: Adaptation, actor: Actor, ack: CommandAck) -> None:
    """It was not tried, so that nothing has failed; as when it has expired on its way."""
    if adaptation.state == S.ROLLING_BACK:
        reason = f"the trainer has not tried to take it out: {ack.reason or ack.code}"
        leave_in_doubt(adaptation, actor=actor, reason=reason)


def _after_question(command: Command, ack: CommandAck, actor: Actor) -> None:
    """The trainer says whether its model holds what is in doubt, after every earlier command."""
    adaptation = _adaptation(command)
    if adaptation is None or adaptation.state != S.IN_DOUBT:
        return
    if ack.state is CommandState.APPLIED:
        _settle_held(adaptation, ack, actor)
    elif ack.code == RefusalCode.NOT_GRAFTED:
        settle_missing(adaptation, actor, "change")
    elif ack.code == RefusalCode.MERGED:
        transition(adaptation, S.ROLLING_BACK, actor=actor, reason=ack.reason)
        _merged_meanwhile(adaptation, actor, ack)
    elif ack.code == RefusalCode.MALFORMED:
        _undo_in_doubt(adaptation, actor, "this trainer does not know the question what it holds")


def _settle_held(adaptation: Adaptation, ack: CommandAck, actor: Actor) -> None:
    held = "the trainer says that its model holds it"
    if undo_was_requested(adaptation):
        _undo_in_doubt(adaptation, actor, f"{held}, although it was to be taken out")
    elif adaptation.grafted_at is not None:
        _undo_in_doubt(adaptation, actor, f"{held}, and no verdict came in time")
    else:
        transition(adaptation, S.ACCEPTED, actor=actor, reason=held)
        since = ack.details.get("since_step")
        step = since if isinstance(since, int) and since >= 0 else ack.step
        _begin_probation(adaptation, replace(ack, step=step), actor)


def _undo_in_doubt(adaptation: Adaptation, actor: Actor, reason: str) -> None:
    transition(adaptation, S.ROLLING_BACK, actor=actor, reason=reason)
    request_undo(adaptation, reason=reason)


def _rolled_back(
    adaptation: Adaptation, ack: CommandAck, actor: Actor, reason: str, *, hard: bool
) -> None:
    exact: bool | None = None
    if hard and ack.digest_after and adaptation.digest_before:
        same = ack.digest_after == adaptation.digest_before
        exact = same and ack.details.get("exact") is not False
    transition(
        adaptation,
        S.ROLLED_BACK if adaptation.kept_at is None else S.REVERTED,
        actor=actor,
        reason=reason,
        undo_exact=exact,
    )


def _merged_meanwhile(adaptation: Adaptation, actor: Actor, ack: CommandAck) -> None:
    """The graft was to be removed, but is merged into its host: it stays, with a violation."""
    now = database_now()
    transition(
        adaptation,
        S.KEPT,
        actor=actor,
        reason=ack.reason,
        kept_at=adaptation.kept_at or now,
        merged_at=adaptation.merged_at or now,
    )
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.COMMAND,
        severity=Severity.CAUTION,
        observed="merged into its host",
        limit="taken out",
        text=f"The graft of {adaptation.layer} was to be taken out: {ack.reason}",
        action="It stays kept. Undo the merge in the script, or go back to an older checkpoint.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
    )


def quarantine(adaptation: Adaptation, actor: Actor, reason: str) -> None:
    """The trainer could not take it back: no more adaptations of this run. In a transaction."""
    transition(adaptation, S.ROLLBACK_FAILED, actor=actor, reason=reason)
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.COMMAND,
        severity=Severity.CRITICAL,
        observed=reason,
        limit="rolled back",
        text=f"{adaptation.title} could not be taken out.",
        action="The run is quarantined until the trainer reports that it is gone. Take it out "
        "again, or resume the training from a checkpoint from before it.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
    )


def mark_taken_out(
    adaptation: Adaptation, actor: Actor, *, step: int, reason: str, exact: bool | None
) -> None:
    """End the adaptation of a graft that the trainer took out without a command.

    Raises:
        Problem: the adaptation is not grafted.
    """
    _catch_up(adaptation, actor, step=step, reason=reason)
    transition(
        adaptation,
        S.REVERTED if adaptation.kept_at else S.ROLLED_BACK,
        actor=actor,
        reason=reason,
        undo_exact=exact,
    )


def _catch_up(adaptation: Adaptation, actor: Actor, *, step: int, reason: str) -> None:
    """Walk to ``rolling_back`` along the lifecycle, from the last state that was reported."""
    if adaptation.state == S.DISPATCHED:
        transition(adaptation, S.ACCEPTED, actor=actor)
    if adaptation.state == S.ACCEPTED:
        transition(
            adaptation,
            S.PROBATION,
            actor=actor,
            graft_step=step,
            grafted_at=database_now(),
        )
    if adaptation.state in (S.PROBATION, S.KEPT, S.IN_DOUBT, S.ROLLBACK_FAILED):
        transition(adaptation, S.ROLLING_BACK, actor=actor, reason=reason)
    if adaptation.state != S.ROLLING_BACK:
        raise Problem(
            409,
            "decision-not-pending",
            f"A-{adaptation.number} is {adaptation.state}, not grafted.",
        )


def close_open_adaptations(run: Run, actor: Actor, reason: str) -> None:
    """End every open adaptation of an ended run. In a transaction."""
    for adaptation in locked_adaptations(run, tuple(set(S) - ADAPTATION_ENDED)):
        if adaptation.job is not None:
            cancel_job(adaptation.job)
        transition(adaptation, _end_with_run(adaptation), actor=actor, reason=reason)


def _end_with_run(adaptation: Adaptation) -> AdaptationState:
    state = AdaptationState(adaptation.state)
    if state in (S.DISPATCHED, S.ACCEPTED):
        return S.NOT_APPLIED
    if state in (S.PROBATION, S.ROLLING_BACK, S.IN_DOUBT):
        return S.RUN_LOST  # the graft is in the model, and no verdict follows
    return S.CANCELLED


def _adaptation(command: Command) -> Adaptation | None:
    return Adaptation.objects.filter(uid=command.adaptation_uid).first()


def adaptation_of(run: Run, uid: str) -> Adaptation:
    """Locked; raises ``Problem`` 404 for an adaptation of another run."""
    adaptation = Adaptation.objects.select_for_update().filter(run=run, uid=uid).first()
    if adaptation is None:
        raise not_found("adaptation")
    return adaptation


def inherited(run: Run, uid: str) -> Adaptation | None:
    """The adaptation of a run that this one is a branch of; None: it is none of theirs.

    Its change came with the state that the branch began from. Whatever becomes of it here does not
    change the other run's row.
    """
    lineage = ancestors_of_run(run.uid)
    return Adaptation.objects.filter(uid=uid, run__uid__in=lineage).first() if lineage else None
