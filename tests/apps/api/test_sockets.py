"""The browser's and the trainer's sockets, through the real ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator
from channels.db import database_sync_to_async
from django.db import transaction
from django.test import Client

from apps.accounts.models import User
from apps.notifications import consumers as browser_side
from apps.notifications.services import group_name, notify, publish, run_topic
from apps.runs.models import Run
from apps.runs.services import issue_command
from apps.trainers import consumers as trainer_side
from esper.contracts import Command, CommandKind, Role, TokenScope, codec, signing
from tests.apps.api.cast import Trainer, metrics, register, token_of

pytestmark = pytest.mark.django_db(transaction=True)

HOST = (b"host", b"testserver")
ORIGIN = (b"origin", b"http://testserver")


def in_database(work: Callable[..., Any]) -> Callable[..., Any]:
    return database_sync_to_async(work)


_communicator: Any = ApplicationCommunicator  # asgiref's is not typed


class Socket:
    """One connection to the ASGI application. (channels.testing would need daphne.)"""

    def __init__(self, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        from esper_web.asgi import application

        address, _, query = path.partition("?")
        self.wire: Any = _communicator(
            application,
            {
                "type": "websocket",
                "path": address,
                "query_string": query.encode(),
                "headers": [HOST, *headers],
                "subprotocols": [],
            },
        )

    async def open(self) -> None:
        answer = await self._knock()
        assert answer["type"] == "websocket.accept", answer

    async def refused(self) -> int:
        """The close code of a handshake that was refused before it was accepted."""
        answer = await self._knock()
        assert answer["type"] == "websocket.close", answer
        return int(answer.get("code", 1000))

    async def say(self, message: Any) -> None:
        text = message if isinstance(message, str) else codec.encode(message).decode()
        await self.wire.send_input({"type": "websocket.receive", "text": text})

    async def next(self) -> Any:
        """The next message, which has to be strict JSON."""
        event = await self.wire.receive_output(timeout=5)
        assert event["type"] == "websocket.send", event
        return codec.decode(event["text"])

    async def silent(self) -> bool:
        return bool(await self.wire.receive_nothing(timeout=0.2))

    async def closed(self) -> int:
        """The close code, after whatever is said before."""
        while (event := await self.wire.receive_output(timeout=5))["type"] != "websocket.close":
            pass
        return int(event["code"])

    async def close(self) -> None:
        await self.wire.send_input({"type": "websocket.disconnect", "code": 1000})
        await self.wire.wait(timeout=5)

    async def _knock(self) -> Any:
        await self.wire.send_input({"type": "websocket.connect"})
        return await self.wire.receive_output(timeout=5)


def browser(user: User, origin: bytes | None = ORIGIN[1]) -> Socket:
    client = Client()
    client.force_login(user)
    cookie = f"sessionid={client.cookies['sessionid'].value}".encode()
    origins = [(b"origin", origin)] if origin is not None else []
    return Socket("/ws/v1/stream", [(b"cookie", cookie), *origins])


def trainer_socket(secret: str, run: str, after: int = 0) -> Socket:
    header = (b"authorization", f"Bearer {secret}".encode())
    return Socket(f"/ws/v1/trainer/{run}?after={after}", [header] if secret else [])


@transaction.atomic
def tell(topic: str, **data: Any) -> None:
    publish(topic=topic, type="test.happened", data=data)


# --- browsers -------------------------------------------------------------------------------------


async def test_a_browser_hears_what_it_subscribed_to_and_nothing_else(
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


async def test_a_lost_notification_is_made_good_by_the_next_one(
    people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = await in_database(browser)(people[Role.OPERATOR])
    await socket.open()
    await socket.say({"op": "subscribe", "topic": "inbox"})
    await socket.next()
    with monkeypatch.context() as deaf:
        deaf.setattr("apps.notifications.services.notify", lambda *_: None)
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


async def test_malformed_frames_are_answered_and_the_socket_lives_on(
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


async def test_telemetry_rings_the_browsers(people: dict[Role, User], trainer: Trainer) -> None:
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
    "origin", [b"http://evil.example", b"https://testserver.evil.example", b"null", None]
)
async def test_a_foreign_page_cannot_ride_on_the_cookie(
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


@pytest.mark.parametrize("how", ["signs out", "is dismissed"])
async def test_a_stream_ends_with_the_session(
    how: str, people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    from django.contrib.sessions.models import Session

    monkeypatch.setattr(browser_side, "PING_SECONDS", 0.1)
    socket = await in_database(browser)(people[Role.OPERATOR])
    await socket.open()
    assert (await socket.next())["op"] == "ping"
    if how == "signs out":
        await in_database(Session.objects.all().delete)()
    else:
        await in_database(User.objects.update)(is_active=False)
    assert await socket.closed() == 4401


# --- trainers -------------------------------------------------------------------------------------


def _issue(run: str, kind: CommandKind = CommandKind.PAUSE_ADAPTATION) -> None:
    issue_command(run=Run.objects.get(uid=run), kind=kind, payload={"reason": "x"})


async def test_a_trainer_gets_what_it_missed_and_then_what_is_new(trainer: Trainer) -> None:
    for _ in range(3):
        await in_database(_issue)(trainer.run)
    socket = trainer_socket(trainer.token, trainer.run, after=1)
    await socket.open()
    first = await socket.next()
    assert (first["type"], first["command"]["seq"]) == ("command", 2)
    signing.verify(
        Command.from_wire(first["command"]).signing_bytes(),
        first["signature"],
        trainer.answer["command_key"],
    )
    assert (await socket.next())["command"]["seq"] == 3
    await in_database(_issue)(trainer.run, CommandKind.STOP_RUN)
    assert (await socket.next())["command"]["kind"] == "stop_run"
    assert await socket.silent()
    assert (await in_database(trainer.row)()).last_seen_at is not None
    await socket.close()


async def test_a_command_whose_notification_was_lost_arrives_all_the_same(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_side, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(trainer_side, "PING_SECONDS", 0.15)
    socket = trainer_socket(trainer.token, trainer.run)
    await socket.open()
    assert (await socket.next())["type"] == "ping"
    with monkeypatch.context() as deaf:
        deaf.setattr("apps.runs.services.notify", lambda *_: None)
        await in_database(_issue)(trainer.run)
    while (message := await socket.next())["type"] == "ping":
        pass
    assert message["command"]["seq"] == 1
    await socket.close()


async def test_the_trainers_door_opens_for_its_own_token_only(
    people: dict[Role, User], trainer: Trainer
) -> None:
    other = await in_database(register)(people[Role.RESEARCHER], name="another")
    script = await in_database(token_of)(people[Role.ADMIN], TokenScope.ACT, TokenScope.READ)
    assert await trainer_socket("", trainer.run).refused() == 4401
    assert await trainer_socket("esp_wrong", trainer.run).refused() == 4401
    assert await trainer_socket(script, trainer.run).refused() == 4401
    assert await trainer_socket(other.token, trainer.run).refused() == 4404
    assert await trainer_socket(other.token, "run_nothing").refused() == 4404
    in_the_address = Socket(f"/ws/v1/trainer/{trainer.run}?token={trainer.token}", [])
    assert await in_the_address.refused() == 4401


async def test_a_cookie_means_nothing_at_the_trainers_door(
    people: dict[Role, User], trainer: Trainer
) -> None:
    client = Client()
    await in_database(client.force_login)(people[Role.ADMIN])
    cookie = f"sessionid={client.cookies['sessionid'].value}".encode()
    socket = Socket(f"/ws/v1/trainer/{trainer.run}", [(b"cookie", cookie), ORIGIN])
    assert await socket.refused() == 4401


async def test_a_newer_trainer_ends_the_older_ones_socket(
    people: dict[Role, User], trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_side, "CHECK_SECONDS", 0.1)
    socket = trainer_socket(trainer.token, trainer.run)
    await socket.open()
    await in_database(register)(people[Role.RESEARCHER])
    stopped = await socket.next()
    assert stopped["type"] == "stopped"
    assert "newer trainer" in stopped["reason"]
    assert await socket.closed() == 4401


async def test_what_a_trainer_says_on_the_socket_changes_nothing(trainer: Trainer) -> None:
    socket = trainer_socket(trainer.token, trainer.run)
    await socket.open()
    for frame in ("{", '{"type": "ack", "seq": 1}', "x" * 10_000):
        await socket.say(frame)
    assert await socket.silent()
    await in_database(_issue)(trainer.run)
    assert (await socket.next())["command"]["seq"] == 1
    await socket.close()


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


class Vanishing:
    """A client that leaves without a word: whatever is sent to it after ``most`` messages fails."""

    def __init__(self, scope: dict[str, Any], incoming: list[dict[str, Any]], most: int) -> None:
        self.scope = scope
        self.incoming = incoming
        self.most = most

    async def receive(self) -> dict[str, Any]:
        if self.incoming:
            return self.incoming.pop(0)
        await asyncio.sleep(5)
        raise TimeoutError("the application waits for more than the failed send")

    async def send(self, message: dict[str, Any]) -> None:
        self.most -= 1
        if self.most < 0:
            raise OSError("gone")

    async def run(self) -> None:
        from esper_web.asgi import application

        untyped: Any = application  # its types know no messages that are built as they are here
        with pytest.raises(OSError, match="gone"):
            await untyped(self.scope, self.receive, self.send)


def beats() -> list[str]:
    return [name for task in asyncio.all_tasks() if "_beat" in (name := repr(task.get_coro()))]


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


async def test_a_trainer_that_vanished_is_not_kept_alive_by_its_socket(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = trainer_socket(trainer.token, trainer.run)
    send = Vanishing(socket.wire.scope, [{"type": "websocket.connect"}], most=1)

    async def receive() -> dict[str, Any]:
        if send.incoming:
            return send.incoming.pop(0)
        await in_database(_issue)(trainer.run)
        await asyncio.sleep(5)
        raise TimeoutError("the application waits for more than the failed send")

    monkeypatch.setattr(send, "receive", receive)
    await send.run()
    assert beats() == []
