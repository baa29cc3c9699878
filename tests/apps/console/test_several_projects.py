"""Projects in the console: killing one, its approvers, its filters, its recipes, its messages."""

from __future__ import annotations

import re
import time
from datetime import timedelta
from typing import Any

import pytest

from apps.accounts.actors import SYSTEM
from apps.accounts.models import Membership, Project, User
from apps.accounts.projects import set_member
from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.audit.services import record
from apps.notifications import public_hosts
from apps.notifications.delivering import deliver_due
from apps.notifications.models import Channel, Delivery
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.policies.services import publish_policy
from apps.recipes.models import Launch
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from esper.contracts import CommandKind, CommandState, Role, TokenScope
from tests.apps.callers import Caller
from tests.apps.cast import make_person, make_run, token_of
from tests.apps.console.world import World
from tests.apps.recipes.rows import make_recipe
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db


@pytest.fixture
def vision(db: None) -> Project:
    return Project.objects.create(name="vision")


def killed(run: Run) -> list[str]:
    """The commands about pauses that the run's trainer got."""
    kinds = [CommandKind.PAUSE_ADAPTATION, CommandKind.RESUME_ADAPTATION]
    rows = Command.objects.filter(run=run, kind__in=kinds).order_by("seq")
    return list(rows.values_list("kind", flat=True))


def test_a_project_is_killed_alone_and_its_trainers_answers_are_shown(
    world: Any, vision: Project
) -> None:
    inside, outside = world.runs["digits-cnn"], world.runs["topics-lm"]
    Run.objects.filter(pk=inside.pk).update(project=vision)
    inside.refresh_from_db()
    olga, before = world.people["olga"], killed(outside)
    caller = Caller(token_of(olga, TokenScope.READ, TokenScope.ACT))
    address = f"projects/{vision.uid}/adaptation-switch"
    assert caller.post(address, {"on": False}).status == 404  # she sees no such project
    Membership.objects.create(project=vision, user=olga, role=Role.VIEWER)
    assert caller.post(address, {"on": False}).status == 403
    Membership.objects.filter(user=olga).update(role=Role.OPERATOR)
    assert caller.post(address, {"on": False, "reason": "odd"}).data["on"] is False

    assert killed(inside)[-1] == CommandKind.PAUSE_ADAPTATION
    assert killed(outside) == before
    command = Command.objects.filter(run=inside).latest("seq")
    Command.objects.filter(pk=command.pk).update(
        state=CommandState.APPLIED,
        step=301,
        acknowledged_at=command.issued_at + timedelta(seconds=1.5),
    )
    text = world.client("olga").get("/switch").content.decode()
    row = re.search(rf'id="row-{vision.uid}".*?</tr>', text, re.S)
    assert row is not None
    assert "Killed" in row[0]
    assert "1 of 1 trainers have confirmed, the slowest after 1.5 s." in row[0]
    assert "Killed: vision" in text  # the bar of every page
    page = world.client("olga").get(f"/runs/{inside.uid}").content.decode()
    assert "olga has switched adaptation off in project vision" in page
    assert caller.post(f"runs/{inside.uid}/resume-adaptation", {}).status == 423


def test_a_kill_of_a_project_stops_approvals_and_outlives_a_wider_one(
    stage: Stage, vision: Project
) -> None:
    other = make_run(stage.owner, name="other")
    Run.objects.filter(pk=other.pk).update(project=vision)
    adaptation = stage.waiting()
    admin = make_person("ann", Role.ADMIN)
    home = stage.run.project

    def turn(on: bool, project: Project | None = None) -> None:
        if project is None:
            services.set_adaptation_switch(on=on, user=admin, via="")
        else:
            services.set_project_switch(project=project, on=on, user=admin, via="")

    turn(False, home)
    permission = services.permissions(Adaptation.objects.get(pk=adaptation.pk), stage.operator)
    assert permission["approve"].code == "adaptation-killed"
    assert f"in project {home.name}" in permission["approve"].why
    turn(False)
    turn(True)
    pause, resume = CommandKind.PAUSE_ADAPTATION, CommandKind.RESUME_ADAPTATION
    assert killed(stage.run) == [pause, pause]  # its own project is still killed
    assert killed(other) == [pause, resume]
    turn(True, home)
    assert killed(stage.run)[-1] == resume
    assert services.permissions(Adaptation.objects.get(pk=adaptation.pk), stage.operator)[
        "approve"
    ].allowed


