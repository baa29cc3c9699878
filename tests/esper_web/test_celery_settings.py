"""Celery messages are notifications: ids as JSON, known tasks, known queues."""

from __future__ import annotations

import subprocess
import sys

import pytest
from kombu.exceptions import ContentDisallowed
from kombu.serialization import dumps, loads

from esper_web.celery import app
from hosts.paths import ROOT


def test_every_beat_entry_names_a_task_that_exists_and_a_queue_with_a_worker() -> None:
    app.loader.import_default_modules()
    for name, entry in app.conf.beat_schedule.items():
        assert entry["task"] in app.tasks, name
        assert entry["options"]["queue"] == "control", name


def test_a_process_with_settings_has_the_app_in_every_thread() -> None:
    program = (
        "import os; os.environ['DJANGO_SETTINGS_MODULE'] = 'esper_web.settings.test'\n"
        "import django; django.setup()\n"
        "from concurrent.futures import ThreadPoolExecutor; from celery import current_app\n"
        "in_thread = ThreadPoolExecutor(1).submit(lambda: current_app.main).result()\n"
        "print(in_thread, current_app.main, current_app.conf.broker_url)"
    )
    assert _run(program) == "esper esper memory://"


def test_a_sweep_that_waited_too_long_is_dropped() -> None:
    for entry in app.conf.beat_schedule.values():
        assert entry["options"]["expires"] <= 2 * entry["schedule"]


def test_pickle_is_refused() -> None:
    _, _, payload = dumps({"x": 1}, serializer="pickle")  # type: ignore[no-untyped-call]
    with pytest.raises(ContentDisallowed):
        loads(  # type: ignore[no-untyped-call]
            payload, "application/x-python-serialize", "binary", accept=app.conf.accept_content
        )


def test_lost_and_killed_tasks_are_delivered_again_soon() -> None:
    options = app.conf.broker_transport_options
    sweep = options["unacked_restore_interval"] * options["unacked_restore_throttle"]
    assert sweep <= 10
    assert app.conf.task_acks_late
    assert app.conf.task_time_limit < options["visibility_timeout"]


def test_a_compile_worker_may_import_torch_before_it_counts_as_dead() -> None:
    assert app.conf.worker_proc_alive_timeout >= 30


def test_the_control_worker_and_the_web_do_not_import_torch() -> None:
    program = (
        "import os, sys; os.environ['DJANGO_SETTINGS_MODULE'] = 'esper_web.settings.test'\n"
        "import esper_web.asgi; from django.urls import get_resolver\n"
        "get_resolver().url_patterns\n"
        "from esper_web.celery import app; app.loader.import_default_modules()\n"
        "print('torch' in sys.modules)"
    )
    assert _run(program) == "False"


def _run(program: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()
