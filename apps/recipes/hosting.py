"""What a worker does for its host: register recipes, and start, watch and stop launches.

The trainer is a child of its launch monitor (``apps.recipes.launch_monitor``) and outlives this
worker. The next worker of this host finds both by process id and start time, and reads how the
trainer ended from ``exit.json``.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.db import transaction
from django.utils import timezone

from apps.accounts import services as accounts
from apps.accounts.actors import Actor, ActorKind
from apps.accounts.models import ApiToken
from apps.notifications.services import (
    SYSTEM_TOPIC,
    group_name,
    launch_topic,
    notify,
    publish,
    run_topic,
)
from apps.recipes.files import STATE, RecipeError, RecipeFile, check_parameters, read_folder
from apps.recipes.hostlog import read_log, tail_offset
from apps.recipes.launch_monitor import EXIT_FILE, PROCESS_FILE, Order, read_note
from apps.recipes.lifecycle import transition
from apps.recipes.models import Launch, LogChunk, Recipe, StoredState
from apps.recipes.stored_states import Found, copy_state, find_states
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.runs.services import lock_run, set_state
from esper.contracts import RUN_ENDED, LaunchState, RunState, TokenScope
from hosts.keyring import write_private
from hosts.processes import (
    MARK,
    process_identity,
    signal_group,
    signal_process,
)

log = logging.getLogger(__name__)

S = LaunchState
LOG_KEPT_BYTES = 256 * 1024  # on the server; the host keeps more
LOG_CHUNK_BYTES = 64 * 1024
SEEN_EVERY = timedelta(seconds=5)
START_SECONDS = 60  # for the launch monitor to write process.json; a cold disk under load is slow
HARD_STOP_SECONDS = 10  # after the grace period, if the launch monitor has not done it
MONITOR_START_SECONDS = 30
TOKEN_LIFE = timedelta(days=30)
PLACE_FILE = "checkpoints.txt"  # in a launch's folder: where its checkpoints are
STATE_FOLDER = "branched-from"  # in a branch's folder: the copy of the state that it begins from
# Variables that every program gets; a recipe names further ones.
_COMMON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "OMP_NUM_THREADS")
_PROJECT = Path(__file__).resolve().parents[2]


def _worker() -> Actor:
    return Actor(ActorKind.WORKER, settings.ESPER_HOST_NAME)


def launch_folder(launch: Launch) -> Path:
    """The folder of one launch on its host."""
    return Path(settings.ESPER_LAUNCH_DIR) / launch.uid


# --- recipes ------------------------------------------------------------------------------------


def register_recipes() -> int:
    """Register the recipes in this host's folder; return how many have changed."""
    found = read_folder(settings.ESPER_RECIPES)
    host, changed = settings.ESPER_HOST_NAME, 0
    known = {recipe.slug: recipe for recipe in Recipe.objects.filter(host=host)}
    for slug, recipe in found.recipes.items():
        values = {**recipe.to_wire(), "present": True, "problem": ""}
        changed += _register(known.pop(slug, None), host, slug, values)
    for name, why in found.problems.items():
        slug = name.removesuffix(".toml")
        values = {"name": name, "digest": "", "present": True, "problem": why}
        changed += _register(known.pop(slug, None), host, slug, values)
    removed = [recipe.pk for recipe in known.values() if recipe.present]
    changed += Recipe.objects.filter(pk__in=removed).update(present=False)
    if changed:
        with transaction.atomic():
            publish(topic=SYSTEM_TOPIC, type="recipe.changed", data={"host": host})
    return changed


def _register(known: Recipe | None, host: str, slug: str, values: dict[str, Any]) -> int:
    if known and all(getattr(known, name) == value for name, value in values.items()):
        return 0
    now = timezone.now()
    Recipe.objects.update_or_create(host=host, slug=slug, defaults={**values, "registered_at": now})
    return 1


# --- start --------------------------------------------------------------------------------------


