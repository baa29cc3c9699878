"""Lists ask the database as often for many rows as for few, and never for the layers of runs."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection
from django.test import Client

from apps.accounts.models import User
from benchmarks.history import History, Size
from benchmarks.pages import PAGES
from esper.contracts import Role
from tests.apps.cast import make_blueprint

pytestmark = pytest.mark.django_db

# Their rows draw the health of each layer.
OF_LAYERS = {"overview", "runs", "wall"}
LISTS = [page for page in PAGES if "{" not in page.path]


def statements(client: Client, path: str) -> list[str]:
    seen: list[str] = []

    def note(execute: Any, sql: str, *rest: Any) -> Any:
        seen.append(sql)
        return execute(sql, *rest)

    with connection.execute_wrapper(note):
        assert client.get(path).status_code == 200, path
    return [sql for sql in seen if "SAVEPOINT" not in sql]


def test_lists_ask_as_often_for_many_rows_as_for_few(people: dict[Role, User]) -> None:
    make_blueprint()
    client = Client()
    client.force_login(people[Role.ADMIN])
    history = History(people[Role.RESEARCHER], telemetry=False)
    history.grow_to(Size(runs=11, adaptations=20))
    few = {page.name: statements(client, page.path) for page in LISTS}
    history.grow_to(Size(runs=41, adaptations=100))
    many = {page.name: statements(client, page.path) for page in LISTS}
    assert {name: len(asked) for name, asked in many.items()} == {
        name: len(asked) for name, asked in few.items()
    }
    for name in sorted(set(many) - OF_LAYERS):
        assert not [sql for sql in many[name] if '"runs_run"."layers"' in sql], name
