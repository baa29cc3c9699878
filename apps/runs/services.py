"""Runs: registration, restarts, states and commands."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import transaction
from django.db.models import F, QuerySet

from apps.accounts import services as accounts
from apps.accounts.actors import Actor
from apps.accounts.models import DEFAULT_PROJECT, ApiToken, User
from apps.accounts.policy import Act, may
from apps.audit.services import record
from apps.notifications.services import notify, publish, run_topic
from apps.rest.clock import now as database_now
from apps.rest.problems import Problem, not_found
from apps.runs import models
from esper import contracts
from esper.contracts import (
    MAX_LAYERS,
    RUN_ENDED,
    CommandKind,
    CommandState,
    RunState,
    TokenScope,
    protocol,
    signing,
)

MAX_LIVE_RUNS_PER_OWNER = 200
MOST_TAKEN_BACK = 50  # undos of a run that are noted; the losses before them are long past
# A restored database does not know how often a trainer was started since its backup. No epoch of
# that time may be used again: a command of it would be genuine.
RESTORED_EPOCHS = 1000
_NEWER_TRAINER = "A newer trainer has registered for this run."
_RESTORED = (
    "The database was restored from a backup, or a key was replaced: register the run again."
)


@dataclass(frozen=True, slots=True)
class Registration:
    run: models.Run
    token: str  # the secret of the run token, returned once
    resumed: bool


@transaction.atomic
def register_run(
    *,
    owner: User,
    actor: Actor,
    spec: protocol.Registration,
    run_uid: str = "",
    project_id: int = DEFAULT_PROJECT,
) -> Registration:
    """A new run, or the next epoch of the owner's live run of that name.

    A caller that may register one run only gives its ``run_uid``: it is registered, or its next
    epoch even when it has ended, because a resumed launch continues its run.

    Raises:
        Problem: too many layers, duplicate layer names, too many live runs, or a taken name.
    """
    _check_spec(spec)
    place = models.Run.objects.select_for_update().filter(owner=owner, project=project_id)
    live = _continued_run(place, spec.continues) or _run_to_continue(place, spec.name, run_uid)
    if live is None:
        _check_run_count(owner)
    named = {"name": spec.name, **({"uid": run_uid} if run_uid else {})}
    run = live or models.Run(owner=owner, project_id=project_id, **named)
    run.ended_at, run.end_reason = None, ""
    run.epoch = _next_epoch(run, spec.continues) if live else 1
    if live is None and spec.continues is not None:  # the database does not know its trainer's run
        run.restored_at = database_now()
    run.mode, run.host, run.capability = spec.mode, spec.host, spec.capability
    run.capabilities = spec.capabilities
    run.model_parameters, run.target_steps = spec.model_parameters, spec.target_steps
    run.layers = [layer.to_wire() for layer in spec.layers]
    run.layer_count = len(run.layers)
    run.versions = spec.versions
    run.state = RunState.RUNNING if live else RunState.STARTING
    run.telemetry_seq = 0  # each epoch counts its own items
    run.last_seen_at = database_now()
    run.save()
    _end_old_epoch(run, actor)
    _, secret = accounts.issue_token(
        owner=owner,
        name=f"run {run.name}, epoch {run.epoch}",
        scopes=[TokenScope.RUN_WRITE],
        run_uid=run.uid,
        actor=actor,
    )
    act = "run.resumed" if live else "run.registered"
    data = {"name": run.name, "epoch": run.epoch, "mode": str(run.mode), "layers": len(run.layers)}
    record(actor=actor, act=act, object_kind="run", object_uid=run.uid, run_uid=run.uid, data=data)
    publish(topic=run_topic(run.uid), type=act, data=data)
    told = {"run": run.uid, **data}
    publish(topic="system", type=act, data=told, project_id=run.project_id)
    return Registration(run, secret, resumed=live is not None)


def _continued_run(
    place: QuerySet[models.Run], continued: protocol.Continued | None
) -> models.Run | None:
    """The run of a living trainer whose registration a restored database has lost.

    None: it has just started, or the database does not know the run at all.

    Raises:
        Problem: nothing was lost, so that another trainer has replaced this one; or the run has
            ended, or is somebody else's.
    """
    if continued is None:
        return None
    run = place.filter(uid=continued.run).first()
    if run is None:
        if models.Run.objects.filter(uid=continued.run).exists():
            raise not_found("run")
        return None
    if run.restored_at is None and continued.epoch <= run.epoch:
        raise Problem(
            409,
            "old-epoch",
            f"This run is at epoch {run.epoch}, the trainer at {continued.epoch}. {_NEWER_TRAINER}",
            epoch=run.epoch,
        )
    if run.ended:
        raise Problem(409, "run-ended", f"This run has ended: it is {run.state}.", state=run.state)
    return run


def _next_epoch(run: models.Run, continued: protocol.Continued | None) -> int:
    return max(run.epoch, continued.epoch if continued else 0) + 1


def _run_to_continue(place: QuerySet[models.Run], name: str, run_uid: str) -> models.Run | None:
    same_name = place.filter(name=name).exclude(state__in=RUN_ENDED).first()
    if not run_uid:
        return same_name
    if same_name is not None and same_name.uid != run_uid:
        raise Problem(
            409,
            "run-name-taken",
            f"{same_name.owner.username} already has a live run {name!r}. End it, or choose "
            "another name.",
        )
    return place.filter(uid=run_uid).first()


def _check_spec(spec: protocol.Registration) -> None:
    if len(spec.layers) > MAX_LAYERS:
        raise Problem(
            422,
            "too-many-layers",
            f"The model has {len(spec.layers)} layers; at most {MAX_LAYERS} can be watched. "
            "Name the important ones with slots=[…].",
        )
    names = [layer.name for layer in spec.layers]
    if len(set(names)) != len(names):
        raise Problem(422, "invalid", "Two layers have the same name.")


def _check_run_count(owner: User) -> None:
    live = models.Run.objects.filter(owner=owner).exclude(state__in=RUN_ENDED).count()
    if live >= MAX_LIVE_RUNS_PER_OWNER:
        raise Problem(
            429,
            "rate-limited",
            f"{owner.username} has {live} live runs, which is the limit. End a run first.",
        )


def _end_old_epoch(run: models.Run, actor: Actor) -> None:
    """Revoke the tokens and expire the unanswered commands of older epochs."""
    for token in ApiToken.objects.filter(run_uid=run.uid, revoked_at=None):
        if TokenScope.RUNS_CREATE in token.scopes:
            continue  # a launch's own token: it has registered with it, and may have to repeat that
        accounts.revoke_token(token=token, actor=actor)
    models.Command.objects.filter(
        run=run, epoch__lt=run.epoch, state__in=[CommandState.ISSUED, CommandState.ACCEPTED]
    ).update(state=CommandState.EXPIRED, reason="the trainer was started again")


def lock_run(run_id: int) -> models.Run:
    """The first lock of every transaction that changes something of a run.

    The order is the run, then its rows, then the audit log's head. Another order can deadlock on
    PostgreSQL.
    """
    return models.Run.objects.select_for_update().get(pk=run_id)


def check_epoch(run: models.Run, epoch: int) -> None:
    """Raises ``Problem`` 409 when a newer trainer has registered, or the run has ended."""
    if epoch != run.epoch:
        raise Problem(
            409,
            "run-restored" if run.restored_at else "old-epoch",
            f"This run is at epoch {run.epoch}, the request is for epoch {epoch}. "
            + _what_to_do(run, epoch),
            epoch=run.epoch,
        )
    if run.ended:
        raise Problem(409, "run-ended", f"This run has ended: it is {run.state}.", state=run.state)


def _what_to_do(run: models.Run, epoch: int) -> str:
    if run.restored_at:
        return _RESTORED
    return _NEWER_TRAINER if epoch < run.epoch else "Register the run again."


def mark_restored(run: models.Run, *, actor: Actor, reason: str) -> None:
    """The run's trainer must register again, and say what its model holds. In a transaction.

    Its old epochs and commands are void: some of them are missing here.
    """
    models.Run.objects.filter(pk=run.pk).update(
        epoch=F("epoch") + RESTORED_EPOCHS, restored_at=None if run.ended else database_now()
    )
    run.refresh_from_db(fields=["epoch", "restored_at"])
    models.Command.objects.filter(
        run=run, state__in=[CommandState.ISSUED, CommandState.ACCEPTED]
    ).update(state=CommandState.EXPIRED, reason=reason)
    if not run.ended:
        record(
            actor=actor,
            act="run.restored",
            object_kind="run",
            object_uid=run.uid,
            run_uid=run.uid,
            reason=reason,
            data={"epoch": run.epoch},
        )


def note_taken_back(run: models.Run, *, epoch: int, after_step: int, up_to_step: int) -> None:
    """The run's weights are again those of ``after_step``. In the transaction of :func:`lock_run`.

    Of a step that is no step, or of none at all (-1), nothing is noted.
    """
    gap = [epoch, after_step, up_to_step]
    if 0 <= after_step < up_to_step and gap not in run.taken_back:
        run.taken_back = [*run.taken_back, gap][-MOST_TAKEN_BACK:]
        run.save(update_fields=["taken_back"])


def raise_command_seq(run: models.Run, seq: int) -> None:
    """The trainer has taken commands up to ``seq``: lower numbers would be refused as replayed."""
    models.Run.objects.filter(pk=run.pk, command_seq__lt=seq).update(command_seq=seq)


def touch(run: models.Run) -> None:
    """Record that the trainer has reported; an unreachable run is running again."""
    models.Run.objects.filter(pk=run.pk).update(last_seen_at=database_now())
    if run.state == RunState.UNREACHABLE:
        set_state(run=run, state=RunState.RUNNING, actor=_trainer(run))


@transaction.atomic
def set_state(*, run: models.Run, state: RunState, actor: Actor, reason: str = "") -> bool:
    """Compare-and-set of the run's state; False when another change was first."""
    lock_run(run.pk)
    changes: dict[str, Any] = {"state": state}
    if state in RUN_ENDED:
        changes |= {"ended_at": database_now(), "end_reason": reason}
    if not models.Run.objects.filter(pk=run.pk, state=run.state).update(**changes):
        return False
    data = {"from": str(run.state), "to": str(state), "reason": reason}
    for name, value in changes.items():
        setattr(run, name, value)
    record(
        actor=actor,
        act=f"run.{state}",
        object_kind="run",
        object_uid=run.uid,
        run_uid=run.uid,
        reason=reason,
        data=data,
    )
    publish(topic=run_topic(run.uid), type="run.state", data=data)
    told = {"run": run.uid, **data}
    publish(topic="system", type="run.state", data=told, project_id=run.project_id)
    return True


