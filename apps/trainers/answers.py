"""A trainer answers a command: accepted, applied, refused or failed."""

from __future__ import annotations

import math
from dataclasses import replace

from django.db import transaction

from apps.accounts.actors import Actor
from apps.adaptations.services import follow_answer
from apps.audit.models import AuditEvent
from apps.audit.services import record
from apps.notifications.services import publish, run_topic
from apps.rest.clock import now as database_now
from apps.rest.problems import not_found
from apps.runs.models import Command, Run
from apps.runs.services import check_epoch, lock_run
from apps.violations.services import record_violation
from esper.contracts import CommandAck, CommandState, RefusalCode, Severity, ViolationRule

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


@transaction.atomic
def acknowledge_command(*, run: Run, epoch: int, ack: CommandAck, actor: Actor) -> Command:
    """Store the trainer's answer. A repeated or an older answer changes nothing.

    Raises:
        Problem: the run has a newer epoch or has ended, or there is no such command.
    """
    run = lock_run(run.pk)  # it may have changed since the request arrived
    check_epoch(run, epoch)
    if not math.isfinite(ack.pause_ms):
        ack = replace(ack, pause_ms=0.0)
    command = Command.objects.select_for_update().filter(run=run, seq=ack.seq).first()
    if command is None:
        raise not_found("command")
    if _RANK[ack.state] <= _RANK[CommandState(command.state)]:
        _note_refused_forgery(command, ack, actor)
        return command
    command.state, command.code, command.reason = ack.state, ack.code, ack.reason
    command.step, command.pause_ms = (ack.step if ack.step >= 0 else None), ack.pause_ms
    command.acknowledged_at = database_now()
    command.save()
    _note_ack(command, ack, actor)
    follow_answer(command, ack, actor)
    return command


def _note_refused_forgery(command: Command, ack: CommandAck, actor: Actor) -> None:
    """The trainer refused a second command with the same number.

    The answer to the first one stays; the attempt is recorded once for each reason.
    """
    if ack.state is not CommandState.REFUSED or ack.code not in _FORGERIES:
        return
    uid = f"{command.run.uid}/{command.seq}"
    reported = AuditEvent.objects.filter(act="command.forgery_refused", object_uid=uid)
    if command.code == ack.code or reported.filter(data__code=ack.code).exists():
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
        action="The answer to the first one stays; nothing was changed.",
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
