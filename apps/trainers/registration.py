"""A trainer registers its run, or goes on with it after a restart."""

from __future__ import annotations

from django.conf import settings
from django.db import transaction

from apps.accounts.actors import Actor
from apps.accounts.models import DEFAULT_PROJECT, User
from apps.adaptations.services import put_in_doubt, withdraw_proposals
from apps.kernels.services import plan_warm_up
from apps.policies.services import current_policy
from apps.rest.clock import now as database_now
from apps.runs import services as runs
from apps.runs.services import Registration
from apps.violations.services import close_findings
from esper.contracts import protocol, signing, telemetry_body


@transaction.atomic
def register_run(
    *,
    owner: User,
    actor: Actor,
    spec: protocol.Registration,
    run_uid: str = "",
    project_id: int = DEFAULT_PROJECT,
) -> Registration:
    """Registers a run.

    On a restart, what the former trainer did is in doubt, its findings are over, and what it
    proposed and nobody has decided is withdrawn.
    """
    registration = runs.register_run(
        owner=owner, actor=actor, spec=spec, run_uid=run_uid, project_id=project_id
    )
    run = registration.run
    if registration.resumed:
        put_in_doubt(run, actor)
        withdraw_proposals(run, actor)
        close_findings(run=run)
    else:
        plan_warm_up(run_uid=run.uid, layers=run.layers, capability=run.capability)
    return registration


def registration_answer(registration: Registration) -> protocol.Registered:
    run = registration.run
    return protocol.Registered(
        uid=run.uid,
        number=run.number,
        epoch=run.epoch,
        token=registration.token,
        resumed=registration.resumed,
        command_key=signing.public_key(settings.ESPER_COMMAND_KEY),
        kernel_key=settings.ESPER_KERNEL_PUBLIC_KEY,
        stream=f"/ws/v1/trainer/{run.uid}",
        last_command_seq=run.command_seq,
        policy=current_policy(run).safety_policy(),
        server_time=database_now().timestamp(),
        telemetry_types=(telemetry_body.MEDIA_TYPE,),
    )
