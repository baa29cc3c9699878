"""Stopping adaptation: of all runs, of a project, of one run. Training goes on."""

from __future__ import annotations

from django.db import transaction
from django.db.models import QuerySet

from apps.accounts.actors import Actor
from apps.accounts.models import Project, User
from apps.accounts.policy import Act, may
from apps.accounts.visibility import everything
from apps.audit.services import record
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.policies.models import ProjectSwitch, Switch
from apps.policies.services import adaptation_switch, kill_over, project_switch
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import request_pause, tell_trainer
from esper.contracts import RUN_ENDED


@everything()
@transaction.atomic
def set_adaptation_switch(*, on: bool, user: User, via: str, reason: str = "") -> None:
    """The kill switch: stop (or allow) all adaptation; training continues everywhere.

    It needs no reason, so that nothing delays it. Every live run gets a command, and acknowledges.

    Raises:
        Problem: not allowed.
    """
    _check_may_turn(user, None, on=on)
    live = _locked(Run.objects.all())
    actor = Actor.person(user, via=via)
    _turn(adaptation_switch(), on=on, actor=actor, reason=reason)
    _tell_trainers(live, on=on, actor=actor, reason=reason)


@everything()
@transaction.atomic
def set_project_switch(
    *, project: Project, on: bool, user: User, via: str, reason: str = ""
) -> ProjectSwitch:
    """As :func:`set_adaptation_switch`, for the runs of one project.

    Raises:
        Problem: not allowed.
    """
    _check_may_turn(user, project, on=on)
    live = _locked(Run.objects.filter(project=project))
    actor = Actor.person(user, via=via)
    switch = project_switch(project)
    _turn(switch, on=on, actor=actor, reason=reason, project=project)
    _tell_trainers(live, on=on, actor=actor, reason=reason)
    return switch


def request_adaptation_pause(
    *, run: Run, paused: bool, user: User, via: str, reason: str = ""
) -> Run:
    """Pause or resume adaptation of one run; it cannot be resumed while adaptation is killed.

    Raises:
        Problem: not allowed, the run has ended, or adaptation is switched off.
    """
    kill = None if paused else kill_over(run.project_id)
    blocked = (
        ""
        if kill is None
        else f"{kill.in_words}. Switch it on first; a run that a person has paused stays paused."
    )
    return request_pause(run=run, paused=paused, user=user, via=via, reason=reason, blocked=blocked)


def _check_may_turn(user: User, project: Project | None, *, on: bool) -> None:
    """A program may stop adaptation, where its role may; to let it go on takes a person."""
    if on and user.is_service:
        raise Problem(403, "service-account", "A person has to switch adaptation on again.")
    permission = may(user, Act.KILL, of=project)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)


def _locked(runs: QuerySet[Run]) -> list[Run]:
    """The live ones."""
    return list(runs.exclude(state__in=RUN_ENDED).order_by("pk").select_for_update())


def _turn(
    switch: Switch, *, on: bool, actor: Actor, reason: str, project: Project | None = None
) -> None:
    switch.on, switch.changed_by, switch.reason = on, actor.name, reason
    switch.save()
    act = "switch.on" if on else "switch.killed"
    record(
        actor=actor,
        act=act,
        object_kind="switch" if project is None else "project",
        object_uid="adaptation" if project is None else project.uid,
        reason=reason,
    )
    where = "everywhere" if project is None else f"in project {project.name}"
    title = f"{where}, by {actor.name}{f': {reason}' if reason else ''}"
    publish(
        topic=SYSTEM_TOPIC,
        type=act,
        data={"by": actor.name, "reason": reason, "title": title},
        project_id=None if project is None else project.pk,
    )


def _tell_trainers(live: list[Run], *, on: bool, actor: Actor, reason: str) -> None:
    """Where it is switched on, a person's pause of a run and a wider or narrower kill stay."""
    still_killed = {key: kill_over(key) is not None for key in {run.project_id for run in live}}
    for run in live:
        if on and (run.adaptation_paused_by or still_killed[run.project_id]):
            continue
        words = reason or ("switch.on" if on else "switch.killed")
        tell_trainer(run=run, paused=not on, actor=actor, reason=words)
