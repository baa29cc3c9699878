"""What trainers report: answers to commands, what is in the model, what they did alone, the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.adaptations.compiled_kernels import note_answer, request_speed_up
from apps.adaptations.dispatch import request_undo
from apps.adaptations.lifecycle import transition
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.audit.services import record
from apps.kernels.cache import plan_warm_up
from apps.notifications.services import publish, run_topic
from apps.rest.problems import Problem, not_found
from apps.runs.models import Command, Run
from apps.runs.services import (
    Registration,
    RunSpec,
    check_epoch,
    issue_command,
    lock_run,
    set_state,
)
from apps.runs.services import register_run as register
from apps.violations.models import Violation
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
    RunState,
    Severity,
    ViolationRule,
)

S = AdaptationState

_WITH_TRAINER = (S.DISPATCHED, S.ACCEPTED, S.PROBATION, S.ROLLING_BACK)
_RANK = {
    CommandState.ISSUED: 0,
    CommandState.ACCEPTED: 1,
    CommandState.EXPIRED: 1,
    CommandState.APPLIED: 2,
    CommandState.REFUSED: 2,
    CommandState.FAILED: 2,
}
_FORGERIES = frozenset(
    {
        RefusalCode.REPLAYED,
        RefusalCode.FOREIGN_RUN,
        RefusalCode.OLD_EPOCH,
        RefusalCode.BAD_SIGNATURE,
    }
)
_REFUSAL_RULES = {
    RefusalCode.BAD_SIGNATURE: ViolationRule.SIGNATURE,
    RefusalCode.BAD_DIGEST: ViolationRule.SIGNATURE,
    RefusalCode.CERTIFICATE_FAILED: ViolationRule.CERTIFICATE,
    RefusalCode.INCOMPATIBLE_LAYER: ViolationRule.COMPATIBILITY,
    RefusalCode.UNKNOWN_BLUEPRINT: ViolationRule.COMPATIBILITY,
}


@dataclass(frozen=True, slots=True)
class LocalRollback:
    """The trainer's guard took a graft out by itself."""

    adaptation: str
    step: int
    rule: ViolationRule
    observed: str
    limit: str
    pause_ms: float
    exact: bool
    digest_after: str = ""


@transaction.atomic
def register_run(*, owner: User, actor: Actor, spec: RunSpec, run_uid: str = "") -> Registration:
    """Registers a run; on a restart, whatever the trainer had in its hands is in doubt."""
    registration = register(owner=owner, actor=actor, spec=spec, run_uid=run_uid)
    if registration.resumed:
        for adaptation in _of(registration.run, _WITH_TRAINER):
            transition(adaptation, S.IN_DOUBT, actor=actor, reason="the trainer was started again")
    else:
        run = registration.run
        plan_warm_up(run_uid=run.uid, layers=run.layers, capability=run.capability)
    return registration


@transaction.atomic
def settle_hello(
    *, run: Run, epoch: int, step: int, applied: list[dict[str, Any]], actor: Actor
) -> list[Adaptation]:
    """The trainer says which grafts its model really holds; that settles what is in doubt."""
    run = lock_run(run.pk)  # as it is now, not as it was when the request came in
    check_epoch(run, epoch)
    held = {entry["adaptation"]: entry for entry in applied if entry["adaptation"]}
    settled = []
    for adaptation in _of(run, (S.IN_DOUBT, S.KEPT)):
        if adaptation.state == S.IN_DOUBT:
            settled.append(_settle(adaptation, held.get(adaptation.uid), actor))
        elif adaptation.uid in held:
            note_merged(adaptation, merged=held[adaptation.uid]["merged"])
            settled.append(adaptation)  # its checkpoint may be older than the verdict
        elif run.epoch > 1:
            settled.append(_lost_when_kept(adaptation, actor))
    _undo_leftovers(run, set(held), actor)
    _note_strangers(run, held)
    if run.state in (RunState.STARTING, RunState.UNREACHABLE):
        set_state(run=run, state=RunState.RUNNING, actor=actor)
    return settled