def start(launch: Launch) -> None:
    """Start a requested launch, once."""
    if launch.state != S.REQUESTED:
        return
    try:
        with transaction.atomic():
            transition(launch, S.STARTING, actor=_worker(), seen_at=timezone.now())
    except Problem:  # another worker of this host starts it, or a person has stopped it
        return
    try:
        recipe = _recipe_of(launch)
        order = _order(launch, recipe)
        with transaction.atomic():
            Launch.objects.filter(pk=launch.pk).update(command=order.argv)
        _spawn(order)
    except subprocess.TimeoutExpired:  # a slow machine; the next look finds out
        log.warning("L-%s takes long to start", launch.number)
    except (RecipeError, OSError, subprocess.CalledProcessError) as error:
        _end(launch, S.FAILED, f"it could not be started: {error}")
        return
    look_at(launch)


def _recipe_of(launch: Launch) -> RecipeFile:
    """This host's file, if it is the one that the operator was shown."""
    found = read_folder(settings.ESPER_RECIPES)
    slug = launch.recipe.slug
    if slug not in found.recipes:
        raise RecipeError(found.problems.get(f"{slug}.toml", "the file was removed"))
    recipe = found.recipes[slug]
    if recipe.digest != launch.digest:
        register_recipes()
        raise RecipeError("the file has changed since the operator was shown it")
    return recipe


def _order(launch: Launch, recipe: RecipeFile) -> Order:
    if not settings.ESPER_SERVER:
        raise RecipeError("ESPER_SERVER is not set for this worker, so the run could not connect")
    folder = launch_folder(launch)
    checkpoints = recipe.checkpoints / launch.uid if recipe.checkpoints else folder / "checkpoints"
    for needed in (folder, checkpoints, folder / "journal"):
        needed.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(folder / PLACE_FILE, str(checkpoints))
    (folder / EXIT_FILE).unlink(missing_ok=True)
    values = check_parameters(recipe.parameters, launch.parameters)
    given = {
        "python": sys.executable,
        "run": f"{recipe.slug}-{launch.number}",
        "checkpoints": str(checkpoints),
    }
    if launch.branch_of is not None:
        given[STATE] = str(_state_to_begin_from(launch, launch.branch_of))
    return Order(
        attempt=launch.attempt,
        argv=recipe.command(values, given, resume=launch.attempt > 1),
        directory=str(recipe.directory),
        environment=_environment(launch, recipe),
        folder=str(folder),
        grace_seconds=recipe.grace_seconds,
    )


def _state_to_begin_from(launch: Launch, parent: Launch) -> Path:
    """The branch's own copy, so that it can be started again when its parent's states are gone."""
    target = launch_folder(launch) / STATE_FOLDER
    copied = target / launch.branch_state
    if launch.branch_digest and copied.exists():
        return copied

    def progress() -> None:
        Launch.objects.filter(pk=launch.pk).update(seen_at=timezone.now())

    try:
        digest = copy_state(_checkpoints(parent), launch.branch_state, target, progress)
    except RecipeError:
        list_states(parent)  # so that the next person is not offered it
        raise
    Launch.objects.filter(pk=launch.pk).update(branch_digest=digest)
    launch.branch_digest = digest
    return copied


def _checkpoints(launch: Launch) -> Path:
    """Where a launch keeps its checkpoints, as noted when it was started."""
    try:
        return Path((launch_folder(launch) / PLACE_FILE).read_text())
    except FileNotFoundError:
        return launch_folder(launch) / "checkpoints"


def _environment(launch: Launch, recipe: RecipeFile) -> dict[str, str]:
    """A few of the worker's variables, and a token that registers this run only."""
    passed = {name: os.environ[name] for name in (*_COMMON, *recipe.environment, MARK)
              if name in os.environ}  # fmt: skip
    _revoke_tokens(launch)
    _, secret = accounts.issue_token(
        owner=launch.requested_by,
        name=f"launch L-{launch.number}, attempt {launch.attempt}",
        scopes=[TokenScope.RUNS_CREATE],
        run_uid=launch.run_uid,
        project_id=launch.project_id,
        expires_at=timezone.now() + TOKEN_LIFE,
        actor=_worker(),
    )
    return passed | {
        "ESPER_SERVER": settings.ESPER_SERVER,
        "ESPER_TOKEN": secret,
        "ESPER_STATE_DIR": str(launch_folder(launch) / "journal"),
        "ESPER_STAGE_DIR": str(settings.ESPER_STAGE_DIR),
        "PYTHONUNBUFFERED": "1",
    }


