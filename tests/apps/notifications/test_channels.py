"""People are told: signed webhooks, chat and mail, with retries, a log, quiet hours and a guard."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import socket
from datetime import timedelta
from typing import Any

import httpcore
import pytest
from django.core import mail
from django.utils import timezone

from apps.accounts.models import User
from apps.audit.models import AuditEvent
from apps.notifications import delivering, public_hosts
from apps.notifications.channels import due_at
from apps.notifications.delivering import PAUSES, deliver_due
from apps.notifications.models import Channel, Delivery
from esper.contracts import Role
from tests.apps.callers import Caller, Inbox

pytestmark = pytest.mark.django_db
HOOK = "https://hooks.example.org/esper"


class Receiver:
    """Answers with the statuses in turn, the last one for ever; keeps what it was sent."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)
        self.sent: list[tuple[bytes, dict[str, str]]] = []

    def __call__(self, url: str, body: bytes, headers: dict[str, str]) -> int:
        self.sent.append((body, headers))
        return self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Receiver:
    made = Receiver(200)
    monkeypatch.setattr(public_hosts, "post", made)
    return made


def add(caller: Caller, **changes: Any) -> dict[str, Any]:
    body = {
        "kind": "webhook",
        "target": HOOK,
        "events": ["adaptation.awaiting_approval", "switch.killed"],
        **changes,
    }
    answer = caller.post("channels", body)
    assert answer.status == 201, answer.data
    made: dict[str, Any] = answer.data
    return made


def later(seconds: float) -> None:
    """Time passes for everything that waits."""
    for delivery in Delivery.objects.exclude(due_at=None):
        assert delivery.due_at is not None
        delivery.due_at -= timedelta(seconds=seconds)
        delivery.save()


def test_a_webhook_is_signed_and_links_to_the_decision(
    operator: Caller, inbox: Inbox, receiver: Receiver
) -> None:
    channel = add(operator)
    waiting = inbox.waiting()
    assert deliver_due() == 1
    ((body, headers),) = receiver.sent
    event = json.loads(body)
    assert event["type"] == "adaptation.awaiting_approval"
    assert event["data"]["url"] == f"http://testserver/adaptations/{waiting.uid}"
    assert waiting.title in event["data"]["summary"]
    key = base64.b64decode(channel["secret"].removeprefix("whsec_"))
    assert len(key) >= 24
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{wanted}"
    assert deliver_due() == 0
    (logged,) = operator.get(f"channels/{channel['uid']}/deliveries").data["results"]
    assert (logged["status"], logged["attempts"], logged["due_at"]) == (200, 1, None)


def test_a_receiver_that_fails_is_tried_again_with_the_same_id_and_can_be_replayed(
    operator: Caller, inbox: Inbox, receiver: Receiver
) -> None:
    add(operator)
    inbox.waiting()
    receiver.statuses = [500, 302, 200]
    assert [deliver_due(), deliver_due()] == [0, 0]  # the second one is not due yet
    assert len(receiver.sent) == 1
    later(PAUSES[0].total_seconds() * 1.2)
    assert deliver_due() == 0  # a redirect is no success, and is not followed
    later(PAUSES[1].total_seconds() * 1.2)
    assert deliver_due() == 1
    assert len({headers["webhook-id"] for _, headers in receiver.sent}) == 1
    delivery = Delivery.objects.get()
    assert operator.post(f"deliveries/{delivery.uid}/replay").status == 200
    assert deliver_due() == 1
    assert AuditEvent.objects.filter(act="delivery.replayed").exists()


def test_one_that_is_gone_or_never_answers_is_disabled(
    operator: Caller, inbox: Inbox, receiver: Receiver
) -> None:
    gone = add(operator)
    inbox.waiting()
    receiver.statuses = [410]
    deliver_due()
    assert "410" in operator.get(f"channels/{gone['uid']}").data["disabled_reason"]
    add(operator)
    receiver.statuses = [500]
    operator.post("adaptation-switch", {"on": False})
    for _ in range(len(PAUSES) + 1):
        later(200_000)
        deliver_due()
    assert Channel.objects.exclude(disabled_at=None).count() == 2
    assert Delivery.objects.exclude(due_at=None).count() == 0


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "0.0.0.1", "::1", "fd00::1", "fe80::1%eth0",
     "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "224.0.0.1", "100.64.0.1",
     "::127.0.0.1", "::ffff:0:7f00:1", "64:ff9b:1::7f00:1", "fec0::1", "192.0.0.8", "3fff::1"],
)  # fmt: skip
def test_no_address_of_a_private_network_is_reached(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        """The first address is public: each of them counts."""
        return [(0, 0, 0, "", ("93.184.216.34", 443)), (0, 0, 0, "", (address, 443))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(public_hosts.ForbiddenHostError, match="private network"):
        public_hosts.resolve_public("hooks.example.org", 443)


def test_numbers_that_mean_this_host_are_refused_and_the_checked_address_is_connected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for host in ("2130706433", "0x7f000001", "127.1", "localhost"):
        with pytest.raises(public_hosts.ForbiddenHostError):
            public_hosts.post(f"https://{host}/", b"{}", {})
    asked: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        """Public at first, this host from then on."""
        asked.append(host)
        address = "93.184.216.34" if len(asked) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))]

    connected: list[str] = []

    def connect(_: Any, host: str, *args: Any) -> Any:
        connected.append(host)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr("httpcore.SyncBackend.connect_tcp", connect)
    with pytest.raises(OSError, match="no network"):
        public_hosts.post("https://rebinding.example.org/", b"{}", {})
    assert connected == ["93.184.216.34"]


