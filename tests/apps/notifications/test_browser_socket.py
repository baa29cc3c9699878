"""The browser's socket, through the real ASGI application."""

from __future__ import annotations

import asyncio

import pytest
from django.test import Client

from apps.accounts.models import User
from apps.notifications import consumers as browser_side
from apps.notifications import fan_out
from apps.notifications.services import group_name, notify, run_topic
from esper.contracts import Role, TokenScope, codec
from tests.apps.callers import Trainer, metrics
from tests.apps.cast import token_of
from tests.apps.sockets import (
    ORIGIN,
    Socket,
    Vanishing,
    beats,
    browser,
    in_database,
    tell,
    trainer_socket,
)

pytestmark = pytest.mark.django_db(transaction=True)


async def test_a_browser_receives_what_it_subscribed_to_and_nothing_else(
    people: dict[Role, User], trainer: Trainer
) -> None:
    topic = run_topic(trainer.run)
    socket = await in_database(browser)(people[Role.VIEWER])
    await socket.open()
    await socket.say({"op": "subscribe", "topic": topic})
    answer = await socket.next()
    assert (answer["op"], answer["topic"]) == ("subscribed", topic)
    await in_database(tell)("inbox", n=1)
    await in_database(tell)(topic, n=2)
    event = await socket.next()
    assert (event["topic"], event["seq"], event["data"]) == (topic, answer["seq"] + 1, {"n": 2})
    assert {"ts", "type"} <= set(event)
    await socket.say({"op": "unsubscribe", "topic": topic})
    assert (await socket.next())["op"] == "unsubscribed"
    await in_database(tell)(topic, n=3)
    assert await socket.silent()
    await socket.close()


async def test_missed_events_are_replayed_from_the_last_known_number(
    people: dict[Role, User],
) -> None:
    for n in range(1, 6):
        await in_database(tell)("inbox", n=n)
    socket = await in_database(browser)(people[Role.OPERATOR])
    await socket.open()
    await socket.say({"op": "subscribe", "topic": "inbox", "since": 2})
    assert await socket.next() == {"op": "subscribed", "topic": "inbox", "seq": 5}
    assert [(await socket.next())["seq"] for _ in range(3)] == [3, 4, 5]
    await in_database(tell)("inbox", n=6)
    assert (await socket.next())["data"] == {"n": 6}
    await socket.close()


