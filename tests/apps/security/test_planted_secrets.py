"""Secrets are planted, everything is asked and made to fail, and nothing gives one of them away."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from django.conf import settings
from django.db import connection
from django.test import Client

from apps.accounts.models import User
from apps.adaptations import api
from esper.contracts import Role, TokenScope
from esper_web.logs import JSONFormatter, LineFormatter
from tests.apps.callers import Caller, Inbox
from tests.apps.cast import PASSWORD, token_of
from tests.apps.security.test_object_rights import ROUTES, ask

pytestmark = pytest.mark.django_db

PLANTED = "PLANTED-d41d8cd98f"
SHAPES = (
    f"redis://:{PLANTED}@redis:6379/0 does not answer",
    f"postgresql://esper:{PLANTED}@postgres/esper is away",
    f"Authorization: Bearer esp_{PLANTED}",
    f"{{'password': '{PLANTED}', 'command_key': '{PLANTED}'}}",
    f"cookie sessionid={PLANTED}; csrftoken={PLANTED}",
)


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What both formats of our log write, tracebacks included."""
    stream = io.StringIO()
    handlers = [logging.StreamHandler(stream) for _ in range(2)]
    for handler, formatter in zip(handlers, (LineFormatter(), JSONFormatter()), strict=True):
        handler.setFormatter(formatter)
        logging.getLogger().addHandler(handler)
    yield stream
    for handler in handlers:
        logging.getLogger().removeHandler(handler)


def stored() -> str:
    """Every value in the database."""
    with connection.cursor() as cursor:
        rows = []
        for table in connection.introspection.table_names(cursor):
            name = connection.ops.quote_name(table)
            cursor.execute(f"SELECT * FROM {name}")  # noqa: S608 (the database's own names)
            rows += cursor.fetchall()
    return repr(rows)


def test_no_answer_log_line_or_row_holds_a_secret(
    people: dict[Role, User],
    inbox: Inbox,
    logged: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adaptation = inbox.waiting()
    token = token_of(people[Role.ADMIN], TokenScope.READ, TokenScope.ACT)
    secrets = {
        "key of sessions": settings.SECRET_KEY,
        "command key": settings.ESPER_COMMAND_KEY,
        "audit key": settings.ESPER_AUDIT_KEY,
        "kernel key": settings.KERNEL_PRIVATE_KEY_OF_TESTS,
        "password": PASSWORD,
        "token": token,
        "trainer's token": inbox.trainer.token,
        "planted": PLANTED,
    }
    caller = Caller(token)
    seen = [
        ask(caller, route, {"adaptations": adaptation.uid, "runs": inbox.trainer.run}).response
        for route in ROUTES
    ]

    def fail(*_: Any) -> None:
        raise RuntimeError(" | ".join(SHAPES))

    with monkeypatch.context() as broken:
        broken.setattr(api, "_adaptation", fail)
        failed = caller.get(f"adaptations/{adaptation.uid}")
        assert failed.code == "internal"
        seen.append(failed.response)
    browser = Client(raise_request_exception=False)
    for password in ("wrong", PASSWORD):
        seen.append(browser.post("/login", {"username": "ada", "password": password}))
    pages = ("/", "/me", "/audit?verify=1", "/metrics", "/readyz", "/admin/accounts/apitoken/")
    seen += [browser.get(page) for page in (*pages, "/admin/accounts/user/1/change/")]

    texts = {
        "answers": "\n".join(
            (b"".join(one) if one.streaming else one.content).decode() for one in seen
        ),
        "log": logged.getvalue(),
        "database": stored(),
    }
    assert "unexpected error" in texts["log"]
    assert "redis://:[redacted]@redis" in texts["log"]
    leaks = [
        (name, where)
        for name, secret in secrets.items()
        for where, text in texts.items()
        if secret in text
    ]
    assert leaks == []
