"""The Celery application. A task is a doorbell: its arguments are ids, never data."""

from __future__ import annotations

import importlib
import os

from celery import Celery
from celery.signals import worker_process_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.local")

app = Celery("esper")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@worker_process_init.connect  # type: ignore[untyped-decorator]
def warm_up_compiler(**_signal: object) -> None:
    """Imports torch before the first kernel, in the child only: CUDA does not survive a fork."""
    if os.environ.get("ESPER_KERNEL_KEY_FILE"):
        importlib.import_module("esper.compilation").warm_up()