@pytest.mark.parametrize(
    ("status", "location"),
    [
        (301, "https://10.0.0.1/"),
        (302, "https://169.254.169.254/latest/meta-data/"),
        (303, "//localhost/"),
        (307, "http://127.0.0.1:8080/"),
        (308, "https://hooks.example.org/again"),
    ],
)
def test_a_redirect_is_not_followed_wherever_it_leads(
    status: int, location: str, operator: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[str] = []

    def connect(_: Any, host: str, *args: Any) -> httpcore.NetworkStream:
        connected.append(host)
        head = f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n"
        return httpcore.MockStream([head.encode()])

    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 443))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [public])
    monkeypatch.setattr("httpcore.SyncBackend.connect_tcp", connect)
    add(operator)
    operator.post("adaptation-switch", {"on": False})
    assert deliver_due() == 0
    assert connected == ["93.184.216.34"]  # once: not where it leads
    delivery = Delivery.objects.get()
    assert (delivery.status, delivery.error) == (status, f"it answered {status}")


def test_one_delivery_that_cannot_be_sent_delays_no_other(
    operator: Caller, viewer: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add(operator)
    add(viewer)
    good: list[str] = []

    def post(url: str, body: bytes, headers: dict[str, str]) -> int:
        if url != HOOK:
            raise TypeError("url strings may not include unicode characters.")
        good.append(url)
        return 200

    monkeypatch.setattr(public_hosts, "post", post)
    Channel.objects.filter(uid=first["uid"]).update(target="https://\u00e9.example/")
    operator.post("adaptation-switch", {"on": False, "reason": "!"})
    assert deliver_due() == len(good) == 1
    (failed,) = Delivery.objects.filter(delivered_at=None)
    assert (failed.attempts, failed.error) == (1, "it cannot be sent: TypeError")
    monkeypatch.undo()
    with pytest.raises(public_hosts.ForbiddenHostError, match="cannot be resolved"):
        public_hosts.post("https://a..b/", b"{}", {})


def test_only_https_addresses_without_credentials_are_taken(operator: Caller) -> None:
    for target in (
        *("http://example.org", "https://u:p@example.org", "ftp://example.org", "x", ""),
        *("https://[::1/", "https://a..b/", "https://example.org:99999/", "https://e.org:0/"),
        *("https://\u00e9.org/", "https://e.org/\u00fc", "https://e.org/a b", "https:///path"),
        f"https://{'a' * 64}.org/",
    ):
        answer = operator.post("channels", {"kind": "slack", "target": target,
                                            "events": ["switch.on"]})  # fmt: skip
        assert (answer.status, answer.code) == (422, "invalid"), target
    wrong = {"kind": "slack", "target": HOOK, "events": ["everything"]}
    assert operator.post("channels", wrong).status == 400


def test_a_chat_gets_text_without_mentions_and_a_mail_the_link(
    operator: Caller, people: dict[Role, User], inbox: Inbox, receiver: Receiver, settings: Any
) -> None:
    settings.EMAIL_HOST = ""
    refused = {"kind": "mail", "events": ["adaptation.awaiting_approval"]}
    assert operator.post("channels", refused).status == 422
    settings.EMAIL_HOST = "mail.example.org"
    User.objects.filter(username="olga").update(email="olga@example.org")
    add(operator, kind="mail", target="", events=["adaptation.awaiting_approval"])
    add(operator, kind="slack", events=["switch.killed"])
    waiting = inbox.waiting()
    operator.post("adaptation-switch", {"on": False, "reason": "<!channel> & more"})
    assert deliver_due() == 2
    (message,) = mail.outbox
    assert (message.to, "[Esper]" in message.subject) == (["olga@example.org"], True)
    assert f"http://testserver/adaptations/{waiting.uid}" in message.body
    text = json.loads(receiver.sent[0][0])["text"]
    assert "<!channel>" not in text
    assert "&lt;!channel&gt; &amp; more" in text


def test_quiet_hours_delay_all_but_the_urgent(operator: Caller) -> None:
    made = add(operator, quiet_from="22:00", quiet_until="06:30")
    channel = Channel.objects.get(uid=made["uid"])
    night = timezone.now().replace(hour=23, minute=0)
    morning = due_at(channel, "adaptation.kept", night)
    assert (morning.hour, morning.minute) == (6, 30)
    assert timedelta(hours=7) < morning - night < timedelta(hours=8)
    assert due_at(channel, "switch.killed", night) == night
    noon = night.replace(hour=12)
    assert due_at(channel, "adaptation.kept", noon) == noon
    half = {"kind": "webhook", "target": HOOK, "events": ["switch.on"], "quiet_from": "22:00"}
    assert operator.post("channels", half).status == 422


def test_channels_are_their_owners(operator: Caller, viewer: Caller, receiver: Receiver) -> None:
    made = add(operator)
    assert viewer.get("channels").data["results"] == []
    assert viewer.get(f"channels/{made['uid']}").code == "not-found"
    assert viewer.delete(f"channels/{made['uid']}").status == 404
    assert "secret" not in operator.get(f"channels/{made['uid']}").data
    assert operator.delete(f"channels/{made['uid']}").status == 204
    operator.post("adaptation-switch", {"on": False})
    assert (deliver_due(), receiver.sent) == (0, [])
    assert timedelta(seconds=public_hosts.TIMEOUT_SECONDS) < delivering.LEASE
