"""A person sees where they are signed in, and ends it everywhere else."""

from __future__ import annotations

import pytest
from django.contrib.sessions.models import Session
from django.test import Client

from apps.audit.models import AuditEvent
from esper.contracts import codec
from tests.apps.cast import PASSWORD, make_person

pytestmark = pytest.mark.django_db


def _browser(name: str, agent: str) -> Client:
    client = Client(headers={"User-Agent": agent})
    assert client.post("/login", {"username": name, "password": PASSWORD}).status_code == 302
    return client


def test_a_person_sees_their_sessions_and_ends_the_others_of_their_own(db: None) -> None:
    make_person("olga")
    make_person("oscar")
    here, there, others = (
        _browser("olga", "Firefox"),
        _browser("olga", "curl"),
        _browser("oscar", "x"),
    )
    text = here.get("/me").content.decode()
    assert text.index("Firefox") < text.index("curl")  # this browser first
    rows = codec.decode(here.get("/api/v1/sessions").content, max_bytes=1 << 16)["results"]
    assert [(row["browser"], row["present"]) for row in rows] == [
        ("Firefox", True),
        ("curl", False),
    ]
    answer = here.post(
        "/api/v1/sessions/end-others",
        b"{}",
        content_type="application/json",
        headers={"Idempotency-Key": "k1", "Origin": "http://testserver"},
    )
    assert (answer.status_code, answer.json()) == (200, {"ended": 1})
    assert AuditEvent.objects.get(act="session.others_ended").data == {"count": 1}
    assert (there.get("/me").status_code, others.get("/me").status_code) == (302, 200)
    assert here.get("/me").status_code == 200
    assert Session.objects.count() == 2
