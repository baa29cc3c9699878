"""Pushes to a browser: encrypted for it alone, signed, removed when it has left, never to inside.

The push service is a real HTTPS server on loopback; the browser's half is written here anew.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from apps.accounts.models import Membership, Project, User
from apps.audit.models import AuditEvent
from apps.notifications import public_hosts
from apps.notifications.channels import push_public_key
from apps.notifications.delivering import PUSH_TRIES, deliver_due
from apps.notifications.models import Channel, Delivery
from apps.notifications.web_push import CURVE, Subscription, encrypt, from_text, to_text
from esper.contracts import Role
from tests.apps.callers import Caller, Inbox
from tests.apps.notifications.test_channels import later
from tests.tls import TlsServer, serving

pytestmark = pytest.mark.django_db
EVENTS = ["adaptation.awaiting_approval", "switch.killed", "run.finished"]


class PushService(TlsServer):
    """Stands in for the service of a browser's maker."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, _Handler)
        self.status = 201
        self.got: list[tuple[str, dict[str, str], bytes]] = []


class _Handler(BaseHTTPRequestHandler):
    server: PushService

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, dict(self.headers.items()), body))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silent."""


class OneBrowser:
    """Keys of a browser, and how it reads a message (RFC 8291)."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(CURVE)
        self.auth = bytes(range(16))
        self.point = self.key.public_key().public_bytes(
            Encoding.X962, PublicFormat.UncompressedPoint
        )

    @property
    def keys(self) -> dict[str, str]:
        return {"p256dh": to_text(self.point), "auth": to_text(self.auth)}

    def read(self, body: bytes) -> Any:
        salt, size, sender, sealed = body[:16], body[16:20], body[21:86], body[86:]
        assert (int.from_bytes(size), body[20]) == (4096, 65)
        shared = self.key.exchange(
            ec.ECDH(), ec.EllipticCurvePublicKey.from_encoded_point(CURVE, sender)
        )
        secret = _hkdf(32, self.auth, b"WebPush: info\x00" + self.point + sender, shared)
        key = _hkdf(16, salt, b"Content-Encoding: aes128gcm\x00", secret)
        nonce = _hkdf(12, salt, b"Content-Encoding: nonce\x00", secret)
        plain = AESGCM(key).decrypt(nonce, sealed, None)
        return json.loads(plain.rstrip(b"\x00").removesuffix(b"\x02"))


def _hkdf(length: int, salt: bytes, info: bytes, secret: bytes) -> bytes:
    return HKDF(hashes.SHA256(), length, salt, info).derive(secret)