def _spawn(order: Order) -> None:
    """Start the launch monitor; return once the trainer has started or failed to start."""
    environment = {name: os.environ[name] for name in (*_COMMON, MARK) if name in os.environ}
    paths = [str(_PROJECT), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-m", "apps.recipes.launch_monitor"],
        input=json.dumps(asdict(order)).encode(),
        cwd=_PROJECT,
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        timeout=MONITOR_START_SECONDS,
        check=True,
    )


# --- watch --------------------------------------------------------------------------------------


def watch() -> None:
    """Look once at every launch of this host that has not ended."""
    open_states = [S.REQUESTED, S.STARTING, S.RUNNING, S.STOPPING, S.LOST]
    launches = Launch.objects.filter(
        recipe__host=settings.ESPER_HOST_NAME, state__in=open_states
    ).select_related("recipe", "requested_by", "branch_of")
    for launch in launches:
        if launch.state == S.REQUESTED:
            start(launch)  # its task message may be lost
        else:
            look_at(launch)


def look_at(launch: Launch) -> None:
    """Record what this host knows of one launch."""
    try:
        _look_at(launch)
    except Problem as problem:  # it was moved meanwhile: the next look reads the new state
        log.info("L-%s: %s", launch.number, problem)


def _look_at(launch: Launch) -> None:
    folder = launch_folder(launch)
    # In this order: a monitor that is gone has written its last note, unless it was killed.
    process = read_note(folder / PROCESS_FILE, launch.attempt)
    is_watched = process is not None and (
        process_identity(process["monitor_pid"]) == process["monitor_identity"]
    )
    ended = read_note(folder / EXIT_FILE, launch.attempt)
    send_log(launch)
    list_states(launch)
    if ended is not None:
        _settle(launch, ended)
    elif process is None:
        _settle_unstarted(launch)
    elif is_watched:
        _note_alive(launch, process)
    else:
        _end_orphan(process)
        _end(launch, S.FAILED, "its trainer and its launch monitor were killed from outside")


def _settle(launch: Launch, ended: dict[str, Any]) -> None:
    signal_name, code = ended["signal"], ended["code"]
    how = f"killed by {signal_name}" if signal_name else f"exit code {code}"
    facts = {
        "exit_code": code,
        "exit_signal": signal_name,
        "last_lines": ended["last_lines"],
    }
    if ended["error"]:
        _end(launch, S.FAILED, f"it could not be started: {ended['error']}", **facts)
    elif launch.state == S.STOPPING or ended["asked"]:
        by = f"by {launch.stopped_by}" if launch.stopped_by else "together with this host's Esper"
        late = ", killed after its grace period" if ended["killed"] else ""
        why = f": {launch.reason}" if launch.stopped_by and launch.reason else ""
        _end(launch, S.STOPPED, f"stopped {by}{why} ({how}{late})", **facts)
    elif code == 0:
        _end(launch, S.FINISHED, how, **facts)
    else:
        _end(launch, S.FAILED, how, **facts)


def _settle_unstarted(launch: Launch) -> None:
    """There is no process.json: a young launch may be starting, an old one has failed."""
    late = timezone.now() - timedelta(seconds=START_SECONDS)
    if (launch.seen_at or launch.requested_at) < late:
        _end(launch, S.FAILED, "its worker died while it started the trainer")


def _note_alive(launch: Launch, process: dict[str, Any]) -> None:
    now = timezone.now()
    if launch.state in (S.STARTING, S.LOST):
        to = S.STOPPING if launch.stop_requested_at else S.RUNNING
        with transaction.atomic():
            transition(
                launch,
                to,
                actor=_worker(),
                reason="" if launch.state == S.STARTING else "its host reports again",
                pid=process["trainer_pid"],
                started_at=launch.started_at or now,
                seen_at=now,
            )
    elif launch.seen_at is None or now - launch.seen_at > SEEN_EVERY:
        Launch.objects.filter(pk=launch.pk, attempt=launch.attempt).update(seen_at=now)
    if launch.state == S.STOPPING:
        _stop(launch, process)


