"""Who reaches whose objects, for every route of the API.

The routes come from the router, so that a new one is asked too. A token that may not see an object
gets the answer that it gets for one that does not exist: neither content nor existence leaks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from apps.accounts.models import Project, User
from apps.adaptations.models import Adaptation, DecisionRecord, Delegation, Plan
from apps.audit.models import AuditEvent
from apps.notifications.models import Channel, DutyShift
from apps.policies.models import Freeze
from apps.policies.services import current_policy
from apps.rest.throttling import ActThrottle, AuditThrottle, TelemetryThrottle, TokenThrottle
from apps.workers.models import CompileJob
from esper.contracts import Role, Severity, TokenScope, ViolationRule
from esper_web import api_v1
from tests.apps.callers import Answer, Caller, Inbox, Trainer, register
from tests.apps.cast import make_kernel, token_of
from tests.apps.recipes.rows import make_launch, make_worker

pytestmark = pytest.mark.django_db

CANARY = "canary-7f3a"
METHODS = ("get", "post", "delete")
# What a trainer's own token is for; everything else is refused to it, also about its own run.
OF_TRAINERS = {
    "get runs/<uid>",
    "get runs/<uid>/metrics",
    "get runs/<uid>/commands",
    "get kernels/<digest>/<file>",
    "post runs/<uid>/hello",
    "post runs/<uid>/telemetry",
    "post runs/<uid>/commands/<seq>/ack",
    "post runs/<uid>/rollbacks",
    "post runs/<uid>/remedies",
    "post runs/<uid>/remedy-proposals",
    "post runs/<uid>/remedy-verdicts",
    "post runs/<uid>/finish",
}


@dataclass(frozen=True)
class Route:
    method: str
    pattern: str

    def __str__(self) -> str:
        return f"{self.method} {self.pattern}"

    def address(self, objects: dict[str, str]) -> str:
        """The path to the object of its first folder; the other parts are anything."""
        kind = self.pattern.split("/")[0]
        path = re.sub(
            r"<(uid|slug|name|digest|version|number)>", objects.get(kind, "none"), self.pattern
        )
        return re.sub(r"<(seq|file)>", "1", path)


def _routes(patterns: Any = api_v1.urlpatterns, prefix: str = "") -> Iterator[Route]:
    for pattern in patterns:
        path = prefix + re.sub(r"<\w+:(\w+)>", r"<\1>", str(pattern.pattern))
        if hasattr(pattern, "url_patterns"):
            yield from _routes(pattern.url_patterns, path)
        elif path != "^.*$":
            view = pattern.callback.view_class
            yield from (Route(method, path) for method in METHODS if hasattr(view, method))


ROUTES = sorted(_routes(), key=str)


@pytest.fixture(autouse=True)
def _no_throttle(monkeypatch: pytest.MonkeyPatch) -> None:
    for throttle in (ActThrottle, AuditThrottle, TelemetryThrottle, TokenThrottle):
        monkeypatch.setattr(throttle, "rate", "100000/min")


@pytest.fixture
def objects(people: dict[Role, User], inbox: Inbox) -> dict[str, str]:
    """One object of every kind, of a run whose name must not be seen by others."""
    owner = people[Role.RESEARCHER]
    inbox.trainer = trainer = register(owner, name=CANARY)
    assert trainer.send(metrics=[], frames=[]).status < 300
    adaptation = inbox.waiting()
    violation = trainer.row().violations.create(
        rule=ViolationRule.COMMAND, severity=Severity.INFO, text=CANARY
    )
    channel = Channel.objects.create(owner=owner, kind="slack", target=CANARY, site="x")
    launch = make_launch(owner)
    job = CompileJob.objects.create(
        adaptation_uid=adaptation.uid, run_uid=trainer.run, blueprint_slug=CANARY, layer={}
    )
    return {
        "audit": str(AuditEvent.objects.latest("id").pk),
        "channels": channel.uid,
        "deliveries": channel.deliveries.create(type="switch.on", data={"text": CANARY}).uid,
        "jobs": job.uid,
        "policies": str(current_policy().version),
        "recipes": launch.recipe.uid,
        "remedies": "rewind",
        "people": owner.username,
        "runs": trainer.run,
        "adaptations": adaptation.uid,
        "plans": Plan.objects.create(
            run=trainer.row(),
            run_epoch=1,
            idempotency_key="plan",
            policy=CANARY,
            safety_policy=current_policy(),
            proposed_step=1,
            deadline_at=timezone.now(),
        ).uid,
        "delegations": Delegation.objects.create(
            run=trainer.row(),
            granted_by=people[Role.OPERATOR],
            remedy="set_lr",
            in_words=CANARY,
            most_uses=1,
            until=timezone.now(),
            reason=CANARY,
        ).uid,
        "freezes": Freeze.objects.create(
            project=Project.objects.create(name="frozen"),
            starts_at=timezone.now(),
            ends_at=timezone.now() + timedelta(hours=1),
            reason=CANARY,
            set_by=people[Role.CURATOR],
        ).uid,
        "duty": DutyShift.objects.create(
            user=owner, begins=timezone.now(), ends=timezone.now()
        ).uid,
        "projects": Project.objects.create(name=CANARY).uid,
        "decisions": DecisionRecord.objects.get(adaptation=adaptation).uid,
        "violations": violation.uid,
        "launches": launch.uid,
        "tokens": owner.tokens.latest("id").uid,
        "kernels": make_kernel().digest,
        "workers": make_worker().name,
        "blueprints": adaptation.blueprint.slug,
        "variants": adaptation.blueprint.variants.create(
            factors={"hidden": 0.5}, key="hidden 0.5", policy="x", learned_from=[adaptation.uid]
        ).uid,
    }


def ask(caller: Caller, route: Route, objects: dict[str, str]) -> Answer:
    path = route.address(objects)
    if route.method == "post":
        return caller.post(path, {}, **{"If-Match": '"1"'})
    return getattr(caller, route.method)(path)


def content(answer: Answer) -> Any:
    members = dict(answer.data)
    members.pop("request_id", None)
    return answer.status, members


def test_every_kind_of_object_is_known_to_this_test(objects: dict[str, str]) -> None:
    kinds = {route.pattern.split("/")[0] for route in ROUTES if "<" in route.pattern}
    assert kinds == set(objects)
    assert {str(route) for route in ROUTES} >= OF_TRAINERS


def test_nobody_gets_anything_without_signing_in(objects: dict[str, str], anybody: Caller) -> None:
    for route in ROUTES:
        answer = ask(anybody, route, objects)
        assert (answer.status, answer.code) == (401, "not-signed-in"), route


def test_the_trainer_of_another_run_learns_nothing(
    objects: dict[str, str], people: dict[Role, User]
) -> None:
    stranger = register(people[Role.OPERATOR], name="stranger")
    missing = {kind: f"{uid[:4]}{'0' * (len(uid) - 4)}" for kind, uid in objects.items()}
    before = states()
    for route in ROUTES:
        answer = ask(stranger, route, objects)
        assert 400 <= answer.status < 500, route
        assert CANARY not in answer.response.content.decode(), route
        if "<" in route.pattern:
            assert content(answer) == content(ask(stranger, route, missing)), route
    assert states() == before


def test_a_trainers_token_is_for_the_calls_of_trainers_only(
    objects: dict[str, str], inbox: Inbox
) -> None:
    for route in ROUTES:
        answer = ask(inbox.trainer, route, objects)
        if str(route) in OF_TRAINERS:
            assert answer.status != 403, route
        else:
            assert (answer.status, answer.code) == (403, "insufficient-scope"), route


@pytest.mark.parametrize(
    ("scope", "writes"),
    [
        (TokenScope.READ, {"post ws-tickets"}),
        (TokenScope.RUNS_CREATE, {"post runs"}),
        (TokenScope.PROPOSE, {"post runs/<uid>/ask-for-remedy"}),
        (
            TokenScope.DECIDE,
            {
                "post adaptations/<uid>/verdict",
                "post blueprints/<slug>/variants",
                "post runs/<uid>/adaptations",
                "post runs/<uid>/declines",
                "post runs/<uid>/plans",
                "post services/tamiyo/heartbeat",
                "post ws-tickets",
            },
        ),
    ],
)
def test_a_token_writes_only_what_its_scope_is_for(
    scope: TokenScope, writes: set[str], objects: dict[str, str], people: dict[Role, User]
) -> None:
    caller = Caller(token_of(people[Role.ADMIN], scope))  # an admin's: the role allows everything
    for route in ROUTES:
        if route.method == "get" or str(route) in writes:
            continue
        answer = ask(caller, route, objects)
        assert (answer.status, answer.code) == (403, "insufficient-scope"), route


def test_a_trainers_token_that_was_replaced_reaches_its_run_no_more(
    objects: dict[str, str], inbox: Inbox, people: dict[Role, User]
) -> None:
    old: Trainer = inbox.trainer
    register(people[Role.RESEARCHER], name=CANARY)  # the next epoch
    for route in ROUTES:
        answer = ask(old, route, objects)
        assert (answer.status, answer.code) == (401, "not-signed-in"), route


def states() -> list[Any]:
    return list(Adaptation.objects.order_by("id").values_list("state", "version"))
