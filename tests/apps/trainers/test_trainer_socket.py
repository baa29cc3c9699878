"""The trainer's socket, through the real ASGI application."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from django.test import Client
from django.utils import timezone

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.blueprints.models import Blueprint
from apps.policies.services import current_policy
from apps.runs.models import Run
from apps.runs.services import issue_command
from apps.trainers import consumers as trainer_side
from esper.contracts import AdaptationState, Command, CommandKind, Role, TokenScope, signing
from tests.apps.callers import Trainer, register
from tests.apps.cast import make_blueprint, token_of
from tests.apps.sockets import ORIGIN, Socket, Vanishing, beats, in_database, trainer_socket

pytestmark = pytest.mark.django_db(transaction=True)


def _issue(run: str, kind: CommandKind = CommandKind.PAUSE_ADAPTATION) -> None:
    issue_command(run=Run.objects.get(uid=run), kind=kind, payload={"reason": "x"})


async def test_a_trainer_gets_missed_commands_first_and_then_new_ones(trainer: Trainer) -> None:
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
    with monkeypatch.context() as broken:
        broken.setattr("apps.runs.services.notify", lambda *_: None)
        await in_database(_issue)(trainer.run)
    while (message := await socket.next())["type"] == "ping":
        pass
    assert message["command"]["seq"] == 1
    await socket.close()


async def test_a_trainer_socket_accepts_only_the_token_of_its_run(
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


async def test_a_trainer_socket_ignores_cookies(people: dict[Role, User], trainer: Trainer) -> None:
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


async def test_messages_from_a_trainer_on_the_socket_change_nothing(trainer: Trainer) -> None:
    socket = trainer_socket(trainer.token, trainer.run)
    await socket.open()
    for frame in ("{", '{"type": "ack", "seq": 1}', "x" * 10_000):
        await socket.say(frame)
    assert await socket.silent()
    await in_database(_issue)(trainer.run)
    assert (await socket.next())["command"]["seq"] == 1
    await socket.close()


async def test_only_what_a_trainer_sends_is_a_report(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_side, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(trainer_side, "PING_SECONDS", 0.05)
    socket = trainer_socket(trainer.token, trainer.run)
    await socket.open()
    long_ago = timezone.now() - timedelta(seconds=61)
    await in_database(Run.objects.filter(uid=trainer.run).update)(last_seen_at=long_ago)
    for _ in range(3):  # the server's own timer runs, and the frozen trainer reads nothing
        assert (await socket.next())["type"] == "ping"
    assert (await in_database(trainer.row)()).last_seen_at == long_ago
    await socket.say('{"type":"pong"}')
    while (await in_database(trainer.row)()).last_seen_at == long_ago:
        await socket.next()
    await socket.close()


async def test_a_vanished_trainer_is_not_recorded_as_reporting(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket = trainer_socket(trainer.token, trainer.run)
    send = Vanishing(socket.wire.scope, [{"type": "websocket.connect"}], most=1)

    async def receive() -> dict[str, Any]:
        if send.incoming:
            return send.incoming.pop(0)
        await in_database(_issue)(trainer.run)
        await asyncio.sleep(300)
        raise TimeoutError("the application waits for more than the failed send")

    monkeypatch.setattr(send, "receive", receive)
    await send.run()
    assert beats() == []


def _ask_a_person(uid: str, layer: str, **changes: Any) -> str:
    run = Run.objects.get(uid=uid)
    adaptation = Adaptation.objects.create(
        run=run,
        run_epoch=run.epoch,
        idempotency_key=layer,
        layer=layer,
        adaptation_type="add_efficiency",
        blueprint=Blueprint.objects.filter(slug="proj_lora_64").first() or make_blueprint(),
        risk="low",
        forecast_parameters=1,
        policy="heuristic-1",
        safety_policy=current_policy(),
        proposed_step=1,
        state=AdaptationState.AWAITING_APPROVAL,
        **changes,
    )
    return adaptation.uid


async def test_a_trainer_is_told_once_what_waits_for_a_person(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_side, "CHECK_SECONDS", 0.05)
    past, future = timezone.now() - timedelta(hours=1), timezone.now() + timedelta(hours=1)
    await in_database(_ask_a_person)(trainer.run, "expired", deadline_at=past)
    first = await in_database(_ask_a_person)(trainer.run, "fc", deadline_at=future)
    socket = trainer_socket(trainer.token, trainer.run)
    await socket.open()
    message = await socket.next()
    assert message == {
        "type": "waiting",
        "adaptation": first,
        "layer": "fc",
        "blueprint": "proj_lora_64",
    }
    second = await in_database(_ask_a_person)(trainer.run, "head")
    message = await socket.next()
    assert (message["type"], message["adaptation"]) == ("waiting", second)
    assert await socket.silent()
    await socket.close()