@pytest.fixture
def push_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PushService]:
    """Only here an address of loopback counts as public."""
    monkeypatch.setattr(public_hosts, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    with serving(PushService(tmp_path)) as service:
        yield service


def add(caller: Caller, service: PushService, browser: OneBrowser, **changes: Any) -> Any:
    body = {
        "kind": "push",
        "target": f"https://127.0.0.1:{service.server_port}/push/one",
        "keys": browser.keys,
        "events": EVENTS,
        **changes,
    }
    return caller.post("channels", body)


def test_the_example_of_the_standard_is_encrypted_as_it_says() -> None:
    """RFC 8291, appendix A."""
    to = Subscription(
        "https://push.example.net/push/JzLQ3raZJfFBR0aqvOMsLrt54w4rJUsV",
        from_text(
            "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"
        ),
        from_text("BTBZMqHH6r4Tts7J_aSIgg"),
    )
    sender = from_text("yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw")
    body = encrypt(
        b"When I grow up, I want to be a watermelon",
        to,
        sender=ec.derive_private_key(int.from_bytes(sender), CURVE),
        salt=from_text("DGv6ra1nlYgDCS1FRnbzlw"),
    )
    assert to_text(body) == (
        "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIg"
        "Dll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_yl95bQpu6cVPTpK4Mqgkf1CXztLVB"
        "St2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN"
    )


def test_a_browser_is_told_of_the_decision_and_nobody_between_can_read_it(
    operator: Caller, inbox: Inbox, push_service: PushService
) -> None:
    browser = OneBrowser()
    made = add(operator, push_service, browser)
    assert (made.status, made.data["secret"]) == (201, "")
    waiting = inbox.waiting()
    assert deliver_due() == 1
    ((path, headers, body),) = push_service.got
    assert path == "/push/one"
    assert browser.read(body) == {
        "title": "An adaptation waits for a decision",
        "body": f"A-{waiting.pk}",
        "address": f"/adaptations/{waiting.uid}",
        "tag": waiting.uid,
    }
    assert waiting.uid.encode() not in body
    assert (headers["Content-Encoding"], headers["Urgency"]) == ("aes128gcm", "high")
    scheme, token, key = headers["Authorization"].replace(",", "").split()
    assert (scheme, key) == ("vapid", f"k={push_public_key()}")
    point = ec.EllipticCurvePublicKey.from_encoded_point(CURVE, from_text(push_public_key()))
    audience = f"https://127.0.0.1:{push_service.server_port}"
    claims = jwt.decode(token.removeprefix("t="), point, algorithms=["ES256"], audience=audience)
    assert claims["sub"].startswith("mailto:")
    (logged,) = operator.get(f"channels/{made.data['uid']}/deliveries").data["results"]
    assert (logged["status"], logged["due_at"]) == (201, None)


@pytest.mark.parametrize("status", [404, 410])
def test_a_browser_that_has_left_is_removed(
    status: int, operator: Caller, inbox: Inbox, push_service: PushService
) -> None:
    add(operator, push_service, OneBrowser())
    push_service.status = status
    inbox.waiting()
    assert deliver_due() == 0
    assert not Channel.objects.exists()
    assert AuditEvent.objects.filter(act="channel.removed").exists()


def test_a_push_service_that_fails_is_tried_again_and_its_browsers_stay(
    operator: Caller, inbox: Inbox, push_service: PushService
) -> None:
    add(operator, push_service, OneBrowser())
    push_service.status = 503
    inbox.waiting()
    for _ in range(PUSH_TRIES + 3):
        deliver_due()
        later(100_000)
    assert len(push_service.got) == PUSH_TRIES + 1
    assert Channel.objects.get().disabled_at is None
    assert Delivery.objects.get().due_at is None  # nobody needs the message any more


def test_pushes_go_to_public_hosts_only(operator: Caller, inbox: Inbox) -> None:
    browser = OneBrowser()
    body = {"kind": "push", "keys": browser.keys, "events": EVENTS}
    plain = operator.post("channels", body | {"target": "http://push.example.org/one"})
    assert (plain.status, plain.code) == (422, "invalid")
    assert operator.post("channels", body | {"target": "https://127.0.0.1:1/"}).status == 201
    inbox.waiting()
    assert deliver_due() == 0
    assert "private network" in Delivery.objects.get().error


@pytest.mark.parametrize(
    "keys",
    [
        None,
        {"p256dh": "AAAA", "auth": to_text(bytes(16))},
        {"p256dh": to_text(b"\x04" + bytes(64)), "auth": to_text(bytes(16))},  # not on the curve
        {"p256dh": OneBrowser().keys["p256dh"], "auth": "AAAA"},
        {"p256dh": "no base64!", "auth": "no base64!"},
    ],
)
def test_a_subscription_needs_right_keys(keys: Any, operator: Caller) -> None:
    target = "https://push.example.org/one"
    body = {"kind": "push", "target": target, "keys": keys, "events": EVENTS}
    answer = operator.post("channels", body)
    assert (answer.status, answer.code) == (422, "invalid")
    assert not Channel.objects.exists()


def test_a_browser_that_is_added_again_is_told_once(
    operator: Caller, inbox: Inbox, push_service: PushService
) -> None:
    browser = OneBrowser()
    add(operator, push_service, browser)
    add(operator, push_service, browser, events=["switch.killed"])
    inbox.waiting()
    assert deliver_due() == 0
    operator.post("adaptation-switch", {"on": False})
    assert deliver_due() == 1


def test_with_a_new_key_of_the_server_a_browser_must_be_added_again(
    operator: Caller, inbox: Inbox, push_service: PushService, settings: Any
) -> None:
    add(operator, push_service, OneBrowser())
    before = push_public_key()
    settings.SECRET_KEY = "another-" + "0123456789abcdef" * 4
    assert push_public_key() != before
    inbox.waiting()
    assert deliver_due() == 0
    assert push_service.got == []
    assert "add this browser again" in Channel.objects.get().disabled_reason


def test_who_has_lost_the_right_to_see_a_run_is_not_told(
    operator: Caller, people: dict[Role, User], inbox: Inbox, push_service: PushService
) -> None:
    add(operator, push_service, OneBrowser())
    waiting = inbox.waiting()
    other = Project.objects.create(name="other")
    Membership.objects.filter(user=people[Role.OPERATOR], project=other).delete()
    type(waiting.run).objects.filter(pk=waiting.run.pk).update(project=other)
    assert deliver_due() == 0
    assert push_service.got == []
