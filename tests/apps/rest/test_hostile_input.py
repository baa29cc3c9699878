"""Input that once did harm: bodies that cost time, extreme numbers, late requests."""

from __future__ import annotations

import time
from typing import Any

import pytest

from apps.accounts.actors import Actor, ActorKind
from apps.accounts.models import User
from apps.audit.models import AuditEvent
from apps.notifications import consumers
from apps.rest.errors import MAX_ERRORS
from apps.rest.problems import Problem
from apps.runs.models import Run
from apps.trainers import services as trainers
from esper.contracts import Certificate, CommandAck, CommandState, Role, RunState, TokenScope, codec
from esper.exceptions import CodecError
from tests.apps.callers import Caller, register
from tests.apps.cast import token_of

pytestmark = pytest.mark.django_db

TRAINER = Actor(ActorKind.TRAINER, "digits")


def seconds_of_work(body: bytes) -> float:
    started = time.process_time()
    with pytest.raises(CodecError):
        codec.decode(body)
    return time.process_time() - started


def test_a_text_of_escaped_quotes_without_an_end_costs_no_more_than_its_length() -> None:
    # Looked through again from each quote, a quarter of this megabyte alone takes minutes.
    unfinished = b'"' + b'\\"' * 500_000
    assert seconds_of_work(unfinished) < 5.0


def test_brackets_in_texts_do_not_count_as_depth_and_those_outside_do() -> None:
    assert codec.decode(b'["' + b"[" * 100 + b'", "\\"[[", {}]') == ["[" * 100, '"[[', {}]
    with pytest.raises(CodecError, match="deeper"):
        codec.decode(b'["\\\\",' + b"[" * 40 + b"]" * 40 + b"]")


@pytest.mark.parametrize("limit", ["201", "0", "000001999999", "000001" + "9" * 5000, "\u0663"])
def test_a_page_cannot_be_made_larger_than_allowed(viewer: Caller, limit: str) -> None:
    answer = viewer.get(f"audit?limit={limit}")
    assert (answer.status, answer.code) == (400, "invalid")


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59-23:00", "0001-01-01T00:00:00%2B23:00"])
def test_a_time_beyond_the_calendar_in_utc_is_refused(viewer: Caller, moment: str) -> None:
    for name in ("at__gte", "at__lt"):
        answer = viewer.get(f"audit?{name}={moment}")
        assert (answer.status, answer.code) == (400, "invalid")


def body_with_many(member: str, count: int) -> bytes:
    items = b",".join([b"1"] * count)
    if member in {"layers", "scopes"}:
        return f'{{"{member}":['.encode() + items + b"]}"
    entries = ",".join(f'"{index}":1' for index in range(count)).encode()
    return f'{{"{member}":{{'.encode() + entries + b"}}" if member else b"{" + entries + b"}"


@pytest.mark.parametrize(
    ("path", "member"),
    [("runs", "layers"), ("runs", "versions"), ("tokens", "scopes"), ("tokens", "")],
)
def test_a_flood_of_wrong_items_gets_a_short_answer(
    people: dict[Role, User], path: str, member: str
) -> None:
    caller = Caller(token_of(people[Role.RESEARCHER], TokenScope.ACT))
    answer = caller.post(path, body_with_many(member, 20_000))
    assert (answer.status, answer.code) == (400, "invalid")
    assert len(answer.data["errors"]) <= MAX_ERRORS
    assert not any(error["pointer"].startswith(f"/{member}/") for error in answer.data["errors"])


def test_a_trainer_that_was_replaced_while_its_request_waited_changes_nothing(
    people: dict[Role, User],
) -> None:
    trainer = register(people[Role.RESEARCHER])
    read_before_the_takeover = Run.objects.get(uid=trainer.run)
    register(people[Role.RESEARCHER])
    before = AuditEvent.objects.count()
    acknowledgement = CommandAck(seq=1, state=CommandState.APPLIED, step=1)
    late: dict[str, Any] = {"run": read_before_the_takeover, "epoch": 1, "actor": TRAINER}
    for attempt in (
        lambda: trainers.settle_hello(step=1, applied=[], **late),
        lambda: trainers.acknowledge_command(ack=acknowledgement, **late),
        lambda: trainers.finish_run(state=RunState.FINISHED, step=1, reason="", **late),
    ):
        with pytest.raises(Problem) as refused:
            attempt()
        assert refused.value.code == "old-epoch"
    assert Run.objects.get(uid=trainer.run).state != RunState.FINISHED
    assert AuditEvent.objects.count() == before


@pytest.mark.parametrize("op", [["subscribe"], {"op": "subscribe"}, None, 1, True, "nothing"])
def test_a_frame_with_an_unknown_op_is_an_error_and_leaves_the_socket_open(op: Any) -> None:
    with pytest.raises(CodecError, match="a frame is"):
        consumers._request({"op": op, "topic": "inbox"})


GOOD = Certificate(
    max_abs_diff=0.0,
    tolerance=0.0,
    preserving=True,
    live=True,
    rng_neutral=True,
    parameters=2048,
    parameters_declared=2048,
).to_wire()


@pytest.mark.parametrize(
    "changes",
    [
        {"parameters": {"a": 1}},
        {"parameters_declared": "x"},
        {"preserving": "yes"},
        {"live": []},
        {"undo_exact": 1},
        {"tolerance": True},
        {"failures": [["a"]]},
        {"failures": "none"},
        {"max_abs_diff": None},
    ],
)
def test_a_certificate_with_members_of_wrong_types_is_refused(
    people: dict[Role, User], changes: dict[str, Any]
) -> None:
    trainer = register(people[Role.RESEARCHER])
    ack = {"epoch": 1, "state": "applied", "certificate": {**GOOD, **changes}}
    answer = trainer.post(f"{trainer.path}/commands/1/ack", ack)
    assert (answer.status, answer.code) == (400, "invalid")
    ack["certificate"] = {**GOOD, "of_a_newer_sdk": 1}
    assert trainer.post(f"{trainer.path}/commands/1/ack", ack).status == 404  # no such command