def _stop(launch: Launch, process: dict[str, Any]) -> None:
    signal_process(process["monitor_pid"], signal.SIGTERM)  # repeating it has no effect
    limit = timedelta(seconds=launch.recipe.grace_seconds + HARD_STOP_SECONDS)
    if launch.stop_requested_at and timezone.now() - launch.stop_requested_at > limit:
        _end_orphan(process)
        signal_process(process["monitor_pid"], signal.SIGKILL)


def _end_orphan(process: dict[str, Any]) -> None:
    """Kill a trainer whose monitor is gone; never another process that has the same id."""
    if process_identity(process["trainer_pid"]) == process["trainer_identity"]:
        signal_group(process["trainer_pid"], signal.SIGKILL)


def _end(launch: Launch, to: LaunchState, reason: str, **facts: Any) -> None:
    """End an attempt, revoke its token, and end its run, which has no trainer any more."""
    with transaction.atomic():
        run = Run.objects.filter(uid=launch.run_uid).first()
        if run is not None:
            run = lock_run(run.pk)  # the run is locked first, as everywhere
        transition(launch, to, actor=_worker(), reason=reason[:2000], **facts)
        _revoke_tokens(launch)
        if run is not None and run.state not in RUN_ENDED:
            state = RunState.FAILED if to is S.FAILED else RunState.FINISHED
            why = f"launch L-{launch.number} {to}: {reason[:300]}"
            set_state(run=run, state=state, actor=_worker(), reason=why)


def _revoke_tokens(launch: Launch) -> None:
    for token in ApiToken.objects.filter(run_uid=launch.run_uid, revoked_at=None):
        accounts.revoke_token(token=token, actor=_worker())


# --- stored states ------------------------------------------------------------------------------

_listed: dict[str, list[Found]] = {}  # uid of a launch -> what the server knows of its states


def list_states(launch: Launch) -> None:
    """Tell the server which states a branch may begin from, where that has changed."""
    found = find_states(_checkpoints(launch))
    if _listed.get(launch.uid) == found:
        return
    with transaction.atomic():
        names = [state.name for state in found]
        gone = StoredState.objects.filter(launch=launch).exclude(name__in=names)
        changed, _ = gone.delete()
        for state in found:
            values = asdict(state)
            del values["name"]
            StoredState.objects.update_or_create(launch=launch, name=state.name, defaults=values)
        if found or changed:
            publish(topic=launch_topic(launch.uid), type="launch.states", data={})
            publish(topic=run_topic(launch.run_uid), type="launch.states", data={})
    _listed[launch.uid] = found


# --- log ----------------------------------------------------------------------------------------


def send_log(launch: Launch) -> None:
    """Store what the log has got since the last look; of a long backlog only the end."""
    folder = launch_folder(launch)
    after = max(launch.log_end, tail_offset(folder, LOG_KEPT_BYTES))
    for _ in range(LOG_KEPT_BYTES // LOG_CHUNK_BYTES + 1):
        offset, data = read_log(folder, after, limit=LOG_CHUNK_BYTES)
        if not data or not _store_chunk(launch, offset, data):
            return
        after = offset + len(data)


def _store_chunk(launch: Launch, offset: int, data: bytes) -> bool:
    """False when another worker of this host has stored it."""
    end = offset + len(data)
    with transaction.atomic():
        if not Launch.objects.filter(pk=launch.pk, log_end=launch.log_end).update(log_end=end):
            return False
        LogChunk.objects.create(
            launch=launch, offset=offset, length=len(data), text=data.decode(errors="replace")
        )
        LogChunk.objects.filter(launch=launch, offset__lt=end - LOG_KEPT_BYTES).delete()
    launch.log_end = end
    topic = launch_topic(launch.uid)
    message = {"topic": topic, "type": "launch.log", "data": {"end": end}}
    notify(group_name(topic), "feed.progress", message)
    return True
