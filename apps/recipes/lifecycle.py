"""The life of a launch, and the one function that moves it.

    requested → starting → running ──────────────▶ finished   exit code 0
        │           │         │ ├────────────────▶ failed     anything else
        │           │         │ └─▶ stopping ────▶ stopped    by a person
        ▼           ▼         ▼         │
     stopped      failed    lost ◀──────┘  its host has not reported

What has stopped or failed may be resumed: it is requested again, as the next attempt. A launch that
is lost is settled by what its host finds when it is back, never by time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.utils import timezone

from apps.accounts.actors import Actor
from apps.audit.services import record
from apps.notifications.services import SYSTEM_TOPIC, launch_topic, publish
from apps.recipes.models import Launch
from apps.rest.problems import Problem
from esper.contracts import LAUNCH_ENDED, LaunchState

S = LaunchState

NEXT: Mapping[LaunchState, frozenset[LaunchState]] = {
    S.REQUESTED: frozenset({S.STARTING, S.STOPPED, S.FAILED}),
    S.STARTING: frozenset({S.RUNNING, S.STOPPING, S.STOPPED, S.FINISHED, S.FAILED, S.LOST}),
    S.RUNNING: frozenset({S.STOPPING, S.STOPPED, S.FINISHED, S.FAILED, S.LOST}),
    S.STOPPING: frozenset({S.STOPPED, S.FAILED, S.LOST}),
    S.LOST: frozenset({S.RUNNING, S.STOPPING, S.STOPPED, S.FINISHED, S.FAILED}),
    S.STOPPED: frozenset({S.REQUESTED}),
    S.FAILED: frozenset({S.REQUESTED}),
    S.FINISHED: frozenset(),
}


class StaleLaunchError(Problem):
    """The launch has changed since it was read; the error says its state now."""

    def __init__(self, current: Launch) -> None:
        by = f" by {current.stopped_by}" if current.stopped_by else ""
        super().__init__(
            409,
            "launch-moved",
            f"L-{current.number} is {current.state} already{by}.",
            state=current.state,
            attempt=current.attempt,
        )


def transition(
    launch: Launch, to: LaunchState, *, actor: Actor, reason: str = "", **changes: Any
) -> Launch:
    """Move a launch from the state and attempt that the caller looked at. Needs a transaction.

    Raises:
        StaleLaunchError: the row has moved on.
        ValueError: there is no such transition; a mistake in our code.
    """
    came_from = LaunchState(launch.state)
    if to not in NEXT[came_from]:
        raise ValueError(f"{came_from} -> {to} is not a transition of a launch")
    ended_at = timezone.now() if to in LAUNCH_ENDED else None
    changes = {"state": to, "reason": reason, "ended_at": ended_at, **changes}
    moved = Launch.objects.filter(pk=launch.pk, state=came_from, attempt=launch.attempt).update(
        **changes
    )
    launch.refresh_from_db()
    if not moved:
        raise StaleLaunchError(launch)
    announce(launch, f"launch.{to}", actor=actor, reason=reason, came_from=came_from)
    return launch


def _branch(launch: Launch) -> dict[str, Any]:
    if launch.branch_of is None:
        return {}
    return {
        "branch_of": launch.branch_of.run_uid,
        "state": launch.branch_state,
        "step": launch.branch_step,
    }


def announce(
    launch: Launch, act: str, *, actor: Actor, reason: str = "", came_from: str = ""
) -> None:
    """The audit row and the events of a change, in the transaction that made it."""
    data = {
        "number": launch.number,
        "recipe": str(launch.recipe),
        "attempt": launch.attempt,
        "from": came_from,
        "to": str(launch.state),
        "exit_code": launch.exit_code,
        "exit_signal": launch.exit_signal,
        **_branch(launch),
    }
    record(
        actor=actor,
        act=act,
        object_kind="launch",
        object_uid=launch.uid,
        run_uid=launch.run_uid,
        reason=reason,
        data={**data, "digest": launch.digest, "parameters": launch.parameters},
    )
    event = {"launch": launch.uid, "by": actor.name, "reason": reason, **data}
    publish(topic=launch_topic(launch.uid), type="launch.changed", data=event)
    publish(topic=SYSTEM_TOPIC, type="launch.changed", data=event, project_id=launch.project_id)