def trainer_group(run_uid: str) -> str:
    return f"trainer.{run_uid}"


@transaction.atomic
def issue_command(
    *,
    run: models.Run,
    kind: CommandKind,
    adaptation_uid: str = "",
    layer: str = "",
    kernel_digest: str = "",
    payload: dict[str, Any] | None = None,
    ttl_seconds: int = 60,
    not_after: datetime | None = None,
) -> models.Command:
    """Sign one command, append it to the run's log and notify the trainer after the commit.

    It is valid for ``ttl_seconds``, but not longer than ``not_after``.

    Raises:
        ImproperlyConfigured: this process holds no key that signs commands.
    """
    if not settings.ESPER_COMMAND_KEY:
        raise ImproperlyConfigured(
            "This process issues no commands (ESPER_ISSUES_COMMANDS is off). Start it as web, or "
            "as a worker of the queue control, with ESPER_COMMAND_KEY."
        )
    models.Run.objects.filter(pk=run.pk).update(command_seq=F("command_seq") + 1)
    run.refresh_from_db(fields=["command_seq", "epoch"])
    issued_at = database_now()
    expires_at = issued_at + timedelta(seconds=ttl_seconds)
    command = models.Command(
        run=run,
        epoch=run.epoch,
        seq=run.command_seq,
        kind=kind,
        adaptation_uid=adaptation_uid,
        layer=layer,
        kernel_digest=kernel_digest,
        payload=payload or {},
        issued_at=issued_at,
        expires_at=expires_at if not_after is None else min(expires_at, not_after),
    )
    command.signature = signing.sign(_contract(command).signing_bytes(), settings.ESPER_COMMAND_KEY)
    command.save()
    transaction.on_commit(lambda: notify(trainer_group(run.uid), "command.issued", {}))
    return command