async def test_the_event_of_a_lost_notification_comes_with_the_next_one(
    people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = await in_database(browser)(people[Role.OPERATOR])
    await socket.open()
    await socket.say({"op": "subscribe", "topic": "inbox"})
    await socket.next()
    with monkeypatch.context() as broken:
        broken.setattr("apps.notifications.services.notify", lambda *_: None)
        await in_database(tell)("inbox", n=1)
    await in_database(tell)("inbox", n=2)
    assert [(await socket.next())["data"]["n"] for _ in range(2)] == [1, 2]
    assert await socket.silent()
    await socket.close()


async def test_a_browser_that_was_away_for_long_is_told_to_read_the_page_again(
    people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser_side, "MAX_REPLAY", 2)
    for n in range(5):
        await in_database(tell)("inbox", n=n)
    socket = await in_database(browser)(people[Role.OPERATOR])
    await socket.open()
    await socket.say({"op": "subscribe", "topic": "inbox", "since": 1})
    assert await socket.next() == {"op": "subscribed", "topic": "inbox", "seq": 5, "resync": True}
    assert await socket.silent()
    await socket.close()


async def test_malformed_frames_are_answered_and_the_socket_stays_open(
    people: dict[Role, User],
) -> None:
    socket = await in_database(browser)(people[Role.VIEWER])
    await socket.open()
    for frame in (
        "{",
        "NaN",
        "[" * 1000,
        '{"op": "subscribe"}',
        '{"op": "approve", "topic": "inbox"}',
        '{"op": "subscribe", "topic": "inbox", "since": -1}',
        '{"op": "subscribe", "topic": "inbox", "since": 1e999}',
        '{"op": "subscribe", "topic": "inbox", "since": true}',
        '{"op": "subscribe", "topic": "' + "x" * 5000 + '"}',
    ):
        await socket.say(frame)
        answer = await socket.next()
        assert answer["op"] == "error", frame
        assert answer["why"]
    for topic in ("run:../etc", "run:", "everything", "trainer.run_1"):
        await socket.say({"op": "subscribe", "topic": topic})
        assert (await socket.next())["op"] == "refused"
    await socket.say({"op": "subscribe", "topic": "system"})
    assert (await socket.next())["op"] == "subscribed"
    await socket.close()


async def test_progress_is_coalesced_and_a_diverged_loss_is_a_word(
    people: dict[Role, User], trainer: Trainer
) -> None:
    topic = run_topic(trainer.run)
    socket = await in_database(browser)(people[Role.VIEWER])
    await socket.open()
    await socket.say({"op": "subscribe", "topic": topic})
    await socket.next()
    for step in range(20):
        data = {"step": step, "loss": "nan"}
        message = {"topic": topic, "type": "run.progress", "data": data}
        await in_database(notify)(group_name(topic), "feed.progress", message)
    seen = [(await socket.next())["data"]["step"]]
    while seen[-1] < 19:
        seen.append((await socket.next())["data"]["step"])
    assert len(seen) < 10
    assert seen == sorted(seen)
    await socket.close()


async def test_telemetry_notifies_the_browsers(people: dict[Role, User], trainer: Trainer) -> None:
    socket = await in_database(browser)(people[Role.VIEWER])
    await socket.open()
    await socket.say({"op": "subscribe", "topic": run_topic(trainer.run)})
    await socket.next()
    await in_database(trainer.send)(metrics=[metrics(7, loss="inf")])
    events = [await socket.next(), await socket.next()]
    by_type = {event["type"]: event["data"] for event in events}
    assert by_type["run.state"]["to"] == "running"
    assert by_type["run.progress"] == {"step": 7, "loss": "inf"}
    await socket.close()


@pytest.mark.parametrize(
    "origin",
    [
        b"http://evil.example",
        b"https://testserver.evil.example",
        b"http://testserver:8888",
        b"https://testserver",
        b"http://localhost",
        b"http://user@testserver",
        b"http://testserver/",
        b"http://testserver:x",
        b"null",
        b"",
        None,
    ],
)
async def test_a_page_of_another_origin_cannot_use_the_cookie(
    people: dict[Role, User], origin: bytes | None
) -> None:
    socket = await in_database(browser)(people[Role.OPERATOR], origin)
    await socket.refused()


async def test_unknown_and_disabled_accounts_get_no_stream(people: dict[Role, User]) -> None:
    assert await Socket("/ws/v1/stream", [ORIGIN]).refused() == 4401
    token = await in_database(token_of)(people[Role.OPERATOR], TokenScope.READ)
    header = (b"authorization", f"Bearer {token}".encode())
    assert await Socket("/ws/v1/stream", [ORIGIN, header]).refused() == 4401
    await in_database(User.objects.update)(is_active=False)
    socket = await in_database(browser)(people[Role.VIEWER])
    assert await socket.refused() == 4401


async def test_the_sockets_of_a_session_end_at_once_when_its_person_signs_out(
    people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fan_out, "PING_SECONDS", 3600)
    client = Client()
    await in_database(client.force_login)(people[Role.OPERATOR])
    cookie = f"sessionid={client.cookies['sessionid'].value}".encode()
    ending = [Socket("/ws/v1/stream", [(b"cookie", cookie), ORIGIN]) for _ in range(2)]
    staying = await in_database(browser)(people[Role.OPERATOR])  # another session of hers
    for socket in (*ending, staying):
        await socket.open()
    await in_database(client.post)("/logout")
    assert [await socket.closed() for socket in ending] == [4401, 4401]
    assert await staying.silent()
    await staying.close()


@pytest.mark.parametrize("how", ["signs out", "is dismissed"])
async def test_a_stream_ends_with_the_session(
    how: str, people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.contrib.sessions.models import Session

    monkeypatch.setattr(fan_out, "PING_SECONDS", 0.1)
    socket = await in_database(browser)(people[Role.OPERATOR])
    await socket.open()
    assert (await socket.next())["op"] == "ping"
    if how == "signs out":
        await in_database(Session.objects.all().delete)()
    else:
        await in_database(User.objects.update)(is_active=False)
    assert await socket.closed() == 4401


async def test_two_browsers_and_a_trainer_at_once(
    people: dict[Role, User], trainer: Trainer
) -> None:
    topic = run_topic(trainer.run)
    watchers = [await in_database(browser)(people[role]) for role in (Role.VIEWER, Role.ADMIN)]
    socket = trainer_socket(trainer.token, trainer.run)
    await asyncio.gather(*(one.open() for one in (*watchers, socket)))
    for watcher in watchers:
        await watcher.say({"op": "subscribe", "topic": topic})
        await watcher.next()
    await in_database(tell)(topic, n=1)
    assert [(await watcher.next())["data"] for watcher in watchers] == [{"n": 1}] * 2
    assert await socket.silent()
    for one in (*watchers, socket):
        await one.close()


async def test_a_socket_whose_client_vanished_leaves_nothing_running(
    people: dict[Role, User], trainer: Trainer
) -> None:
    subscribing = await in_database(browser)(people[Role.VIEWER])
    subscribe = codec.encode({"op": "subscribe", "topic": "system"}).decode()
    incoming = [
        {"type": "websocket.connect"},
        {"type": "websocket.receive", "text": subscribe},
    ]
    await Vanishing(subscribing.wire.scope, incoming, most=1).run()
    assert beats() == []