def note_merged(adaptation: Adaptation, *, merged: bool) -> None:
    """It stays kept; whether it can be taken out changes. In a transaction."""
    if merged != (adaptation.merged_at is not None):
        Adaptation.objects.filter(pk=adaptation.pk).update(
            version=F("version") + 1, merged_at=timezone.now() if merged else None
        )
        adaptation.refresh_from_db()


def _note_strangers(run: Run, held: dict[str, dict[str, Any]]) -> None:
    """Grafts in the model that this run never had: of another run, or of another server."""
    known = Adaptation.objects.filter(run=run, uid__in=held).values_list("uid", flat=True)
    strange = [entry for uid, entry in held.items() if uid not in set(known)]
    if not strange:
        return
    named = ", ".join(f"{entry['blueprint']} at {entry['layer']}" for entry in strange[:5])
    more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
    observed = f"{named}{more}"[:200]
    rule = ViolationRule.COMMAND
    if Violation.objects.filter(run=run, rule=rule, observed=observed, acknowledged_at=None):
        return  # said before: a hello is repeated until it is answered
    record_violation(
        run=run,
        rule=rule,
        severity=Severity.SERIOUS,
        observed=observed,
        limit="grafts of this run",
        text=f"The trainer holds grafts that this run never had: {named}{more}.",
        action="Nothing was changed: they came with its checkpoint, and nobody here judges or "
        "undoes them. Take them out in the script if they are not meant.",
        layer=strange[0]["layer"],
    )


def _settle(adaptation: Adaptation, held: dict[str, Any] | None, actor: Actor) -> Adaptation:
    if held is None:
        if adaptation.grafted_at is None:
            reason = "the restarted trainer never grafted it"
            return transition(adaptation, S.NOT_APPLIED, actor=actor, reason=reason)
        end = S.REVERTED if adaptation.kept_at else S.ROLLED_BACK
        reason = "the trainer was restarted from a state without this graft"
        return transition(adaptation, end, actor=actor, reason=reason)
    if _undo_was_requested(adaptation):
        transition(adaptation, S.ROLLING_BACK, actor=actor, reason="the graft is still there")
        request_undo(adaptation, reason="it was to be taken out before the restart")
        return adaptation
    return transition(
        adaptation,
        S.PROBATION,
        actor=actor,
        reason="the restarted trainer holds this graft",
        graft_step=held["step"],
        grafted_at=adaptation.grafted_at or timezone.now(),
    )


def _undo_was_requested(adaptation: Adaptation) -> bool:
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
        action="Noted as reverted; nothing was grafted again.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
    )
    return transition(adaptation, S.REVERTED, actor=actor, reason=reason)


def _undo_leftovers(run: Run, held: set[str], actor: Actor) -> None:
    """Grafts that are in the model, though their adaptation has ended otherwise.

    They stood in the checkpoint that the trainer resumed, or it grafted them too late.
    """
    wrong = Adaptation.objects.filter(run=run, uid__in=held).filter(
        state__in=ADAPTATION_ENDED - {S.KEPT}
    )
    for adaptation in wrong:
        issue_command(
            run=run,
            kind=CommandKind.UNDO,
            adaptation_uid=adaptation.uid,
            layer=adaptation.layer,
            payload={"hard": False, "reason": f"it is {adaptation.state}"},
            ttl_seconds=300,
        )
        record(
            actor=actor,
            act="adaptation.leftover_undone",
            object_kind="adaptation",
            object_uid=adaptation.uid,
            run_uid=run.uid,
            reason="the model holds a graft whose adaptation has ended",
        )


@transaction.atomic
def acknowledge_command(*, run: Run, epoch: int, ack: CommandAck, actor: Actor) -> Command:
    """Take the trainer's answer. Repeating one is harmless; an older word never undoes a newer.

    Raises:
        Problem: old epoch, or no such command.
    """
    run = lock_run(run.pk)  # as it is now, not as it was when the request came in
    check_epoch(run, epoch)
    command = Command.objects.select_for_update().filter(run=run, seq=ack.seq).first()
    if command is None:
        raise not_found("command")
    if _RANK[ack.state] <= _RANK[CommandState(command.state)]:
        _note_refused_forgery(command, ack, actor)
        return command
    command.state, command.code, command.reason = ack.state, ack.code, ack.reason
    command.step, command.pause_ms = (ack.step if ack.step >= 0 else None), ack.pause_ms
    command.acknowledged_at = timezone.now()
    command.save()
    _note_ack(command, ack, actor)
    if command.kind == CommandKind.GRAFT:
        _after_graft(command, ack, actor)
    elif command.kind == CommandKind.UNDO:
        _after_undo(command, ack, actor)
    elif command.kind == CommandKind.SPEED_UP:
        note_answer(command, ack)
    return command


