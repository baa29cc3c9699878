"""A worker says that it lives, from a thread of its main process."""

from __future__ import annotations

import logging
import os
import platform
import threading
from typing import Any

from celery.signals import worker_ready, worker_shutting_down
from django.conf import settings
from django.db import close_old_connections
from django.utils import timezone

from apps.kernels.services import Presence, heartbeat

log = logging.getLogger(__name__)
_stopping = threading.Event()


def worker_name() -> str:
    """``compile@host``: the name under which this process takes leases."""
    return os.environ.get("ESPER_WORKER_NAME", f"worker-{os.getppid()}@{settings.ESPER_HOST_NAME}")


def start_heartbeat(queues: list[str]) -> threading.Thread:
    """Heartbeats in the background until the worker stops."""
    started_at = timezone.now()
    presence = Presence(
        name=worker_name(),
        host=settings.ESPER_HOST_NAME,
        capability=settings.ESPER_CAPABILITY,
        queues=queues,
        devices=[platform.processor() or platform.machine()],
        versions={"python": platform.python_version()},
        started_at=started_at,
    )

    def beat() -> None:
        while True:
            try:
                heartbeat(presence)
            except Exception as error:
                log.warning("no heartbeat this time: %s", error)
            close_old_connections()
            if _stopping.wait(settings.ESPER_WORKER_HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    return thread


@worker_ready.connect
def _on_ready(sender: Any, **_: Any) -> None:
    queues = [queue.name for queue in sender.task_consumer.queues]
    start_heartbeat(queues)


@worker_shutting_down.connect
def _on_stop(**_: Any) -> None:
    _stopping.set()
