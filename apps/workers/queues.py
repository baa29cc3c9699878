"""The Celery queues of workers, and which of them a worker serves now."""

from __future__ import annotations

from apps.workers.models import Worker
from esper.contracts import WorkerMode, WorkerState

_GONE = (WorkerState.STOPPING, WorkerState.OFFLINE)


def compile_queue(capability: str) -> str:
    """The queue of the workers that compile for this capability."""
    return f"compile.{capability}"


def queue_is_served(queue: str) -> bool:
    """Does a running, active worker consume this queue?"""
    return queue in served_queues()


def served_queues() -> frozenset[str]:
    """All queues that a running, active worker consumes."""
    taking = Worker.objects.filter(mode=WorkerMode.ACTIVE).exclude(state__in=_GONE)
    return frozenset(
        queue for queues in taking.values_list("queues", flat=True) for queue in queues
    )