def _note_refused_forgery(command: Command, ack: CommandAck, actor: Actor) -> None:
    """A second command of that number reached the trainer, which refused it.

    The answer to the first one stands; that somebody tried is noted, once for each reason.
    """
    if ack.state is not CommandState.REFUSED or ack.code not in _FORGERIES:
        return
    uid = f"{command.run.uid}/{command.seq}"
    told = AuditEvent.objects.filter(act="command.forgery_refused", object_uid=uid)
    if command.code == ack.code or told.filter(data__code=ack.code).exists():
        return
    record(
        actor=actor,
        act="command.forgery_refused",
        object_kind="command",
        object_uid=uid,
        run_uid=command.run.uid,
        reason=ack.reason,
        data={"seq": command.seq, "code": ack.code, "answered": command.state},
    )
    record_violation(
        run=command.run,
        rule=ViolationRule.SIGNATURE,
        severity=Severity.SERIOUS,
        observed=ack.reason or ack.code,
        limit="each command is delivered once, signed, to its own run",
        text=f"The trainer refused a second command {command.seq}: {ack.reason or ack.code}",
        action="The answer to the first one stands; nothing was changed.",
        layer=command.layer,
        adaptation_uid=command.adaptation_uid,
    )


def _note_ack(command: Command, ack: CommandAck, actor: Actor) -> None:
    data = {
        "seq": command.seq,
        "kind": command.kind,
        "state": str(ack.state),
        "step": ack.step,
        "code": ack.code,
        "adaptation": command.adaptation_uid,
    }
    record(
        actor=actor,
        act=f"command.{ack.state}",
        object_kind="command",
        object_uid=f"{command.run.uid}/{command.seq}",
        run_uid=command.run.uid,
        reason=ack.reason,
        data=data,
    )
    publish(topic=run_topic(command.run.uid), type="command.acknowledged", data=data)


def _after_graft(command: Command, ack: CommandAck, actor: Actor) -> None:
    adaptation = _adaptation(command)
    if adaptation is None:
        return
    if ack.state is CommandState.APPLIED and adaptation.state in ADAPTATION_ENDED - {S.KEPT}:
        # Its word came after we had given it up: the graft is in, and nobody would judge it.
        _undo_leftovers(command.run, {adaptation.uid}, actor)
    if adaptation.state not in (S.DISPATCHED, S.ACCEPTED, S.IN_DOUBT):
        return
    if ack.state is CommandState.REFUSED:
        _refused(adaptation, ack)
        transition(adaptation, S.NOT_APPLIED, actor=actor, reason=f"{ack.code}: {ack.reason}")
        return
    if adaptation.state != S.ACCEPTED:
        transition(adaptation, S.ACCEPTED, actor=actor)
    if ack.state is CommandState.FAILED:
        _refused(adaptation, ack)
        transition(
            adaptation,
            S.APPLY_FAILED,
            actor=actor,
            reason=ack.reason,
            certificate=ack.certificate.to_wire() if ack.certificate else None,
        )
    elif ack.state is CommandState.APPLIED:
        transition(
            adaptation,
            S.PROBATION,
            actor=actor,
            graft_step=ack.step,
            grafted_at=timezone.now(),
            pause_ms=ack.pause_ms,
            certificate=ack.certificate.to_wire() if ack.certificate else None,
            digest_before=ack.digest_before,
            digest_after=ack.digest_after,
        )
        if ack.certificate is not None and not _holds(ack.certificate):
            _undo_uncertified(adaptation, ack.certificate, actor)
        else:
            request_speed_up(adaptation)


