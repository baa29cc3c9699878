"""Probes, headers and the API's own page: what stands before every view."""

from __future__ import annotations

import pytest
from django.test import Client

from esper.contracts import Role
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
    assert answer.json() == {"ready": True, "checks": {"database": True, "redis": False}}


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
