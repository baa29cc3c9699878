"""An approval is bound to one adaptation, as it was shown, to one person, for a time.

Approvals, each right but for one thing, are sent through the API; none may be accepted. The table
in docs/security.md is of the thousand that ./check --all sends.
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from django.db import transaction
from django.test import Client
from django.utils import timezone

from apps.accounts.models import ApiToken, User
from apps.adaptations.models import Adaptation
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.rest.throttling import ActThrottle
from apps.runs.models import Run
from apps.telemetry.models import Frame
from esper.contracts import SIGNALS, AdaptationState, Role, TokenScope
from tests.apps.callers import LAYERS, Answer, Caller, Inbox, shown
from tests.apps.cast import force_state, make_blueprint, make_person, token_of

pytestmark = pytest.mark.django_db

DOCUMENT = Path(__file__).parents[3] / "docs" / "security.md"
THOUSAND = 125  # of each of the eight kinds
S = AdaptationState


@dataclass
class Approval:
    """What is sent; right until a mutation changes it."""

    caller: Caller
    adaptation: Adaptation
    second: Adaptation  # another one that waits
    body: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    uid: str = ""

    def __post_init__(self) -> None:
        self.uid = self.adaptation.uid
        self.body = {"reason": "it looks right", **shown(self.adaptation)}
        self.headers = {"If-Match": f'"{self.adaptation.version}"', "Idempotency-Key": "the key"}

    def send(self, act: str = "approve") -> Answer:
        return self.caller.post(f"adaptations/{self.uid}/{act}", self.body, **dict(self.headers))


Mutation = Callable[[Approval], object]


def _row(**changes: Any) -> Mutation:
    return lambda it: Adaptation.objects.filter(pk=it.adaptation.pk).update(**changes)


def _run(**changes: Any) -> Mutation:
    return lambda it: Run.objects.filter(pk=it.adaptation.run_id).update(**changes)


def _body(**changes: Any) -> Mutation:
    return lambda it: it.body.update(changes)


def _header(name: str, value: str) -> Mutation:
    return lambda it: it.headers.update({name: value})


def _then(*steps: Mutation) -> Mutation:
    return lambda it: [step(it) for step in steps]


# --- one iterator of mutations for each kind ------------------------------------------------------


def arguments(chance: random.Random) -> Iterator[Mutation]:
    """What would be done: changed in the row after it was shown, or in the request."""
    while True:
        yield _row(config={"rank": chance.randint(5, 4096)})
        yield _row(config={"rank": 4, f"extra{chance.randint(0, 99)}": chance.random()})
        yield _row(layer=chance.choice(["body", "fc ", "FC", "frozen", f"fc{chance.random()}"]))
        yield _row(adaptation_type=chance.choice(["add_capacity", "stabilize", "x"]))
        yield _row(forecast_parameters=chance.randint(2049, 10**9))
        yield _row(forecast_memory_mib=chance.uniform(1, 1e6))
        yield _row(forecast_latency_ms=chance.choice([None, chance.uniform(1, 1e6)]))
        yield _row(proposed_step=chance.randint(1001, 10**9))
        yield _row(risk=chance.choice(["none", "medium", "high"]))
        yield _row(**{chance.choice(["reasons", "checks", "asks", "why_not"]): []})
        yield _row(reasons=[{"signal": "loss", "text": f"It fell by {chance.random()}."}])
        yield _row(confidence=chance.choice([None, chance.uniform(0.61, 1.0)]))
        yield _body(**{chance.choice(["state", "config", "layer", "run"]): "kept"})
        yield _body(evidence_hash=f"{chance.getrandbits(256):064x}")
        yield _flipped(chance.randrange(64))


def _flipped(place: int) -> Mutation:
    def mutate(it: Approval) -> None:
        text = it.body["evidence_hash"]
        digit = "0123456789abcdef"[(int(text[place], 16) + 1) % 16]
        it.body["evidence_hash"] = text[:place] + digit + text[place + 1 :]

    return mutate


def blueprint(chance: random.Random) -> Iterator[Mutation]:
    """Another module than the one that was shown."""
    names = [f"swapped_{n}" for n in range(8)]
    while True:
        name = chance.choice(names)

        def swap(it: Approval, name: str = name) -> None:
            other = Blueprint.objects.get(slug=name)
            Adaptation.objects.filter(pk=it.adaptation.pk).update(blueprint=other)

        yield swap
        yield _then(swap, _body(accept_drift=True))
        yield _renamed(f"renamed_{chance.randrange(10**6)}")


def _renamed(slug: str) -> Mutation:
    return lambda it: Blueprint.objects.filter(pk=it.adaptation.blueprint_id).update(slug=slug)


def epoch(chance: random.Random) -> Iterator[Mutation]:
    """The trainer was started again, or the row claims another start of it."""
    while True:
        number = chance.randint(2, 10_000)
        yield _run(epoch=number)
        yield _row(run_epoch=number)
        yield _then(_run(epoch=number), _row(run_epoch=number))
        yield _then(_run(epoch=number), _body(accept_drift=True))


def evidence(chance: random.Random) -> Iterator[Mutation]:
    """The layer or the loss has left the band around what was shown, or what was shown changed."""
    while True:
        yield _run(last_loss=1.5 + chance.uniform(0.01, 100.0))
        yield _run(last_loss=None, last_loss_status=chance.choice(["nan", "inf", "-inf"]))
        yield _health(chance.choice([chance.uniform(0.0, 0.09), chance.uniform(0.91, 1.0)]))
        yield _row(evidence={"loss": 1.0, "health": chance.uniform(0.0, 0.49)})
        yield _then(
            _row(evidence={"loss": chance.uniform(1.1, 99), "health": 0.5}),
            _body(accept_drift=True),
        )


def _health(value: float) -> Mutation:
    values = np.full((len(LAYERS), len(SIGNALS)), value, dtype="<f4").tobytes()
    return lambda it: Frame.objects.filter(run=it.adaptation.run).update(values=values)


def identity(chance: random.Random) -> Iterator[Mutation]:
    """Somebody who may not, or who does not prove who they are."""
    while True:
        for role in (Role.VIEWER, Role.RESEARCHER, Role.CURATOR):
            yield _by(lambda role=role: Caller(_token(role)))
        yield _own_run
        for scopes in ([TokenScope.READ], [TokenScope.RUNS_CREATE], [TokenScope.DECIDE]):
            yield _by(lambda scopes=scopes: Caller(_token(Role.OPERATOR, *scopes)))
        yield _by(lambda: Caller(""))
        yield _by(lambda: Caller(f"esp_{chance.getrandbits(256):x}"))
        yield _spoilt_token(is_active=False)
        yield _spoilt_token(expires_at=timezone.now() - timedelta(seconds=chance.randint(1, 999)))
        yield _spoilt_token(revoked_at=timezone.now())
        yield _claimed_by_another
        yield _browser_without_csrf


def _by(make: Callable[[], Caller]) -> Mutation:
    def mutate(it: Approval) -> None:
        it.caller = make()

    return mutate


def _token(role: Role, *scopes: TokenScope) -> str:
    person = User.objects.filter(role=role).exclude(username="tamiyo").first()
    assert person is not None
    return token_of(person, *(scopes or (TokenScope.READ, TokenScope.ACT)))


def _own_run(it: Approval) -> None:
    Run.objects.filter(pk=it.adaptation.run_id).update(owner=User.objects.get(username="olga"))


def _spoilt_token(**changes: Any) -> Mutation:
    def mutate(it: Approval) -> None:
        if "is_active" in changes:
            User.objects.filter(username="olga").update(**changes)
        else:
            ApiToken.objects.filter(owner__username="olga").update(**changes)

    return mutate


def _claimed_by_another(it: Approval) -> None:
    holder = User.objects.get(username="oscar")
    until = timezone.now() + timedelta(minutes=1)
    _row(claimed_by=holder, claimed_until=until)(it)


def _browser_without_csrf(it: Approval) -> None:
    client = Client(enforce_csrf_checks=True, raise_request_exception=False)
    client.force_login(User.objects.get(username="olga"))
    it.caller = Caller("", client)


def time(chance: random.Random) -> Iterator[Mutation]:
    """Too late, by a microsecond or by days, also after an attempt to extend or to claim."""
    while True:
        late = timedelta(microseconds=chance.choice([1, 10**3, 10**6, chance.randint(1, 10**12)]))
        yield _late(late)
        yield _then(_late(late), lambda it: _asks(it, "extend"))
        yield _then(_late(late), lambda it: _asks(it, "claim"))
        yield _then(_late(late), _row(state=S.EXPIRED))
        yield _then(_late(late), _body(accept_drift=True))


def _late(by: timedelta) -> Mutation:
    return lambda it: _row(deadline_at=timezone.now() - by)(it)


def _asks(it: Approval, act: str) -> None:
    headers = {"If-Match": it.headers["If-Match"], "Idempotency-Key": f"{act} first"}
    it.caller.post(f"adaptations/{it.uid}/{act}", {}, **headers)


def replay(chance: random.Random) -> Iterator[Mutation]:
    """An approval that was right once, or for another adaptation."""
    while True:
        yield lambda it: setattr(it, "uid", it.second.uid)
        yield _then(lambda it: setattr(it, "uid", it.second.uid), _body(accept_drift=True))
        yield _after("reject")
        yield _after("cancel")
        yield _after("claim", "release")
        yield _after("extend")
        yield _same_key_for_another_act
        yield _header("Idempotency-Key", "")


def _after(*acts: str) -> Mutation:
    """The approval is sent after other acts on the adaptation that it was read before."""

    def mutate(it: Approval) -> None:
        for act in acts:
            version = Adaptation.objects.values_list("version", flat=True).get(uid=it.uid)
            body = {"reason": "no"}
            done = it.caller.act(f"adaptations/{it.uid}/{act}", body, version=version)
            assert done.status == 200, done.data

    return mutate


def _same_key_for_another_act(it: Approval) -> None:
    done = it.caller.post(f"adaptations/{it.uid}/claim", {}, **dict(it.headers))
    assert done.status == 200, done.data
    version = Adaptation.objects.values_list("version", flat=True).get(uid=it.uid)
    it.headers["If-Match"] = f'"{version}"'


def version(chance: random.Random) -> Iterator[Mutation]:
    """Another version than the present one, or a state that cannot be approved."""
    others = [s for s in S if s not in (S.AWAITING_APPROVAL, S.PROPOSED)]
    while True:
        yield _header("If-Match", f'"{chance.choice([0, 1, 3, chance.randint(3, 10**9)])}"')
        yield _header("If-Match", chance.choice(["*", '"2", "3"', 'W/"2"x', "latest", ""]))
        yield _in_state(chance.choice(others))


def _in_state(state: AdaptationState) -> Mutation:
    return lambda it: force_state(it.adaptation, state)


KINDS = (arguments, blueprint, epoch, evidence, identity, time, replay, version)


# --- the test -------------------------------------------------------------------------------------


def approvals() -> int:
    return AuditEvent.objects.filter(act="adaptation.approved").count()


def attempt(inbox: Inbox, olga: Caller, mutate: Mutation | None) -> tuple[bool, Answer]:
    """(was anything approved, the answer); afterwards everything is as it was."""
    first, second = Adaptation.objects.order_by("id")
    with transaction.atomic():
        before = approvals()
        approval = Approval(olga, first, second)
        if mutate is not None:
            mutate(approval)
        answer = approval.send()
        approved = approvals() > before
        transaction.set_rollback(True)
    return approved, answer


# Of each of the eight kinds. The first 30 have each mutation of a kind twice, with other numbers.
@pytest.mark.parametrize("each", [30, pytest.param(THOUSAND, marks=pytest.mark.full)])
def test_no_mutated_approval_is_accepted(
    people: Any, inbox: Inbox, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    monkeypatch.setattr(ActThrottle, "rate", "100000/min")  # what it refuses would prove nothing
    make_person("oscar")
    for number in range(8):
        make_blueprint(f"swapped_{number}", ident=f"BP-{number}")
    inbox.waiting()
    assert inbox.propose(layer="head").status == 201
    olga = Caller(_token(Role.OPERATOR))
    assert attempt(inbox, olga, None)[0]

    refused: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in KINDS}
    accepted: Counter[str] = Counter()
    chance = random.Random(13)
    for kind in KINDS:
        mutations = kind(chance)
        for number in range(each):
            approved, answer = attempt(inbox, olga, next(mutations))
            assert answer.status < 500, (kind.__name__, number, answer.data)
            assert answer.status != 429
            accepted[kind.__name__] += approved
            refused[kind.__name__][answer.code] += 1

    assert attempt(inbox, olga, None)[0]
    assert accepted.total() == 0, accepted
    table = _table(accepted, refused)
    sys.stdout.write(table)  # pytest shows it where the document differs
    rows = documented()
    assert {kind: set(codes) for kind, codes in refused.items()} == {k: rows[k] for k in refused}
    if each == THOUSAND:
        assert table in DOCUMENT.read_text()


def documented() -> dict[str, set[str]]:
    rows = re.findall(r"^\| (\w+) \| \d+ \| 0 \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {kind: set(re.findall("`(.+?)`", codes)) for kind, codes in rows}


def _table(accepted: Counter[str], refused: dict[str, Counter[str]]) -> str:
    lines = ["| changed | sent | accepted | refused as |", "|---|---|---|---|"]
    for kind, codes in refused.items():
        named = ", ".join(f"`{code}`" for code in sorted(codes))
        lines.append(f"| {kind} | {codes.total()} | {accepted[kind]} | {named} |")
    total = sum(codes.total() for codes in refused.values())
    lines.append(f"| **all** | **{total}** | **{accepted.total()}** | |")
    return "\n".join(lines) + "\n"