def _holds(certificate: Certificate) -> bool:
    """What it says adds up: a trainer may not call a graft certified that changed its model."""
    promised = certificate.preserving and certificate.live and certificate.rng_neutral
    return certificate.passed and promised and certificate.max_abs_diff <= certificate.tolerance


def _undo_uncertified(adaptation: Adaptation, certificate: Certificate, actor: Actor) -> None:
    """It is in the model, and must not be: out again, before anybody judges what it does."""
    reason = "; ".join(certificate.failures) or "the certificate contradicts itself"
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.CERTIFICATE,
        severity=Severity.SERIOUS,
        observed=reason,
        limit="a passing certificate",
        text=f"The trainer grafted {adaptation.layer} although its certificate fails: {reason}",
        action="It was told to take the graft out.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=adaptation.graft_step,
    )
    transition(adaptation, S.ROLLING_BACK, actor=actor, reason=f"certificate failed: {reason}")
    request_undo(adaptation, reason=f"certificate failed: {reason}")


def _refused(adaptation: Adaptation, ack: CommandAck) -> None:
    code = RefusalCode(ack.code) if ack.code in set(RefusalCode) else None
    rule = _REFUSAL_RULES.get(code, ViolationRule.COMMAND) if code else ViolationRule.COMMAND
    serious = rule in (ViolationRule.SIGNATURE, ViolationRule.CERTIFICATE)
    record_violation(
        run=adaptation.run,
        rule=rule,
        severity=Severity.SERIOUS if serious else Severity.CAUTION,
        observed=ack.reason or ack.code,
        limit="verified, compatible, function-preserving",
        text=f"The trainer did not graft {adaptation.blueprint.slug} into {adaptation.layer}: "
        f"{ack.reason or ack.code}",
        action="The model is as it was before.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=ack.step if ack.step >= 0 else None,
    )


def _after_undo(command: Command, ack: CommandAck, actor: Actor) -> None:
    adaptation = _adaptation(command)
    if adaptation is None or adaptation.state != S.ROLLING_BACK:
        return
    if ack.state is CommandState.APPLIED:
        _rolled_back(adaptation, actor, ack.digest_after, command.payload.get("reason", ""))
    elif ack.code == RefusalCode.NOT_GRAFTED:
        _rolled_back(adaptation, actor, ack.digest_after, "it was out already")
    elif ack.code == RefusalCode.MERGED:
        _merged_meanwhile(adaptation, actor, ack)
    elif ack.state in (CommandState.FAILED, CommandState.REFUSED):
        quarantine(adaptation, actor, ack.reason or ack.code)


def _rolled_back(adaptation: Adaptation, actor: Actor, digest_after: str, reason: str) -> None:
    hard = adaptation.kept_at is None
    exact = (digest_after == adaptation.digest_before) if hard and digest_after else None
    transition(
        adaptation,
        S.ROLLED_BACK if hard else S.REVERTED,
        actor=actor,
        reason=reason,
        undo_exact=exact,
    )


def _merged_meanwhile(adaptation: Adaptation, actor: Actor, ack: CommandAck) -> None:
    """It was to be taken out, and is in its host's weights: it stays, and somebody is told."""
    now = timezone.now()
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
    """The graft could not be taken out: no more adaptations of this run. In a transaction."""
    transition(adaptation, S.ROLLBACK_FAILED, actor=actor, reason=reason)
    Run.objects.filter(pk=adaptation.run_id).update(
        quarantined_reason=f"A-{adaptation.number} could not be taken out: {reason}"
    )
    record_violation(
        run=adaptation.run,
        rule=ViolationRule.DEADLINE,
        severity=Severity.CRITICAL,
        observed=reason,
        limit="rolled back",
        text=f"The graft of {adaptation.layer} could not be taken out.",
        action="The run is quarantined: nothing is grafted until it restarts from a checkpoint.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
    )