def test_a_quorum_is_counted_in_the_project_where_it_would_hold(
    stage: Stage, vision: Project
) -> None:
    ann, carl = make_person("ann", Role.ADMIN), make_person("carl")
    Membership.objects.create(project=vision, user=carl, role=Role.CURATOR)
    run = make_run(stage.owner, name="other")
    Run.objects.filter(pk=run.pk).update(project=vision)
    run.refresh_from_db()

    def publish_for(scope: str) -> None:
        changes = {"approvals_for_high_risk": 2}
        publish_policy(changes=changes, reason="x", user=carl, via="", scope=scope, run=run)

    for scope in ("global", "project", "run"):
        with pytest.raises(Problem) as refused:  # of vision only the admin may approve
            publish_for(scope)
        assert refused.value.code == "quorum-unreachable"
        assert "in project vision there is 1 who may" in str(refused.value)
    set_member(project=vision, user=ann, via="", username="olga", role=Role.OPERATOR)
    publish_for("project")


@pytest.mark.parametrize(
    ("path", "name", "told"),
    [
        ("/inbox", "digits-cnn", "name"),
        ("/incidents", "topics-lm", "name"),
        ("/violations?state=all", "topics-lm", "name"),
        ("/audit", "digits-cnn", "uid"),
        ("/runs", "digits-cnn", "name"),
    ],
)
def test_lists_are_filtered_by_project(
    world: Any, vision: Project, path: str, name: str, told: str
) -> None:
    Run.objects.filter(name=name).update(project=vision)
    run = world.runs[name]
    seen = {"object_kind": "run", "object_uid": run.uid, "run_uid": run.uid}
    record(actor=SYSTEM, act="run.registered", **seen)
    word = getattr(run, told)

    def rows(project: str) -> str:
        join = "&" if "?" in path else "?"
        page = world.client("ada").get(f"{path}{join}project={project}").content.decode()
        assert f'<option value="{project}" selected>' in page
        found = re.search(r'<section[^>]*id="panel-(?:list|runs)".*?</section>', page, re.S)
        assert found is not None
        return found[0]

    assert word in rows(vision.uid)
    assert word not in rows(Project.objects.get(name="default").uid)
    assert 'id="f-project"' not in world.client("vera").get(path).content.decode()


def test_a_recipe_is_started_in_a_project_by_who_may_attach_runs_there(
    vision: Project, people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.recipes.services.queue_is_served", lambda _: True)
    recipe, olga = make_recipe(), people[Role.OPERATOR]
    caller = Caller(token_of(olga, TokenScope.READ, TokenScope.ACT))
    body = {"host": recipe.host, "recipe": recipe.slug, "digest": recipe.digest}
    body |= {"parameters": {"steps": 500}, "project": vision.uid}
    assert caller.post("launches", body).status == 404
    member = Membership.objects.create(project=vision, user=olga, role=Role.VIEWER)
    assert caller.post("launches", body).status == 403
    Membership.objects.filter(pk=member.pk).update(role=Role.RESEARCHER)
    made = caller.post("launches", body)
    assert made.data["project"] == vision.uid, made.data
    assert Launch.objects.get().project == vision
    listed = caller.get(f"launches?project={vision.uid}").data["results"]
    assert [row["uid"] for row in listed] == [made.data["uid"]]


@pytest.mark.parametrize("ends", ["membership", "account", "moved"])
def test_a_message_is_sent_only_while_its_owner_may_see_what_it_says(
    vision: Project, people: dict[Role, User], monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    sent: list[str] = []
    monkeypatch.setattr(public_hosts, "post", lambda url, *_: sent.append(url) or 200)
    vera = people[Role.VIEWER]
    run = make_run(people[Role.RESEARCHER], name="theirs")
    member = Membership.objects.create(project=vision, user=vera, role=Role.VIEWER)
    Run.objects.filter(pk=run.pk).update(project=vision)
    Channel.objects.create(
        owner=vera, kind="slack", target="https://x.example", events=["run.failed"], site="s"
    )

    def tell() -> None:
        data = {"run": run.uid, "to": "failed"}
        publish(topic=SYSTEM_TOPIC, type="run.state", data=data, project_id=vision.pk)

    tell()
    assert (deliver_due(), len(sent)) == (1, 1)
    tell()
    match ends:
        case "membership":
            member.delete()
        case "account":
            User.objects.filter(pk=vera.pk).update(is_active=False)
        case "moved":
            hidden = Project.objects.create(name="hidden")
            Run.objects.filter(pk=run.pk).update(project=hidden)
    assert (deliver_due(), len(sent)) == (0, 1)
    last = Delivery.objects.latest("id")
    assert (last.due_at, last.delivered_at) == (None, None)
    assert "has no right to see this any more" in last.error


def test_the_first_project_of_a_server_is_made_in_a_browser(world: World) -> None:
    """Until then the server has one project, and each request knows that before it begins."""
    client = world.client("ada")
    session = client.session
    session["password_at"] = time.time()
    session.save()
    answer = client.post(
        "/api/v1/projects",
        {"name": "vision"},
        content_type="application/json",
        headers={"idempotency-key": "first"},
    )
    assert (answer.status_code, answer.json()["role"]) == (201, "admin")
    assert "vision" in client.get("/projects").content.decode()
