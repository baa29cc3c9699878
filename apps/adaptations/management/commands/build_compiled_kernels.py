"""``django build_compiled_kernels``: the low-priority process that the compile worker starts."""

from __future__ import annotations

import fcntl
import os
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from apps.adaptations.compiled_kernels import build_next
from apps.workers.services import worker_name

NICENESS = 19


class Command(BaseCommand):
    help = "Build every queued compiled kernel of this capability, one after the other, and end."

    def handle(self, *args: Any, **options: Any) -> None:
        """One builder at a time on a host: a second one exits and leaves the queue to the first."""
        os.nice(NICENESS)
        path = settings.ESPER_DATA_DIR / "compiled-kernels.lock"
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            while build_next(worker=worker_name()):
                pass
