"""A worker sends heartbeats from a thread of its main process, and follows the mode in the answer.

Celery's main process knows the queues; the pool process, which builds, knows the devices. Both
report under one name.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from celery.signals import (
    celeryd_init,
    worker_process_init,
    worker_process_shutdown,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from django.conf import settings
from django.db import connections
from django.utils import timezone

import esper
from apps.workers.builders import builders, close_builders
from apps.workers.heartbeats import Presence, heartbeat, mark_worker_stopped, worker_name
from apps.workers.stalls import WaitingJobs
from esper.contracts import WorkerKind, WorkerMode

log = logging.getLogger(__name__)
_started_at = timezone.now()
_stopping = threading.Event()
_stopped = threading.Event()
_no_fork = threading.Lock()
os.register_at_fork(
    before=_no_fork.acquire, after_in_parent=_no_fork.release, after_in_child=_no_fork.release
)


@contextmanager
def database_between_forks() -> Iterator[None]:
    """For a thread of Celery's main process: no database connection is open when it forks.

    A pool process that was killed is replaced by a fork at any moment. With a connection open in
    this process then, the new one inherits SQLite's state (seen: every query of its whole life
    failed with "database disk image is malformed") or the sockets of PostgreSQL's pool.
    """
    with _no_fork:
        try:
            yield
        finally:
            for connection in connections.all(initialized_only=True):
                connection.close()
                if hasattr(connection, "close_pool"):
                    connection.close_pool()


def host_memory_mib() -> tuple[int, int] | tuple[None, None]:
    """Free and total memory of this machine; None where the system does not report them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None, None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return kib["MemAvailable"] // 1024, kib["MemTotal"] // 1024


def start_heartbeat(consumer: Any) -> threading.Thread:
    """Heartbeats in the background until the worker stops."""
    queues = [queue.name for queue in consumer.task_consumer.queues]
    compiles = any(queue.startswith("compile.") for queue in queues)
    kind = WorkerKind.COMPILE if compiles else WorkerKind.CONTROL
    capabilities = settings.ESPER_WORKER_CAPABILITIES if compiles else []
    versions = None if compiles else {"python": platform.python_version()}

    def beat() -> None:
        mode, jobs = WorkerMode.ACTIVE, WaitingJobs()
        while not _stopped.is_set():
            free_mib, total_mib = host_memory_mib()
            presence = Presence(
                name=worker_name(),
                kind=kind,
                host=settings.ESPER_HOST_NAME,
                started_at=_started_at,
                capabilities=capabilities,
                queues=queues,
                versions=versions,
                stopping=_stopping.is_set(),
                memory_free_mib=free_mib,
                memory_total_mib=total_mib,
            )
            try:
                with database_between_forks():
                    wanted = heartbeat(presence)
                    job = jobs.stalled(presence.name, queues) if compiles else ""
                if job:
                    _end_process(job)
                mode = _follow_mode(consumer, queues, mode, wanted)
            except Exception as error:
                log.warning("this heartbeat was not recorded: %s", error)
            awaited = _stopped if _stopping.is_set() else _stopping
            awaited.wait(settings.ESPER_WORKER_HEARTBEAT_SECONDS)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    return thread


def _follow_mode(
    consumer: Any, queues: list[str], before: WorkerMode, mode: WorkerMode
) -> WorkerMode:
    """Consume the queues only in active mode, so that other workers get the messages."""
    if (before == WorkerMode.ACTIVE) != (mode == WorkerMode.ACTIVE):
        log.warning("this worker is %s now", mode)
        act = consumer.add_task_queue if mode == WorkerMode.ACTIVE else consumer.cancel_task_queue
        for queue in queues:
            consumer.call_soon(act, queue)
    return mode


def _end_process(job: str) -> None:
    """Without the orderly end, which takes the loop that no longer works. It is started again."""
    log.error("job %s waits, and its messages do not arrive here: this process ends", job)
    logging.shutdown()
    os._exit(1)


def report_devices() -> None:
    """Report what the builder child found, which a process without torch cannot know."""
    description = builders().ready().wait_ready()
    log.info("builders are ready; their network is closed by %s", description.network)
    heartbeat(
        Presence(
            name=worker_name(),
            kind=WorkerKind.COMPILE,
            host=settings.ESPER_HOST_NAME,
            started_at=_started_at,
            devices=description.devices,
            versions={
                **description.versions,
                "esper": esper.__version__,
                "builder_network": f"closed by {description.network}",
            },
        )
    )


@celeryd_init.connect
def _name_worker(sender: str, **_: Any) -> None:
    os.environ.setdefault("ESPER_WORKER_NAME", sender)  # its pool processes inherit it


@worker_process_init.connect
def _on_process_start(**_: Any) -> None:
    if settings.ESPER_KERNEL_KEY_FILE:
        report_devices()


@worker_process_shutdown.connect
def _on_process_end(**_: Any) -> None:
    close_builders()


@worker_ready.connect
def _on_ready(sender: Any, **_: Any) -> None:
    start_heartbeat(sender)


@worker_shutting_down.connect
def _on_stop(**_: Any) -> None:
    """Set the flag that the heartbeat reports; Celery finishes the job. In a signal handler."""
    _stopping.set()


@worker_shutdown.connect
def _on_end(**_: Any) -> None:
    _stopped.set()
    try:
        with database_between_forks():
            mark_worker_stopped(worker_name())
    except Exception as error:
        log.warning("the end of this worker was not recorded: %s", error)