def commands_after(run: models.Run, after: int) -> list[models.Command]:
    """Unanswered commands of this epoch, oldest first; expired ones are left out."""
    return list(
        models.Command.objects.filter(
            run=run,
            epoch=run.epoch,
            seq__gt=after,
            state=CommandState.ISSUED,
            expires_at__gt=database_now(),
        )
        .select_related("run")
        .order_by("seq")
    )


def command_to_wire(command: models.Command) -> dict[str, Any]:
    return {"command": _contract(command).to_wire(), "signature": command.signature}


def _contract(command: models.Command) -> contracts.Command:
    return contracts.Command(
        run=command.run.uid,
        epoch=command.epoch,
        seq=command.seq,
        kind=CommandKind(command.kind),
        issued_at=command.issued_at.timestamp(),
        expires_at=command.expires_at.timestamp(),
        adaptation=command.adaptation_uid,
        layer=command.layer,
        kernel_digest=command.kernel_digest,
        payload=command.payload,
    )


@transaction.atomic
def request_pause(
    *, run: models.Run, paused: bool, user: User, via: str, reason: str, blocked: str = ""
) -> models.Run:
    """Pause or resume *adaptation* of a run; training goes on. The trainer acknowledges it.

    Args:
        blocked: why it cannot be done now, whoever asks; empty when it can.

    Raises:
        Problem: not allowed, the run has ended, or ``blocked``.
    """
    _check_act(run, user, Act.PAUSE_ADAPTATION)
    if blocked:
        raise Problem(423, "adaptation-killed", blocked)
    actor = Actor.person(user, via=via)
    models.Run.objects.filter(pk=run.pk).update(
        adaptation_paused_by=actor.name if paused else "",
        adaptation_paused_at=database_now() if paused else None,
    )
    tell_trainer(run=run, paused=paused, actor=actor, reason=reason)
    run.refresh_from_db()
    return run


