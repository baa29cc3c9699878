"""The Celery application. A task message is a notification: its arguments are ids, never data."""

from __future__ import annotations

import importlib
import os

from celery import Celery
from celery.signals import worker_process_init

from esper_web.tracing import trace_tasks

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.local")

app = Celery("esper")
app.set_default()  # celery.current_app in every thread, not only in this one
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@worker_process_init.connect  # type: ignore[untyped-decorator]
def prepare_child(**_signal: object) -> None:
    """Starts traces and the event loop of notifications. ``apps.workers.presence``: builders."""
    trace_tasks()
    importlib.import_module("apps.notifications.services").start_notification_thread()
