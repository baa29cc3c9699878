"""Commands to the trainer: a graft whose kernel is staged on its host, a remedy, an undo."""

from __future__ import annotations

import logging
from pathlib import Path

from django.conf import settings
from django.db import transaction

from apps.accounts.actors import Actor, ActorKind
from apps.adaptations.history import freeze_asks, why_not_sent
from apps.adaptations.lifecycle import LONGEST_DOUBT_SECONDS, transition
from apps.adaptations.models import Adaptation
from apps.adaptations.turns import its_turn
from apps.blueprints.models import KnownRemedy
from apps.kernels.services import kernel_store
from apps.policies.selectors import next_freeze
from apps.rest.problems import Problem
from apps.runs.services import issue_command, lock_run
from esper.contracts import AdaptationState, CommandKind
from esper.exceptions import KernelError

log = logging.getLogger(__name__)

# Late is better than never: an undo repeats nothing, and a restart of the trainer voids it.
UNDO_SECONDS = LONGEST_DOUBT_SECONDS


def dispatch_adaptation(adaptation_uid: str, *, worker: str) -> None:
    """Send the kernel to the trainer. Does nothing for an adaptation that is dispatched already."""
    adaptation = Adaptation.objects.select_related("run", "kernel").get(uid=adaptation_uid)
    if adaptation.state != AdaptationState.COMPILED or adaptation.kernel is None:
        return
    if not its_turn(adaptation):
        return  # the plan is advanced when the member before it is in the model
    if adaptation.run.host == settings.ESPER_HOST_NAME:
        _stage(adaptation.kernel.digest)
    _write_command(adaptation, Actor(ActorKind.WORKER, worker))


def stage_kernel(adaptation_uid: str) -> None:
    """On the run's host: its kernel is put where the trainer looks first."""
    adaptation = Adaptation.objects.select_related("run", "kernel").get(uid=adaptation_uid)
    if adaptation.kernel is not None and adaptation.run.host == settings.ESPER_HOST_NAME:
        _stage(adaptation.kernel.digest)


def _stage(digest: str) -> None:
    """Save the trainer the download; it checks digest and signature of every file anyway."""
    from esper.compilation.store import stage

    try:
        stage(kernel_store().get(digest), digest, Path(settings.ESPER_STAGE_DIR))
    except (OSError, KernelError) as error:
        log.warning("kernel %s was not staged, the trainer will download it: %s", digest, error)


def _changes_nothing(adaptation: Adaptation) -> bool:
    known = KnownRemedy.objects.filter(slug=adaptation.remedy).first()
    return known is not None and known.changes_nothing


def send_remedy(adaptation: Adaptation, *, actor: Actor) -> Adaptation:
    """Command the trainer to apply it. In the transaction of the approval.

    Raises:
        Problem: 409, a freeze is in effect. Whoever may get here has looked before.
    """
    run = adaptation.run
    begins = None
    if not _changes_nothing(adaptation):
        begins = next_freeze(run.project_id)  # before the next line: one may begin in between
        if frozen := freeze_asks(run):
            raise Problem(409, "freeze", frozen[0])
    policy = adaptation.safety_policy.safety_policy()
    issue_command(
        run=run,
        kind=CommandKind.REMEDY,
        adaptation_uid=adaptation.uid,
        layer=adaptation.layer,
        payload={
            "remedy": adaptation.remedy,
            "config": adaptation.config,
            "finding": adaptation.finding,
        },
        ttl_seconds=policy.dispatch_timeout_seconds,
        not_after=begins,
    )
    return transition(adaptation, AdaptationState.DISPATCHED, actor=actor, run_epoch=run.epoch)


@transaction.atomic
def _write_command(adaptation: Adaptation, actor: Actor) -> None:
    run = lock_run(adaptation.run_id)
    if not its_turn(adaptation):
        return
    begins = next_freeze(run.project_id)  # before the next line: one may begin in between
    frozen = why_not_sent(adaptation, run)
    if frozen:  # a switch or a freeze takes effect when it is committed
        transition(adaptation, AdaptationState.CANCELLED, actor=actor, reason=frozen)
        return
    policy = adaptation.safety_policy.safety_policy()
    issue_command(
        run=run,
        kind=CommandKind.GRAFT,
        adaptation_uid=adaptation.uid,
        layer=adaptation.layer,
        payload={"since": adaptation.since} if adaptation.since else {},
        kernel_digest=adaptation.kernel.digest if adaptation.kernel else "",
        ttl_seconds=policy.dispatch_timeout_seconds,
        not_after=begins,
    )
    transition(adaptation, AdaptationState.DISPATCHED, actor=actor, run_epoch=run.epoch)


def request_undo(adaptation: Adaptation, *, reason: str, did_harm: bool = False) -> None:
    """Command the trainer to take it back. In the transaction of ``rolling_back``.

    On probation a graft is taken out hard. A remedy that did not help only ends: a return to the
    state before it would be a return to the fault. A person may want just that.

    Args:
        did_harm: of a remedy: the state before it was better.
    """
    by_person = adaptation.taken_back_by_id is not None
    to_before = by_person or did_harm or not adaptation.remedy
    hard = adaptation.kept_at is None and to_before
    issue_command(
        run=adaptation.run,
        kind=CommandKind.UNDO,
        adaptation_uid=adaptation.uid,
        layer=adaptation.layer,
        payload={"hard": hard, "reason": reason},
        ttl_seconds=UNDO_SECONDS,
    )


def leave_in_doubt(adaptation: Adaptation, *, actor: Actor, reason: str) -> None:
    """No answer says what the trainer did: ask it. In a transaction."""
    transition(adaptation, AdaptationState.IN_DOUBT, actor=actor, reason=reason)
    ask_what_is_held(adaptation)


def ask_what_is_held(adaptation: Adaptation) -> None:
    """The trainer answers commands in order, so that its answer covers every earlier one."""
    issue_command(
        run=adaptation.run,
        kind=CommandKind.REPORT_HELD,
        adaptation_uid=adaptation.uid,
        layer=adaptation.layer,
        ttl_seconds=LONGEST_DOUBT_SECONDS,
    )


def tell_kept(adaptation: Adaptation, *, reason: str) -> None:
    """Tell the trainer that its guard can stop and its script may merge. In the transaction."""
    issue_command(
        run=adaptation.run,
        kind=CommandKind.KEEP,
        adaptation_uid=adaptation.uid,
        layer=adaptation.layer,
        payload={"reason": reason},
        ttl_seconds=3600,
    )