def tell_trainer(*, run: models.Run, paused: bool, actor: Actor, reason: str) -> None:
    """Command the trainer to pause or resume adaptation. In a transaction.

    The run's own pause is not touched: the kill switch must not undo what a person has paused.
    """
    kind = CommandKind.PAUSE_ADAPTATION if paused else CommandKind.RESUME_ADAPTATION
    command = issue_command(run=run, kind=kind, payload={"reason": reason}, ttl_seconds=3600)
    _record_request(run, actor, kind, reason, command)


@transaction.atomic
def request_stop(*, run: models.Run, user: User, via: str, reason: str) -> models.Run:
    """Tell the trainer to end the run at its next step; raises ``Problem`` when not allowed."""
    _check_act(run, user, Act.STOP_RUN)
    command = issue_command(
        run=run, kind=CommandKind.STOP_RUN, payload={"reason": reason}, ttl_seconds=3600
    )
    _record_request(run, Actor.person(user, via=via), CommandKind.STOP_RUN, reason, command)
    run.refresh_from_db()
    return run


def _check_act(run: models.Run, user: User, act: Act) -> None:
    permission = may(user, act, of=run)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    if run.ended:
        raise Problem(409, "run-ended", f"This run has ended: it is {run.state}.", state=run.state)


def _record_request(
    run: models.Run, actor: Actor, kind: CommandKind, reason: str, command: models.Command
) -> None:
    record(
        actor=actor,
        act=f"run.{kind}",
        object_kind="run",
        object_uid=run.uid,
        run_uid=run.uid,
        reason=reason,
        data={"command_seq": command.seq},
    )
    publish(
        topic=run_topic(run.uid),
        type="run.command",
        data={"kind": str(kind), "seq": command.seq, "by": actor.name},
    )


def _trainer(run: models.Run) -> Actor:
    from apps.accounts.actors import ActorKind

    return Actor(ActorKind.TRAINER, run.name)
