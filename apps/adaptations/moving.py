"""Moving a run to another project, with all that belongs to it."""

from __future__ import annotations

from django.db import transaction

from apps.accounts.actors import Actor
from apps.accounts.models import Project, User
from apps.accounts.policy import Act, may
from apps.accounts.projects import projects_of
from apps.audit.services import record
from apps.policies.models import PolicyVersion, Scope
from apps.recipes.models import Launch
from apps.rest.problems import Problem, not_found
from apps.runs.models import Run
from apps.runs.services import lock_run
from esper.contracts import LAUNCH_ENDED


@transaction.atomic
def move_run(*, run: Run, project: str, user: User, via: str, reason: str = "") -> Run:
    """Move a run that has ended. Its history goes with it: who sees it is decided by its project.

    A live run stays: its trainer registers in the project of its token, and after a restart it
    would begin a second run there.

    Args:
        project: uid of the project to move it to.

    Raises:
        Problem: no admin of both projects, no such project, it is there already, or the run or its
            launch has not ended.
    """
    target = projects_of(user).filter(uid=project).first()
    if target is None:
        raise not_found("project")
    run = lock_run(run.pk)
    for place in (run.project, target):
        permission = may(user, Act.MANAGE_PEOPLE, of=place)
        if not permission.allowed:
            raise Problem(403, permission.code, permission.why)
    if run.project_id == target.pk:
        raise Problem(422, "invalid", f"The run is in project {target.name} already.")
    launches = Launch.objects.filter(run_uid=run.uid)
    if not run.ended or launches.exclude(state__in=LAUNCH_ENDED).exists():
        raise Problem(
            409,
            "run-live",
            "Only a run that has ended is moved: the trainer of a live one would register again in "
            "the project of its token. End it first.",
        )
    source = run.project
    Run.objects.filter(pk=run.pk).update(project=target)
    launches.update(project=target)
    of_run = PolicyVersion.objects.filter(scope=Scope.RUN, target=run.uid)
    of_run.update(project=str(target.pk))
    run.refresh_from_db()
    _record(run, source, target, Actor.person(user, via=via), reason)
    return run


def _record(run: Run, source: Project, target: Project, actor: Actor, reason: str) -> None:
    record(
        actor=actor,
        act="run.moved",
        object_kind="run",
        object_uid=run.uid,
        run_uid=run.uid,
        reason=reason,
        data={"from": source.uid, "to": target.uid},
    )
