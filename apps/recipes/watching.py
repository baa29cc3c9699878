"""The thread of a host's worker that registers recipes and looks at launches once a second.

Several workers of one host may have it; the one that holds the lock does the work, and when it goes
another takes over.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

from celery.signals import worker_ready, worker_shutting_down
from django.conf import settings
from django.db import close_old_connections

from apps.recipes import hosting
from apps.recipes.services import host_queue

log = logging.getLogger(__name__)
LOCK_FILE = "watcher.lock"
LOOK_SECONDS = 1.0
REGISTER_SECONDS = 5.0
_stopping = threading.Event()


def watch_host() -> None:
    """Rounds until the worker stops."""
    lock, registered = None, -REGISTER_SECONDS
    while not _stopping.wait(LOOK_SECONDS):
        try:
            lock = lock if lock is not None else take_lock(Path(settings.ESPER_LAUNCH_DIR))
            if lock is None:
                continue
            if time.monotonic() - registered >= REGISTER_SECONDS:
                registered = time.monotonic()
                hosting.register_recipes()
            hosting.watch()
        except Exception as error:  # a busy database, a full disk: the next round tries again
            log.warning("launches were not looked at this time: %s", error)
        close_old_connections()


def take_lock(folder: Path) -> int | None:
    """A descriptor that holds the lock as long as this process lives; None: another one has it.

    Not flock, which the pool's children would inherit, and hold when their parent has died.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@worker_ready.connect
def _on_ready(sender: Any, **_: Any) -> None:
    queues = [queue.name for queue in sender.task_consumer.queues]
    if host_queue(settings.ESPER_HOST_NAME) in queues:
        threading.Thread(target=watch_host, name="launches", daemon=True).start()


@worker_shutting_down.connect
def _on_stop(**_: Any) -> None:
    _stopping.set()
