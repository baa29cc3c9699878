"""What the sockets of one process share: one text for all, one check of sign-ins and rights."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.sessions.models import Session
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from apps.accounts.actors import Actor
from apps.accounts.models import ApiToken, Membership, Project, User
from apps.accounts.services import issue_token, revoke_token
from apps.accounts.sessions import end_other_sessions
from apps.notifications import consumers, fan_out
from apps.notifications.rights import rights_of
from apps.notifications.tickets import Holder
from apps.runs.models import Run
from esper.contracts import Role, TokenScope, codec
from tests.apps.callers import Trainer
from tests.apps.cast import make_person
from tests.apps.notifications.test_socket_tickets import socket_with, ticket_of
from tests.apps.sockets import Socket, browser, in_database, tell


def _session(user: User) -> str:
    client = Client()
    client.force_login(user)
    return client.cookies["sessionid"].value


def _token(user: User, **changes: Any) -> int:
    token, _ = issue_token(owner=user, name="t", scopes=[TokenScope.READ])
    ApiToken.objects.filter(pk=token.pk).update(**changes)
    return token.pk


@pytest.mark.django_db
def test_rights_of_many_sockets_are_those_of_each_and_cost_the_same_queries(
    people: dict[Role, User], trainer: Trainer
) -> None:
    project = Project.objects.create(name="other")
    Run.objects.filter(uid=trainer.run).update(project=project)
    topic = f"run:{trainer.run}"
    vera, olga, carl = people[Role.VIEWER], people[Role.OPERATOR], people[Role.CURATOR]
    past = timezone.now() - timedelta(seconds=1)
    Membership.objects.create(project=project, user=olga, role=Role.VIEWER)
    expired, replaced = _session(vera), _session(carl)
    Session.objects.filter(pk=expired).update(expire_date=past)
    open_ones = {user: Holder(user.pk, session_key=_session(user)) for user in (vera, olga)}
    carl.set_password("another")
    carl.save()
    gone = make_person("gone", Role.OPERATOR)
    ended = [
        Holder(vera.pk, session_key=expired),
        Holder(vera.pk, session_key="unknown"),
        Holder(carl.pk, session_key=replaced),
        Holder(vera.pk, session_key=open_ones[olga].session_key),
        Holder(gone.pk, session_key=_session(gone)),
        Holder(gone.pk),
        Holder(olga.pk, _token(olga, revoked_at=past)),
        Holder(olga.pk, _token(olga, expires_at=past)),
        Holder(10**9),
    ]
    User.objects.filter(pk=gone.pk).update(is_active=False)
    of_default = Holder(olga.pk, _token(olga, project_id=0))
    held = [*open_ones.values(), Holder(olga.pk, _token(olga)), of_default]
    asked = {holder: [topic, "inbox", f"inbox:{project.pk}"] for holder in (*ended, *held)}

    with CaptureQueriesContext(connection) as few:
        rights_of({open_ones[vera]: [topic], held[2]: []})
    with CaptureQueriesContext(connection) as many:
        found = rights_of(asked)
    assert len(many) <= len(few) + 1 <= 8  # one for the topics
    assert set(found) == set(held)
    allowed = {
        holder: [permission.allowed for permission in rights.permissions.values()]
        for holder, rights in found.items()
    }
    nothing, everything = [False, True, False], [True, True, True]
    assert allowed == dict(zip(held, [nothing, everything, everything, nothing], strict=True))


def _disable(user: User) -> None:
    user.is_active = False
    user.save()


def _new_password(user: User) -> None:
    user.set_password("another")
    user.save()


def _end_others(user: User) -> None:
    end_other_sessions(user=user, via="", present="")


def _revoke(user: User) -> None:
    revoke_token(token=ApiToken.objects.get(owner=user), actor=Actor.person(user))


def _with_ticket(user: User) -> Socket:
    return socket_with(ticket_of(user))


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize(
    ("opened", "end"),
    [
        (browser, _disable),
        (_with_ticket, _disable),
        (browser, _new_password),
        (browser, _end_others),
        (_with_ticket, _revoke),
    ],
)
async def test_a_socket_ends_at_once_with_what_it_was_opened_by(
    opened: Callable[[User], Socket],
    end: Callable[[User], None],
    people: dict[Role, User],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fan_out, "PING_SECONDS", 3600)
    ending = await in_database(opened)(people[Role.OPERATOR])
    staying = await in_database(browser)(people[Role.VIEWER])
    for socket in (ending, staying):
        await socket.open()
    await in_database(end)(people[Role.OPERATOR])
    assert await ending.closed() == 4401
    assert await staying.silent()
    await staying.close()


@pytest.mark.django_db(transaction=True)
async def test_an_event_is_encoded_once_for_all_sockets(
    people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    sockets = [await in_database(browser)(user) for user in (*people.values(), *people.values())]
    for socket in sockets:
        await socket.open()
        await socket.say({"op": "subscribe", "topic": "inbox"})
        assert (await socket.next())["op"] == "subscribed"
    encoded: list[Any] = []

    def encode(message: Any) -> bytes:
        encoded.append(message)
        return plain(message)

    plain = codec.encode
    monkeypatch.setattr(codec, "encode", encode)
    await in_database(tell)("inbox", n=1)
    assert [(await socket.next())["data"] for socket in sockets] == [{"n": 1}] * len(sockets)
    assert [message.get("topic") for message in encoded].count("inbox") == 1
    for socket in sockets:
        await socket.close()


@pytest.mark.django_db(transaction=True)
async def test_the_event_of_a_lost_notification_comes_with_the_next_ping(
    people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fan_out, "PING_SECONDS", 0.2)
    socket = await in_database(browser)(people[Role.OPERATOR])
    await socket.open()
    await socket.say({"op": "subscribe", "topic": "inbox"})
    while (await socket.next())["op"] != "subscribed":
        pass  # a ping
    with monkeypatch.context() as broken:
        broken.setattr("apps.notifications.services.notify", lambda *_: None)
        for n in (1, 2):
            await in_database(tell)("inbox", n=n)
    seen: list[int] = []
    while len(seen) < 2:
        message = await socket.next()
        if "data" in message:
            seen.append(message["data"]["n"])
    assert seen == [1, 2]
    await socket.close()


@pytest.mark.django_db(transaction=True)
async def test_a_browser_that_does_not_read_delays_no_other_and_is_closed(
    people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "SEND_TIMEOUT_SECONDS", 3600.0)
    slow, quick = [await in_database(browser)(people[Role.VIEWER]) for _ in range(2)]
    reading = await _that_stops_reading(slow)
    await quick.open()
    await quick.say({"op": "subscribe", "topic": "inbox"})
    assert (await quick.next())["op"] == "subscribed"
    for n in range(3):
        await in_database(tell)("inbox", n=n)
        assert (await quick.next())["data"] == {"n": n}
    assert not reading.done()
    reading.cancel()
    await asyncio.wait([reading])
    monkeypatch.setattr(consumers, "SEND_TIMEOUT_SECONDS", 0.05)
    reading = await _that_stops_reading(slow)
    await in_database(tell)("inbox", n=3)
    await reading  # it ends by itself
    await quick.close()


async def _that_stops_reading(socket: Socket) -> asyncio.Task[None]:
    """A consumer whose client subscribes to the inbox, and reads nothing after the answer."""
    from esper_web.asgi import application

    untyped: Any = application
    subscribed = asyncio.Event()
    subscribe = codec.encode({"op": "subscribe", "topic": "inbox"}).decode()
    incoming = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": subscribe}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop(0)
        return await asyncio.Future()

    async def send(message: dict[str, Any]) -> None:
        if '"topic":"inbox"' not in message.get("text", ""):
            return
        if subscribed.is_set():
            await asyncio.Future()
        subscribed.set()

    task = asyncio.create_task(untyped(socket.wire.scope, receive, send))
    await subscribed.wait()
    return task


@pytest.mark.django_db(transaction=True)
async def test_nothing_runs_without_a_socket(people: dict[Role, User]) -> None:
    before = asyncio.all_tasks()
    sockets = [await in_database(browser)(people[Role.VIEWER]) for _ in range(2)]
    for socket in sockets:
        await socket.open()
        await socket.say({"op": "subscribe", "topic": "inbox"})
        await socket.next()
    for socket in sockets:
        await socket.close()
    assert asyncio.all_tasks() == before
    assert not fan_out.fan_out().sockets
