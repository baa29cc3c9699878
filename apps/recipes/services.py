"""People start, stop and resume launches here; a worker of the host does it (``hosting``)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from django.conf import settings
from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import DEFAULT_PROJECT, Project, User
from apps.accounts.policy import Act, OfProject, may
from apps.accounts.projects import projects_of
from apps.accounts.visibility import everything
from apps.audit.services import record
from apps.notifications.services import enqueue, publish, run_topic
from apps.recipes.files import RecipeError, check_parameters
from apps.recipes.lifecycle import announce, transition
from apps.recipes.models import Launch, Recipe, StoredState
from apps.recipes.selectors import launch_of_run, stored_states
from apps.rest.problems import Problem, not_found
from apps.runs.models import Run
from apps.workers.services import queue_is_served
from esper.contracts import LAUNCH_ENDED, LaunchState

START_TASK = "recipes.start"
STOP_TASK = "recipes.stop"
PICK_UP_SECONDS = 60  # a request that no worker of the host has taken by then fails
S = LaunchState


def host_queue(host: str) -> str:
    return f"host.{host}"


@everything()  # the places on a host are everybody's
@transaction.atomic
def start_recipe(
    *,
    host: str,
    slug: str,
    digest: str,
    parameters: Mapping[str, object],
    user: User,
    via: str,
    project: str = "",
) -> Launch:
    """Ask a host to start one of its recipes; it gets the slug and the checked parameters only.

    Hosts are everybody's, so that the account needs the right to start recipes; and in the project
    of the new run, that to attach runs.

    Args:
        project: uid of the new run's project; empty: the default one.

    Raises:
        Problem: not allowed, unknown recipe, its file has changed since it was shown, a parameter
            is not allowed, or the host has no worker or no free place.
    """
    place = _place(user, project)
    _check_right(user, Act.START_RECIPE)
    _check_right(user, Act.CREATE_RUN, of=place)
    recipe = Recipe.objects.select_for_update().filter(host=host, slug=slug).first()
    if recipe is None or not recipe.present:
        raise not_found("recipe")
    _check_recipe(recipe, digest)
    try:
        values = check_parameters(recipe.parameter_list(), parameters)
    except RecipeError as error:
        raise Problem(422, "invalid", str(error)) from error
    _check_host(host)
    launch = Launch.objects.create(
        recipe=recipe,
        project=place,
        digest=recipe.digest,
        parameters=values,
        requested_by=user,
        requested_at=timezone.now(),
    )
    announce(launch, "launch.requested", actor=Actor.person(user, via=via))
    _notify_host(launch, START_TASK)
    return launch


@transaction.atomic
def branch_run(
    *,
    run: Run,
    user: User,
    via: str,
    state: str = "",
    parameters: Mapping[str, object],
    reason: str = "",
) -> Launch:
    """Start a new run of the same recipe, on the same host, from a stored state of this one.

    The recipe must be the one that this run was started from: another may not read its states.

    Args:
        state: the name of a stored state; empty: the newest.
        parameters: those that differ from this run's.

    Raises:
        Problem: not allowed, not the run of a recipe, the recipe cannot branch or has changed, no
            such state is stored, a parameter is not allowed, or the host has no worker or place.
    """
    _check_right(user, Act.START_RECIPE)
    _check_right(user, Act.CREATE_RUN, of=run)
    parent = launch_of_run(run.uid)
    if parent is None:
        raise Problem(
            409,
            "not-a-recipe-run",
            f"{run} was not started from a recipe, so Esper cannot start a branch of it.",
        )
    recipe = Recipe.objects.select_for_update().get(pk=parent.recipe_id)
    if not recipe.branchable:
        raise Problem(
            409,
            "not-branchable",
            f"The recipe {recipe} has no branch_argv, so it does not say how a run begins from a "
            "stored state.",
        )
    _check_recipe(recipe, parent.digest)
    stored = _stored_state(parent, state)
    try:
        values = check_parameters(recipe.parameter_list(), {**parent.parameters, **parameters})
    except RecipeError as error:
        raise Problem(422, "invalid", str(error)) from error
    _check_host(recipe.host)
    launch = Launch.objects.create(
        recipe=recipe,
        project_id=run.project_id,
        digest=recipe.digest,
        parameters=values,
        requested_by=user,
        requested_at=timezone.now(),
        branch_of=parent,
        branch_state=stored.name,
        branch_step=stored.step,
    )
    _announce_branch(run, launch, actor=Actor.person(user, via=via), reason=reason)
    _notify_host(launch, START_TASK)
    return launch


def _announce_branch(run: Run, launch: Launch, *, actor: Actor, reason: str) -> None:
    announce(launch, "launch.requested", actor=actor, reason=reason)
    data = {"launch": launch.uid, "branch": launch.run_uid, "state": launch.branch_state}
    record(
        actor=actor,
        act="run.branched",
        object_kind="run",
        object_uid=run.uid,
        run_uid=run.uid,
        reason=reason,
        data={**data, "step": launch.branch_step, "parameters": launch.parameters},
    )
    publish(topic=run_topic(run.uid), type="launch.branched", data={**data, "by": actor.name})


def _stored_state(launch: Launch, name: str) -> StoredState:
    known = stored_states(launch)
    if not known:
        raise Problem(
            409,
            "no-stored-state",
            f"No state of L-{launch.number} is stored on {launch.recipe.host} yet. Keep a "
            "checkpoint first, or wait until the script has written one.",
        )
    found = next((state for state in known if not name or state.name == name), None)
    if found is None:
        raise Problem(
            409,
            "state-gone",
            f"The state {name!r} is not stored any more. The newest is {known[0].name}, of step "
            f"{known[0].step}.",
            states=[state.name for state in known],
        )
    return found


@transaction.atomic
def stop_launch(*, launch: Launch, user: User, via: str, reason: str) -> Launch:
    """Stop a launch: SIGTERM, and SIGKILL after the recipe's grace period.

    Raises:
        Problem: not allowed, or the launch has ended or is stopping already.
    """
    _check_right(user, Act.STOP_LAUNCH, of=launch)
    actor = Actor.person(user, via=via)
    if launch.ended or launch.state == S.STOPPING:
        raise Problem(
            409, "launch-moved", f"L-{launch.number} is {launch.state} already.", state=launch.state
        )
    who = {"stopped_by": user.get_username(), "stop_requested_at": timezone.now()}
    if launch.state == S.REQUESTED:
        return transition(
            launch, S.STOPPED, actor=actor, reason=reason or "stopped before it was started", **who
        )
    transition(launch, S.STOPPING, actor=actor, reason=reason, **who)
    _notify_host(launch, STOP_TASK)
    return launch


@transaction.atomic
def resume_launch(*, launch: Launch, user: User, via: str, reason: str) -> Launch:
    """Start a launch again from its checkpoint, as the next attempt of the same run.

    Raises:
        Problem: not allowed, not stopped or failed, not resumable, or the recipe has changed.
    """
    _check_right(user, Act.START_RECIPE)
    _check_right(user, Act.CREATE_RUN, of=launch)
    recipe = Recipe.objects.select_for_update().get(pk=launch.recipe_id)
    if launch.state not in (S.STOPPED, S.FAILED):
        raise Problem(
            409,
            "launch-moved",
            f"L-{launch.number} is {launch.state}. Only a stopped or failed launch can be resumed.",
            state=launch.state,
        )
    if not recipe.resumable:
        raise Problem(
            409,
            "not-resumable",
            "This recipe has no resume_argv: start it again instead.",
        )
    _check_recipe(recipe, launch.digest)
    _check_host(recipe.host)
    transition(
        launch,
        S.REQUESTED,
        actor=Actor.person(user, via=via),
        reason=reason,
        attempt=launch.attempt + 1,
        requested_at=timezone.now(),
        started_at=None,
        seen_at=None,
        stop_requested_at=None,
        stopped_by="",
        pid=None,
        exit_code=None,
        exit_signal="",
        last_lines=[],
    )
    _notify_host(launch, START_TASK)
    return launch


def _place(user: User, project: str) -> Project:
    """Raises ``Problem`` 404 where the person sees no such project."""
    wanted = {"uid": project} if project else {"pk": DEFAULT_PROJECT}
    found = projects_of(user).filter(**wanted).first()
    if found is None:
        raise not_found("project")
    return found


def _check_right(user: User, act: Act, *, of: OfProject | None = None) -> None:
    permission = may(user, act, of=of)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)


def _check_recipe(recipe: Recipe, digest: str) -> None:
    if not recipe.usable:
        why = recipe.problem or "its file was removed."
        raise Problem(409, "recipe-unusable", f"{recipe} cannot be used: {why}")
    if digest != recipe.digest:
        raise Problem(
            409,
            "recipe-changed",
            f"The file of {recipe} has changed since you were shown it. Load it again.",
            digest=recipe.digest,
        )


def _check_host(host: str) -> None:
    if not queue_is_served(host_queue(host)):
        raise Problem(409, "host-away", f"No worker serves {host}. Start one there first.")
    live = Launch.objects.filter(recipe__host=host).exclude(state__in=LAUNCH_ENDED).count()
    if live >= settings.ESPER_LAUNCH_LIMIT:
        raise Problem(
            409,
            "host-full",
            f"{host} has {live} live launches, which is the limit. Stop one.",
        )


def _notify_host(launch: Launch, task: str) -> None:
    enqueue(task=task, queue=host_queue(launch.recipe.host), args=[launch.uid])


def sweep() -> int:
    """Fail requests that no worker has taken, and mark launches of silent hosts lost."""
    now = timezone.now()
    untaken = Launch.objects.filter(
        state=S.REQUESTED, requested_at__lt=now - timedelta(seconds=PICK_UP_SECONDS)
    )
    silent = now - timedelta(seconds=settings.ESPER_LAUNCH_LOST_SECONDS)
    # A launch that is being started has no seen_at yet.
    unseen = Q(seen_at__lt=silent) | Q(seen_at=None, requested_at__lt=silent)
    lost = Launch.objects.filter(unseen, state__in=[S.STARTING, S.RUNNING, S.STOPPING])
    moved = sum(_move(launch, S.FAILED, "no worker of its host took it") for launch in untaken)
    seconds = settings.ESPER_LAUNCH_LOST_SECONDS
    why = f"its host has not reported for {seconds} s; it may still run there"
    return moved + sum(_move(launch, S.LOST, why) for launch in lost)


def _move(launch: Launch, to: LaunchState, reason: str) -> bool:
    try:
        with transaction.atomic():
            transition(launch, to, actor=SYSTEM, reason=reason)
    except Problem:  # a person or the host has moved it meanwhile
        return False
    return True