@transaction.atomic
def record_local_rollback(
    *, run: Run, epoch: int, report: LocalRollback, actor: Actor
) -> Adaptation:
    """The trainer's own guard was quicker than anybody here.

    Raises:
        Problem: old epoch, or an adaptation of another run.
    """
    run = lock_run(run.pk)  # as it is now, not as it was when the request came in
    check_epoch(run, epoch)
    adaptation = adaptation_of(run, report.adaptation)
    if adaptation.state in (S.ROLLED_BACK, S.REVERTED, S.ROLLBACK_FAILED):
        return adaptation  # told before
    reason = f"{report.rule}: {report.observed}"
    catch_up(adaptation, actor, step=report.step, reason=reason)
    record_violation(
        run=run,
        rule=report.rule,
        severity=Severity.SERIOUS,
        observed=report.observed,
        limit=report.limit,
        text=f"{adaptation.layer}: {report.rule.replace('_', ' ')} after the graft.",
        action=f"The trainer took the graft out by itself at step {report.step}.",
        layer=adaptation.layer,
        adaptation_uid=adaptation.uid,
        step=report.step,
    )
    transition(
        adaptation,
        S.REVERTED if adaptation.kept_at else S.ROLLED_BACK,
        actor=actor,
        reason=f"{report.rule}: {report.observed} (limit {report.limit})",
        undo_exact=report.exact,
    )
    return adaptation


def catch_up(adaptation: Adaptation, actor: Actor, *, step: int, reason: str) -> None:
    """Walk to ``rolling_back`` along the lifecycle, whatever we knew so far."""
    if adaptation.state == S.DISPATCHED:
        transition(adaptation, S.ACCEPTED, actor=actor)
    if adaptation.state == S.ACCEPTED:
        transition(
            adaptation,
            S.PROBATION,
            actor=actor,
            graft_step=step,
            grafted_at=timezone.now(),
        )
    if adaptation.state in (S.PROBATION, S.KEPT, S.IN_DOUBT):
        transition(adaptation, S.ROLLING_BACK, actor=actor, reason=reason)
    if adaptation.state != S.ROLLING_BACK:
        raise Problem(
            409,
            "decision-not-pending",
            f"A-{adaptation.number} is {adaptation.state}, not grafted.",
        )


@transaction.atomic
def finish_run(
    *, run: Run, epoch: int, state: RunState, step: int, reason: str, actor: Actor
) -> Run:
    """The trainer has ended by itself; nothing of this run may stay open."""
    run = lock_run(run.pk)  # as it is now, not as it was when the request came in
    check_epoch(run, epoch)
    set_state(run=run, state=state, actor=actor, reason=reason)
    Run.objects.filter(pk=run.pk).update(step=step)
    close_open_adaptations(run, actor, f"the run has {state}")
    run.refresh_from_db()
    return run


def close_open_adaptations(run: Run, actor: Actor, reason: str) -> None:
    """Give everything that is under way in an ended run its end. In a transaction."""
    for adaptation in _of(run, tuple(set(S) - ADAPTATION_ENDED)):
        if adaptation.job is not None:
            cancel_job(adaptation.job)
        transition(adaptation, _end_with_run(adaptation), actor=actor, reason=reason)


def _end_with_run(adaptation: Adaptation) -> AdaptationState:
    state = AdaptationState(adaptation.state)
    if state in (S.PROPOSED, S.VALIDATING):
        return S.DECLINED
    if state in (S.DISPATCHED, S.ACCEPTED):
        return S.NOT_APPLIED
    if state in (S.PROBATION, S.ROLLING_BACK, S.IN_DOUBT):
        return S.RUN_LOST  # it is in the model, and nobody will judge it
    return S.CANCELLED


def _of(run: Run, states: tuple[AdaptationState, ...]) -> list[Adaptation]:
    return list(
        Adaptation.objects.select_for_update().filter(run=run, state__in=states).order_by("id")
    )


def _adaptation(command: Command) -> Adaptation | None:
    return Adaptation.objects.filter(uid=command.adaptation_uid).first()


def adaptation_of(run: Run, uid: str) -> Adaptation:
    """Locked; raises ``Problem`` 404 for an adaptation of another run."""
    adaptation = Adaptation.objects.select_for_update().filter(run=run, uid=uid).first()
    if adaptation is None:
        raise not_found("adaptation")
    return adaptation
