"""Trials in shadow: a person asks for one, or a random share of the proposals gets one.

The trainer forks its run and trains one copy with the graft and one without it, in the share of its
time that its script allows. The run itself stays as it is. The result is evidence for the person
who decides; it decides nothing.
"""

from __future__ import annotations

import hashlib
from typing import Any

from django.conf import settings
from django.db import transaction

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations.models import Adaptation, ShadowTrial
from apps.adaptations.variants import waiting_variants
from apps.audit.services import record
from apps.blueprints.models import Variant
from apps.notifications.services import publish, run_topic
from apps.rest.numbers import finite_or_none, is_number
from apps.rest.problems import Problem
from apps.runs.models import Command
from apps.runs.services import issue_command, lock_run
from esper.contracts import AdaptationState, CommandAck, CommandKind, CommandState

STEPS, SECONDS = 200, 60
MOST_STEPS, MOST_SECONDS = 2_000, 600
TTL_SECONDS = 120  # until the next step boundary
_OPEN = (CommandState.ISSUED, CommandState.ACCEPTED)


def may_shadow(adaptation: Adaptation, user: User) -> Permission:
    """Whether this person may ask for a trial now; the run's owner may, because it costs time."""
    if adaptation.remedy:
        return Permission(False, "no-shadow", "A remedy is not tried in shadow: only grafts are.")
    if adaptation.state != AdaptationState.AWAITING_APPROVAL:
        word = adaptation.state.replace("_", " ")
        return Permission(False, "decision-not-pending", f"The adaptation is {word}.")
    if adaptation.run.ended or adaptation.run_epoch != adaptation.run.epoch:
        return Permission(False, "old-epoch", "Its trainer has ended or was started again since.")
    if trials_of(adaptation).filter(command__state__in=_OPEN).exists():
        return Permission(False, "shadow-running", "A trial in shadow is under way.")
    return may(user, Act.SHADOW, of=adaptation.run)


def trials_of(adaptation: Adaptation) -> Any:
    """Newest first."""
    found = ShadowTrial.objects.filter(adaptation=adaptation)
    return found.select_related("command", "asked_by", "variant")


@transaction.atomic
def ask_for_shadow(
    *,
    adaptation: Adaptation,
    user: User,
    via: str,
    steps: int = STEPS,
    seconds: int = SECONDS,
    variant: str = "",
    reason: str = "",
) -> Adaptation:
    """Tell the trainer to try the graft on a copy of the run.

    Args:
        variant: uid of the one that is tried instead of the proposed size; empty: that size.

    Raises:
        Problem: not allowed (403), decided already, or a trial is under way (409), or the
            blueprint has no such variant that may be tried (422).
    """
    lock_run(adaptation.run_id)
    adaptation.refresh_from_db()
    permission = may_shadow(adaptation, user)
    if not permission.allowed:
        status = 403 if permission.code == "not-eligible" else 409
        raise Problem(status, permission.code, permission.why)
    _issue(
        adaptation,
        steps,
        seconds,
        user=user,
        actor=Actor.person(user, via=via),
        reason=reason,
        variant=_variant(adaptation, variant),
    )
    return adaptation


def _variant(adaptation: Adaptation, uid: str) -> Variant | None:
    if not uid:
        return None
    found = waiting_variants(adaptation).filter(uid=uid).first()
    if found is None:
        raise Problem(422, "invalid", f"{adaptation.slug} has no variant {uid!r} to be tried.")
    return found


def shadow_at_random(adaptation: Adaptation) -> None:
    """Ask for a trial of a share of the proposals. In the transaction of the proposal.

    Which ones follows from the uid, so that neither the policy nor a person can choose them.
    """
    draw = int.from_bytes(hashlib.sha256(adaptation.uid.encode()).digest()[:8]) / 2**64
    if adaptation.remedy or 100 * draw >= settings.ESPER_SHADOW_PERCENT:
        return
    _issue(adaptation, STEPS, SECONDS, user=None, actor=SYSTEM, reason="one of the random share")


def note_shadow(command: Command, ack: CommandAck) -> None:
    """Store what the trainer has found. In the transaction of its answer."""
    trial = ShadowTrial.objects.filter(command=command).select_related("adaptation__run").first()
    if trial is None:
        return
    if ack.state is CommandState.APPLIED:
        told = {name: _number(ack.details.get(name)) for name in ("gain", "low", "high", "seconds")}
        counts = {name: _count(ack.details.get(name)) for name in ("steps", "looks")}
        ShadowTrial.objects.filter(pk=trial.pk).update(**told, **counts)
    run = trial.adaptation.run
    publish(
        topic=run_topic(run.uid),
        type="adaptation.shadow",
        data={"adaptation": trial.adaptation.uid, "state": str(ack.state), "reason": ack.reason},
    )


def _issue(
    adaptation: Adaptation,
    steps: int,
    seconds: int,
    *,
    user: User | None,
    actor: Actor,
    reason: str,
    variant: Variant | None = None,
) -> None:
    command = issue_command(
        run=adaptation.run,
        kind=CommandKind.SHADOW,
        adaptation_uid=adaptation.uid,
        layer=adaptation.layer,
        payload={
            "blueprint": adaptation.slug,
            "since": adaptation.since,
            "config": {} if variant else adaptation.config,
            "steps": steps,
            "seconds": seconds,
            # The trainer knows the usual size at its layer; the web process does not.
            **({"factors": variant.factors} if variant else {}),
        },
        ttl_seconds=TTL_SECONDS,
    )
    trial = ShadowTrial.objects.create(
        adaptation=adaptation,
        command=command,
        asked_by=user,
        variant=variant,
        most_steps=steps,
        most_seconds=seconds,
    )
    record(
        actor=actor,
        act="adaptation.shadow",
        object_kind="adaptation",
        object_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        reason=reason,
        data={
            "trial": trial.uid,
            "steps": steps,
            "seconds": seconds,
            "seq": command.seq,
            **({"variant": variant.uid} if variant else {}),
        },
    )


def _number(value: Any) -> float | None:
    return finite_or_none(float(value)) if is_number(value) else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**31 else None
