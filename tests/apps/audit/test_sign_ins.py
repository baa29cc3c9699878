"""Guessing passwords is slowed down, locks nobody else out, and is in the audit log."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.hashers import make_password
from django.http import HttpResponse
from django.test import Client
from django.utils import timezone

from apps.accounts import hashing
from apps.audit import sign_ins
from apps.audit.models import AuditEvent
from tests.apps.cast import PASSWORD, make_person

pytestmark = pytest.mark.django_db

WRONG = "wrong"
HERE, THERE = "203.0.113.7", "198.51.100.9"


def sign_in(name: str = "olga", password: str = WRONG, address: str = HERE) -> HttpResponse:
    form = {"username": name, "password": password}
    return Client(REMOTE_ADDR=address).post("/login", form)


def signed_in(answer: HttpResponse) -> bool:
    return answer.status_code == 302


def acts() -> list[str]:
    events = AuditEvent.objects.filter(act__startswith="session.").order_by("id")
    return [f"{event.act} {event.object_uid}" for event in events]


@pytest.fixture(autouse=True)
def olga(db: None) -> Any:
    return make_person("olga")


def test_after_five_wrong_passwords_even_the_right_one_has_to_wait() -> None:
    assert [sign_in().status_code for _ in range(5)] == [200] * 5
    refused = sign_in(password=PASSWORD)
    assert refused.status_code == 429
    assert 1 <= int(refused["Retry-After"]) <= 601
    assert "too many wrong passwords" in refused.content.decode()
    AuditEvent.objects.filter(act=sign_ins.REFUSED).update(at=timezone.now() - sign_ins.WINDOW)
    assert signed_in(sign_in(password=PASSWORD))


def test_whoever_guesses_does_not_lock_the_person_out() -> None:
    for _ in range(8):
        sign_in(address=HERE)
    assert sign_in(password=PASSWORD, address=HERE).status_code == 429
    assert signed_in(sign_in(password=PASSWORD, address=THERE))


def test_guessing_from_many_addresses_stops_at_new_ones_only() -> None:
    assert signed_in(sign_in(password=PASSWORD, address=THERE))
    for number in range(sign_ins.PER_ACCOUNT):
        sign_in(address=f"192.0.2.{number}")
    assert sign_in(password=PASSWORD, address="192.0.2.200").status_code == 429
    assert signed_in(sign_in(password=PASSWORD, address=THERE))


def test_one_address_cannot_try_many_accounts() -> None:
    make_person("vera")
    for number in range(sign_ins.PER_ADDRESS):
        sign_in(f"person{number}")
    assert sign_in("vera", PASSWORD).status_code == 429
    assert signed_in(sign_in("vera", PASSWORD, THERE))


def test_a_customer_with_a_whole_network_is_one_address() -> None:
    for number in range(5):
        sign_in(address=f"2001:db8::{number:x}")
    assert sign_in(password=PASSWORD, address="2001:db8::99").status_code == 429
    assert signed_in(sign_in(password=PASSWORD, address="2001:db8:1::1"))


def test_a_success_forgives_what_was_mistyped_before() -> None:
    for _ in range(3):
        for _ in range(4):
            sign_in()
        assert signed_in(sign_in(password=PASSWORD))


def test_unknown_accounts_are_treated_as_known_ones() -> None:
    answers = [[sign_in(name).status_code for _ in range(7)] for name in ("olga", "nobody")]
    assert answers[0] == answers[1]


def test_sign_ins_failures_and_sign_outs_are_audited() -> None:
    sign_in()
    sign_in("a-password-in-the-wrong-field")
    client = Client(REMOTE_ADDR=HERE)
    client.post("/login", {"username": "olga", "password": PASSWORD})
    client.post("/logout")
    assert acts() == [
        "session.refused olga",
        "session.refused unknown",
        "session.started olga",
        "session.ended olga",
    ]
    started = AuditEvent.objects.get(act="session.started")
    assert (started.actor, started.data["address"]) == ("olga", HERE)
    assert "wrong-field" not in str(list(AuditEvent.objects.values()))


def test_guessing_does_not_fill_the_log() -> None:
    for _ in range(25):
        sign_in()
    assert acts() == ["session.refused olga"] * 5 + ["session.braked olga"]


def test_the_admin_has_no_sign_in_of_its_own() -> None:
    make_person("ada")
    asked = Client().get("/admin/login/?next=/admin/accounts/user/")
    assert (asked.status_code, asked["Location"]) == (302, "/login?next=/admin/accounts/user/")
    posted = Client().post("/admin/login/", {"username": "ada", "password": PASSWORD})
    assert posted.status_code == 302
    assert "sessionid" not in posted.cookies
    client = Client()
    client.post("/login", {"username": "olga", "password": PASSWORD})
    assert client.get("/admin/", follow=True).status_code == 403


def test_a_password_costs_one_thread_and_little_memory(settings: Any) -> None:
    settings.PASSWORD_HASHERS = ["apps.accounts.hashing.OneThreadArgon2PasswordHasher"]
    assert "$m=19456,t=2,p=1$" in make_password("x")


def test_few_passwords_are_hashed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def check() -> None:
        nonlocal running, most
        with hashing.hashing_turn():
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.01)
            with lock:
                running -= 1

    threads = [threading.Thread(target=check) for _ in range(15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == hashing.AT_ONCE
    assert max(1, (hashing.os.cpu_count() or 1) // 2) >= hashing.AT_ONCE


def test_a_queue_that_is_full_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    full = threading.BoundedSemaphore(1)
    full.acquire()
    monkeypatch.setattr(hashing, "_places", full)
    answer = sign_in(password=PASSWORD)
    assert (answer.status_code, answer["Retry-After"]) == (429, "5")
    assert acts() == []


def test_old_failures_count_no_more() -> None:
    for _ in range(5):
        sign_in()
    attempt = sign_ins.Attempt.of("olga", HERE)
    assert sign_ins.seconds_to_wait(attempt) > 0
    AuditEvent.objects.update(at=timezone.now() - sign_ins.WINDOW - timedelta(seconds=1))
    assert sign_ins.seconds_to_wait(attempt) == 0
