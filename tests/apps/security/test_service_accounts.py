"""Programs have accounts apart from people: they ask, they may stop, and they never decide."""

from __future__ import annotations

import io

import pytest
from django.contrib.auth import authenticate
from django.core.management import call_command

from apps.accounts.models import Membership, Project, User
from apps.accounts.policy import NEEDS_A_PERSON, Act, may
from apps.accounts.projects import people_with
from apps.runs.models import Run
from esper.contracts import Role, RunState, TokenScope
from tests.apps.callers import Caller, registration
from tests.apps.cast import make_person, make_run, token_of

pytestmark = pytest.mark.django_db


@pytest.fixture
def vision(db: None) -> Project:
    return Project.objects.create(name="vision")


@pytest.fixture
def admin(db: None) -> Caller:
    return Caller(token_of(make_person("ann", Role.ADMIN), TokenScope.READ, TokenScope.ACT))


def test_a_program_registers_runs_of_its_project_until_it_is_ended(
    admin: Caller, vision: Project, people: dict[Role, User]
) -> None:
    address = f"projects/{vision.uid}"
    body = {"name": "ci", "scopes": ["runs:create", "read"]}
    olga = Caller(token_of(people[Role.OPERATOR], TokenScope.READ, TokenScope.ACT))
    assert olga.post(f"{address}/create-service-account", body).status == 404
    made = admin.post(f"{address}/create-service-account", body)
    assert made.status == 201, made.data
    assert admin.post(f"{address}/create-service-account", body).code == "name-taken"
    program = Caller(made.data["secret"])
    run = program.post("runs", registration())
    assert Run.objects.get(uid=run.data["uid"]).project == vision
    listed = admin.get(address).data
    assert [one["name"] for one in listed["service_accounts"]] == ["ci"]
    assert listed["members"] == []
    assert admin.post(f"{address}/end-service-account", {"name": "ci"}).status == 200
    assert program.get("runs").status == 401


def test_a_program_is_no_person(vision: Project) -> None:
    program = User.objects.create_user("robot", password="x" * 20, role=Role.ADMIN)
    User.objects.filter(pk=program.pk).update(is_service=True)
    program.refresh_from_db()
    assert authenticate(username="robot", password="x" * 20) is None
    assert program not in people_with(list(Role), vision.pk)
    for act in NEEDS_A_PERSON:
        assert may(program, act).code == "service-account"
    assert may(program, Act.PAUSE_ADAPTATION).allowed
    caller = Caller(token_of(program, TokenScope.READ, TokenScope.ACT))
    assert caller.post("adaptation-switch", {"on": False}).status == 200
    assert caller.post("adaptation-switch", {"on": True}).code == "service-account"


@pytest.mark.django_db(transaction=True)  # the audit log refuses what no transaction encloses
def test_the_first_start_makes_tamiyo_a_service_account() -> None:
    output = io.StringIO()
    call_command("create_demo_people", "--json", stdout=output)
    assert "tamiyo" in output.getvalue()
    assert User.objects.get(username="tamiyo").is_service


def test_a_run_that_has_ended_is_moved_with_its_history(
    admin: Caller, vision: Project, people: dict[Role, User]
) -> None:
    run = make_run(people[Role.RESEARCHER])
    vera = Caller(token_of(people[Role.VIEWER], TokenScope.READ))
    body = {"project": vision.uid}
    assert admin.post(f"runs/{run.uid}/move", body).code == "run-live"
    Run.objects.filter(pk=run.pk).update(state=RunState.FINISHED)
    assert vera.get(f"audit?run={run.uid}").data["results"]
    Membership.objects.create(project=vision, user=people[Role.OPERATOR], role=Role.ADMIN)
    olga = Caller(token_of(people[Role.OPERATOR], TokenScope.READ, TokenScope.ACT))
    assert olga.post(f"runs/{run.uid}/move", body).status == 403  # no admin of where it is
    moved = admin.post(f"runs/{run.uid}/move", {**body, "reason": "wrong place"})
    assert moved.data["project"] == vision.uid, moved.data
    assert vera.get(f"runs/{run.uid}").status == 404
    assert vera.get(f"audit?run={run.uid}").data["results"] == []
    (event, *_) = olga.get(f"audit?run={run.uid}&act=run.moved").data["results"]
    assert event["reason"] == "wrong place"
