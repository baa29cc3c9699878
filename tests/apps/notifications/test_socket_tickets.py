"""Tickets: one socket for a client that has a token and no cookie."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from apps.accounts.models import ApiToken, User
from apps.notifications import fan_out
from apps.notifications.models import SocketTicket
from apps.notifications.services import run_topic
from apps.notifications.tickets import issue_ticket
from esper.contracts import Role, TokenScope
from tests.apps.callers import Caller, Trainer
from tests.apps.cast import token_of
from tests.apps.sockets import Socket, browser, in_database, tell

pytestmark = pytest.mark.django_db(transaction=True)


def ticket_of(user: User, *scopes: TokenScope) -> str:
    caller = Caller(token_of(user, *(scopes or (TokenScope.READ,))))
    answer = caller.post("ws-tickets")
    assert answer.status == 201, answer.data
    assert answer.data["url"] == f"ws://testserver/ws/v1/stream?ticket={answer.data['ticket']}"
    return str(answer.data["ticket"])


def socket_with(ticket: str, *headers: tuple[bytes, bytes]) -> Socket:
    return Socket(f"/ws/v1/stream?ticket={ticket}", list(headers))


async def test_a_ticket_opens_one_socket_without_cookie_and_origin(
    people: dict[Role, User], trainer: Trainer
) -> None:
    topic = run_topic(trainer.run)
    ticket = await in_database(ticket_of)(people[Role.VIEWER])
    socket = socket_with(ticket)
    await socket.open()
    await socket.say({"op": "subscribe", "topic": topic})
    assert (await socket.next())["op"] == "subscribed"
    await in_database(tell)(topic, n=1)
    assert (await socket.next())["data"] == {"n": 1}
    assert await socket_with(ticket).refused() == 4401  # it is used up
    await socket.close()
    assert not await in_database(SocketTicket.objects.exists)()


async def test_a_ticket_that_does_not_hold_opens_nothing(people: dict[Role, User]) -> None:
    late = await in_database(ticket_of)(people[Role.VIEWER])
    past = timezone.now() - timedelta(seconds=1)
    await in_database(SocketTicket.objects.update)(expires_at=past)
    assert await socket_with(late).refused() == 4401
    for odd in ("", "tkt_unknown", "x" * 500):
        assert await socket_with(odd).refused() == 4401
    # A page of another server cannot use the cookie of whoever is signed in by naming a ticket.
    evil = await in_database(browser)(people[Role.VIEWER], origin=b"http://evil.example")
    cookie = next(pair for pair in evil.wire.scope["headers"] if pair[0] == b"cookie")
    assert await socket_with("tkt_unknown", cookie).refused() == 4401


async def test_the_socket_ends_with_its_token(
    people: dict[Role, User], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fan_out, "PING_SECONDS", 0.05)
    ticket = await in_database(ticket_of)(people[Role.OPERATOR])
    socket = socket_with(ticket)
    await socket.open()
    assert (await socket.next())["op"] == "ping"
    await in_database(ApiToken.objects.update)(revoked_at=timezone.now())
    assert await socket.closed() == 4401


async def test_only_who_may_read_gets_a_ticket(people: dict[Role, User]) -> None:
    def ask() -> int:
        return (
            Caller(token_of(people[Role.RESEARCHER], TokenScope.RUNS_CREATE))
            .post("ws-tickets")
            .status
        )

    assert await in_database(ask)() == 403
    secret, _ = await in_database(issue_ticket)(people[Role.VIEWER], None)
    row = await in_database(SocketTicket.objects.get)()
    assert secret not in row.digest
