"""Probes, headers and the API's own page: what stands before every view."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
from django.test import Client
from django.utils import timezone

from apps.workers import liveness
from apps.workers.models import PeriodicTask, Worker
from apps.workers.services import Presence, heartbeat
from esper.contracts import Role, WorkerKind
from hosts.runtime import write_runtime
from tests.apps.cast import NAMES, make_person

pytestmark = pytest.mark.django_db


@pytest.fixture
def as_role() -> object:
    def signed_in(role: Role) -> Client:
        client = Client()
        client.force_login(make_person(NAMES[role]))
        return client

    return signed_in


def test_the_process_says_that_it_lives(client: Client) -> None:
    assert client.get("/healthz").json() == {"status": "alive"}


def test_it_is_ready_with_a_database_although_redis_is_away(
    client: Client, settings: object
) -> None:
    settings.REDIS_URL = "redis://127.0.0.1:1/0"  # type: ignore[attr-defined]
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["ready"] is True
    assert answer.json()["checks"] == {"database": True, "redis": False, "disk": True}


@pytest.fixture(autouse=True)
def just_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_started", time.monotonic())


@pytest.fixture
def running_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_started", time.monotonic() - 3600.0)


def report_all() -> None:
    liveness.note_periodic_run(liveness.SWEEP)
    for kind in WorkerKind:
        heartbeat(Presence(name=f"{kind}@a", kind=kind, host="a", started_at=timezone.now()))


@pytest.mark.usefixtures("running_for_long")
def test_it_is_not_ready_when_a_part_has_stopped_reporting(client: Client) -> None:
    report_all()
    assert client.get("/readyz").json()["problems"] == []
    hour_ago = timezone.now() - timedelta(minutes=30)
    PeriodicTask.objects.update(ran_at=hour_ago)
    Worker.objects.filter(kind=WorkerKind.TAMIYO).update(heartbeat_at=hour_ago)
    answer = client.get("/readyz")
    assert answer.status_code == 503
    late = {name for name, part in answer.json()["parts"].items() if part["late"]}
    assert late == {"sweep", "tamiyo"}
    assert answer.json()["parts"]["sweep"]["age_seconds"] >= 1800
    assert client.get("/readyz?only=web").status_code == 200


@pytest.mark.usefixtures("running_for_long")
def test_a_part_that_never_reports_is_late_unless_esper_is_still_starting(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/readyz").status_code == 503
    monkeypatch.setattr(liveness, "_started", time.monotonic())
    assert client.get("/readyz").status_code == 200


def test_a_full_disk_is_named(
    client: Client, as_role: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hosts.disk.free_mib", lambda _directory: 3)
    answer = client.get("/readyz?only=web")
    assert answer.status_code == 503
    assert answer.json()["checks"]["disk"] is False
    assert "is full: 3 MiB are free" in answer.json()["problems"][0]
    overview = as_role(Role.VIEWER).get("/?panel=system")  # type: ignore[operator]
    assert "is full: 3 MiB are free" in overview.content.decode()


def test_a_process_that_cannot_be_kept_running_is_named_and_shown_with_its_last_lines(
    client: Client, as_role: object, settings: object, tmp_path: Path
) -> None:
    settings.ESPER_DATA_DIR = tmp_path  # type: ignore[attr-defined]
    down = {"since": time.time(), "ends": 7, "why": "ended (exit code 3)", "tail": ["no <table>"]}
    write_runtime(tmp_path, {"down": {"beat": down}})
    answer = client.get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["problems"] == ["beat is down: it ended (exit code 3)."]
    assert "table" not in answer.content.decode()  # lines of a log are for signed-in people
    overview = as_role(Role.VIEWER).get("/?panel=system").content.decode()  # type: ignore[operator]
    assert "no &lt;table&gt;" in overview
    assert client.get("/readyz?only=web").status_code == 200


@pytest.mark.usefixtures("running_for_long")
def test_metrics_have_the_age_of_each_part_and_worker(as_role: object) -> None:
    report_all()
    text = as_role(Role.ADMIN).get("/metrics").content.decode()  # type: ignore[operator]
    for name in ('esper_part_age_seconds{part="sweep"}', 'esper_part_late{part="control"} 0.0'):
        assert name in text
    assert 'esper_worker_age_seconds{worker="compile@a"}' in text
    assert "esper_disk_free_mib" in text


def test_probes_take_no_posts(client: Client) -> None:
    assert client.post("/healthz").status_code == 405
    assert client.post("/readyz").status_code == 405


@pytest.mark.parametrize("role", [Role.VIEWER, Role.RESEARCHER, Role.OPERATOR])
def test_metrics_are_not_for_everybody(as_role: object, role: Role) -> None:
    assert as_role(role).get("/metrics").status_code == 403  # type: ignore[operator]


def test_metrics_are_not_for_anonymous_visitors(client: Client) -> None:
    assert client.get("/metrics").status_code == 403


def test_an_empty_metrics_token_opens_nothing(client: Client, settings: object) -> None:
    settings.ESPER_METRICS_TOKEN = ""  # type: ignore[attr-defined]
    assert client.get("/metrics", headers={"Authorization": "Bearer "}).status_code == 403


def test_metrics_are_for_administrators_and_token_holders(
    as_role: object, client: Client, settings: object
) -> None:
    settings.ESPER_METRICS_TOKEN = "scrape-me-0123456789"  # type: ignore[attr-defined]
    by_token = client.get("/metrics", headers={"Authorization": "Bearer scrape-me-0123456789"})
    by_role = as_role(Role.ADMIN).get("/metrics")  # type: ignore[operator]
    for answer in (by_token, by_role):
        assert answer.status_code == 200
        assert b"esper_overdue_adaptations 0.0" in answer.content
    wrong = client.get("/metrics", headers={"Authorization": "Bearer scrape-me-000"})
    assert wrong.status_code == 403


def test_every_answer_carries_the_strict_content_policy(client: Client) -> None:
    policy = client.get("/login").headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy


def test_the_api_page_needs_no_inline_script_and_no_foreign_host(as_role: object) -> None:
    client: Client = as_role(Role.VIEWER)  # type: ignore[operator]
    page = client.get("/api/docs")
    assert page.status_code == 200
    text = page.content.decode()
    assert "<style" not in text
    assert "//" not in text.replace("<!DOCTYPE html>", "").replace("http://testserver", "")
    assert text.count("<script") == text.count("<script src=")
    script = client.get("/api/docs?script=")
    assert script.headers["Content-Type"].startswith("application/javascript")


def test_the_api_page_is_not_for_anonymous_visitors(client: Client) -> None:
    assert client.get("/api/docs").status_code in {401, 403}
    assert client.get("/api/schema").status_code in {401, 403}
