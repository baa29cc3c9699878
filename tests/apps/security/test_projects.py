"""Nobody reaches an object of a project they are no member of: every route, every kind, every role.

The routes come from the routers of the API and of the console, so that a new one is asked too: an
address with an object of a kind that is not known here fails the test. docs/security.md shows the
table, which this test compares with what it found.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.contrib.admin import site
from django.test import Client
from django.urls import URLPattern, reverse

from apps.accounts.models import Membership, Project, User
from apps.accounts.projects import set_member
from apps.accounts.services import issue_token
from apps.accounts.visibility import InProjects
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.console import urls as console
from apps.policies.models import PolicyVersion
from apps.recipes.models import Launch
from apps.runs.models import Run
from esper.contracts import Role, TokenScope
from tests.apps.callers import Answer, Caller, Inbox, register, registration
from tests.apps.cast import make_person, token_of
from tests.apps.security import test_object_rights as rights
from tests.apps.sockets import browser, in_database, tell

DOCUMENT = Path(__file__).parents[3] / "docs" / "security.md"
CANARY = rights.CANARY
# Kinds that belong to the whole server or to one person: they hold nothing of a project.
SHARED = {
    "kernels", "workers", "blueprints", "variants", "recipes", "remedies", "duty", "channels",
    "tokens", "people",
}  # fmt: skip
# Rows that are reached through a row that was found already, or through their owner.
WITHOUT_A_MANAGER = {"Vote", "Snooze", "LogChunk", "JobStepDone"}

objects = rights.objects
_no_throttle = rights._no_throttle


@pytest.fixture
def project(people: dict[Role, User]) -> Project:
    """Another one; the owner of the objects is a member of it."""
    made = Project.objects.create(name=f"{CANARY} project")
    Membership.objects.create(project=made, user=people[Role.RESEARCHER], role=Role.RESEARCHER)
    return made


@pytest.fixture
def foreign(objects: dict[str, str], project: Project) -> dict[str, str]:
    """The objects, all of them in the other project."""
    Run.objects.filter(name=CANARY).update(project=project)
    Launch.objects.update(project=project)
    run = Run.objects.get(uid=objects["runs"])
    Adaptation.objects.filter(run=run).update(layer=CANARY)
    policy = PolicyVersion.objects.get(version=objects["policies"])
    policy.pk, policy.version = None, policy.version + 1
    policy.scope, policy.target, policy.project = "run", run.uid, str(project.pk)
    policy.reason = CANARY
    policy.save()
    event = AuditEvent.objects.filter(run_uid=run.uid).latest("id")
    return {
        **objects,
        "policies": str(policy.version),
        "audit": str(event.pk),
        "projects": project.uid,
    }


def outsiders() -> Iterator[tuple[Role, User]]:
    """One for each role: of the server (but admins see all), and in a project of their own."""
    own = Project.objects.create(name="their own")
    for role in Role:
        user = make_person(f"x-{role}", Role.OPERATOR if role == Role.ADMIN else role)
        Membership.objects.create(project=own, user=user, role=role)
        yield role, user


def missing(objects: dict[str, str]) -> dict[str, str]:
    """Names of the same form that nothing has."""
    return {
        kind: "999999" if uid.isdigit() else f"{uid[:4]}{'0' * (len(uid) - 4)}"
        for kind, uid in objects.items()
    }


def told(answer: Answer) -> Any:
    """All that a caller learns."""
    text = answer.response.getvalue().decode()
    text = re.sub(r'"request_id":\s*"\w+"', "", text)
    return answer.status, text, answer.header("ETag"), answer.header("Link")


def leaks(answer: Answer, secrets: set[str]) -> list[str]:
    text = f"{answer.response.getvalue().decode()} {dict(answer.response.headers)}"
    return [secret for secret in secrets if secret in text]


@pytest.mark.django_db
def test_no_route_shows_or_changes_an_object_of_another_project(
    foreign: dict[str, str], project: Project
) -> None:
    own = {kind for kind in foreign if kind not in SHARED}
    secrets = {CANARY, project.uid, *(foreign[kind] for kind in own if "_" in foreign[kind])}
    before = _content()
    asked: dict[Role, Counter[str]] = {}
    for role, user in outsiders():
        counts = asked[role] = Counter()
        caller = Caller(token_of(user, TokenScope.READ, TokenScope.ACT))
        nothing = missing(foreign)
        for route in rights.ROUTES:
            kind = route.pattern.split("/")[0]
            if kind in SHARED and "<" in route.pattern and route.method != "get":
                continue  # their rights do not come from a project
            answer = rights.ask(caller, route, foreign)
            assert not leaks(answer, secrets), (route, role)
            if kind not in SHARED and "<" in route.pattern:
                same = told(rights.ask(caller, route, nothing))
                assert told(answer) == same, (route, role)
                counts[kind] += 1
            else:
                counts["other routes, and exports"] += 1
            if route.method == "get" and "<" not in route.pattern:
                export = caller.get(f"{route.pattern}?format=csv")
                assert not leaks(export, secrets), (route, role)
        for path in _pages(foreign):
            client = Client()
            client.force_login(user)
            page: Any = client.get(path, follow=True)
            assert not leaks(Answer(page), {s for s in secrets if s not in path}), (path, role)
            if any(foreign[kind] in path.split("?")[0] for kind in own if "_" in foreign[kind]):
                assert page.status_code == 404, (path, role)
            counts["pages"] += 1
    assert _content() == before
    table = _table(asked)
    sys.stdout.write(table)  # pytest shows it where the document differs
    assert table in DOCUMENT.read_text()


def _content() -> Any:
    changed = (Run, Adaptation, Launch, PolicyVersion)
    return [list(model._base_manager.order_by("pk").values()) for model in changed]


def _pages(objects: dict[str, str]) -> list[str]:
    """Every page of the console and the admin, with the foreign objects in their addresses."""
    kinds = {"digest": "kernels", "slug": "blueprints"}
    paths = []
    for pattern in console.urlpatterns:
        assert isinstance(pattern, URLPattern)
        names = list(pattern.pattern.converters)
        kind = str(pattern.pattern).split("/")[0]
        arguments = [objects[kinds.get(name, kind)] for name in names]
        if pattern.name not in {"sign-out", "save-settings", "save-view"}:
            paths.append(reverse(f"console:{pattern.name}", args=arguments))
    run = objects["runs"]
    searches = ["/inbox?state=history", "/violations?state=all", "/search?q=7f3a&part=list"]
    searches += ["/runs?q=7f3a", f"/inbox?run={run}", f"/audit?run={run}", f"/runs/compare?a={run}"]
    of_admin = [
        reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist")
        for model in site._registry
    ]
    return [*paths, *searches, *of_admin]


def _table(asked: dict[Role, Counter[str]]) -> str:
    """Of each kind how many answers leaked: the test has failed where one did."""
    lines = [f"| asked for | {' | '.join(asked)} |", "|---" * (len(asked) + 1) + "|"]
    kinds = sorted(set().union(*asked.values()))
    lines += [f"| {kind} | {' | '.join('0' for _ in asked)} |" for kind in kinds]
    return "\n".join(lines) + "\n"


@pytest.mark.django_db
def test_every_model_with_rows_of_a_run_has_the_manager_that_limits_them() -> None:
    names = {"run", "run_uid", "adaptation", "adaptation_uid", "launch", "job", "project"}
    without = {
        model.__name__
        for model in apps.get_models()
        if model._meta.app_config.name.startswith("apps.")
        and names & {field.name for field in model._meta.get_fields() if field.concrete}
        and not isinstance(model._default_manager, InProjects)
    }
    # Tokens are their owner's; memberships are shown by their project.
    assert without == {*WITHOUT_A_MANAGER, "ApiToken", "Membership"}


@pytest.mark.django_db
def test_a_member_sees_and_acts_with_the_role_in_the_project(
    foreign: dict[str, str], project: Project
) -> None:
    user = make_person("mia", Role.VIEWER)
    caller = Caller(token_of(user, TokenScope.READ, TokenScope.ACT))
    run = foreign["runs"]
    assert caller.get(f"runs/{run}").status == 404
    admin = make_person("ann", Role.ADMIN)
    for role, status in ((Role.VIEWER, 403), (Role.OPERATOR, 202)):
        set_member(project=project, user=admin, via="", username="mia", role=role)
        assert caller.get(f"runs/{run}").status == 200
        assert caller.post(f"runs/{run}/pause-adaptation", {"reason": "r"}).status == status
    set_member(project=project, user=admin, via="", username="mia", role="")
    assert caller.get(f"runs/{run}").status == 404


@pytest.mark.django_db
def test_a_token_of_a_project_sees_no_other_project_and_makes_its_runs_there(
    people: dict[Role, User], project: Project, inbox: Inbox
) -> None:
    owner = people[Role.RESEARCHER]
    scopes = [TokenScope.READ, TokenScope.RUNS_CREATE]
    _, secret = issue_token(owner=owner, name="ci", scopes=scopes, project_id=project.pk)
    caller = Caller(secret)
    assert caller.get(f"runs/{inbox.trainer.run}").status == 404
    made = caller.post("runs", registration())  # the name of a live run of the default project
    assert made.status == 201, made.data
    assert Run.objects.get(uid=made.data["uid"]).project == project
    assert [row["uid"] for row in caller.get("runs").data["results"]] == [made.data["uid"]]


@pytest.mark.django_db(transaction=True)
async def test_a_socket_gets_no_event_of_another_project_and_ends_with_the_right(
    people: dict[Role, User],
) -> None:
    def prepare() -> tuple[Project, str, User]:
        made = Project.objects.create(name="hidden")
        run = register(people[Role.RESEARCHER], name=CANARY).run
        Run.objects.filter(uid=run).update(project=made)
        return made, run, make_person("mia", Role.OPERATOR)

    made, run, mia = await in_database(prepare)()
    topics = [f"run:{run}", f"inbox:{made.pk}", f"system:{made.pk}"]
    socket = await in_database(browser)(mia)
    await socket.open()
    for topic in topics:
        await socket.say({"op": "subscribe", "topic": topic})
        answer = await socket.next()
        assert (answer["op"], answer["why"]) == ("refused", "There is no such topic.")
        await in_database(tell)(topic, n=1)
    assert await socket.silent()

    ann = await in_database(make_person)("ann", Role.ADMIN)
    change = in_database(set_member)
    await change(project=made, user=ann, via="", username="mia", role=Role.VIEWER)
    for topic in topics:
        await socket.say({"op": "subscribe", "topic": topic})
        assert (await socket.next())["op"] == "subscribed"
    await change(project=made, user=ann, via="", username="mia", role="")
    ended = [await socket.next() for _ in range(2 * len(topics))]
    assert {one["topic"] for one in ended if one["op"] == "refused"} == set(topics)
    for topic in topics:
        await in_database(tell)(topic, n=2)
    assert await socket.silent()
    await socket.close()
