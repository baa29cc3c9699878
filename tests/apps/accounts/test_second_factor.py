"""An authenticator app: set up, asked for, used once, braked, taken away, demanded of roles."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP
from django.contrib.sessions.models import Session
from django.test import Client
from django.utils import timezone

from apps.accounts import second_factor
from apps.accounts.models import ApiToken, RecoveryCode, SecondFactor, User
from apps.accounts.step_up import HOLDS_FOR
from apps.audit.models import AuditEvent
from apps.notifications.rights import rights_of
from apps.notifications.tickets import Holder
from esper.contracts import Role, TokenScope, codec
from tests.apps.callers import Caller
from tests.apps.cast import PASSWORD, make_person, token_of

pytestmark = pytest.mark.django_db

PAGE = "/me/second-factor"
HERE = "203.0.113.7"


class Phone:
    """A person's app: it knows the secret and the time, which the test moves."""

    def __init__(self, clock: Clock, letters: str) -> None:
        self.clock = clock
        self.totp = TOTP(base64.b32decode(letters.replace(" ", "")), 6, SHA1(), 30)  # noqa: S303

    def code(self, steps: int = 0) -> str:
        return self.totp.generate(int(self.clock().timestamp()) + 30 * steps).decode()


class Clock:
    def __init__(self) -> None:
        self.now = timezone.now()

    def __call__(self) -> datetime:
        return self.now

    def next_step(self) -> None:
        self.now += timedelta(seconds=30)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(second_factor, "now", made)
    return made


@pytest.fixture
def olga(db: None) -> User:
    return make_person("olga")


def browser(name: str = "olga", address: str = HERE) -> Client:
    """With the password given."""
    client = Client(REMOTE_ADDR=address)
    client.post("/login", {"username": name, "password": PASSWORD})
    return client


def is_in(client: Client) -> bool:
    return client.get("/me").status_code == 200


def field(text: str, name: str) -> str:
    found = re.search(f'name="{name}" value="([^"]*)"', text)
    assert found, name
    return found[1]


def set_up(client: Client, clock: Clock) -> tuple[Phone, list[str]]:
    """Through the page, as a person does; returns the phone and the recovery codes."""
    text = client.get(PAGE).content.decode()
    letters = re.search(r"<code[^>]*>([A-Z2-7 ]+)</code>", text)
    assert letters
    phone = Phone(clock, letters[1])
    form = {"act": "turn-on", "offer": field(text, "offer"), "code": phone.code()}
    shown = client.post(PAGE, form).content.decode()
    codes = re.findall(r"<li><code>([a-z2-7-]+)</code></li>", shown)
    clock.next_step()
    return phone, codes


def acts(prefix: str = "second_factor.") -> list[str]:
    rows = AuditEvent.objects.filter(act__startswith=prefix).order_by("id")
    return [row.act.removeprefix(prefix) for row in rows]


def test_a_person_sets_an_app_up_and_is_asked_for_its_code(olga: User, clock: Clock) -> None:
    phone, codes = set_up(browser(), clock)
    assert len(set(codes)) == 10
    client = Client(REMOTE_ADDR=HERE)
    form = {"username": "olga", "password": PASSWORD, "next": "/runs"}
    assert client.post("/login", form)["Location"] == "/login/code"
    assert not is_in(client)  # the password alone opens nothing
    assert client.get("/api/v1/me").status_code == 401
    answer = client.post("/login/code", {"code": phone.code()})
    assert (answer.status_code, answer["Location"]) == (302, "/runs")
    assert is_in(client)
    assert acts() == ["turned_on"]


def test_the_admin_asks_for_the_code_too(clock: Clock) -> None:
    make_person("ada")
    phone, _ = set_up(browser("ada"), clock)
    client = browser("ada")
    asked = client.get("/admin/", follow=True)
    assert asked.redirect_chain[-1][0].startswith("/login?next=/admin/")
    client.post("/login", {"username": "ada", "password": PASSWORD, "next": "/admin/"})
    assert client.post("/login/code", {"code": phone.code()})["Location"] == "/admin/"
    assert client.get("/admin/").status_code == 200


def test_secrets_and_codes_are_not_readable_in_the_database(olga: User, clock: Clock) -> None:
    phone, codes = set_up(browser(), clock)
    stored = repr(list(SecondFactor.objects.values())) + repr(list(RecoveryCode.objects.values()))
    stored += repr(list(Session.objects.values())) + repr(list(AuditEvent.objects.values()))
    raw = phone.totp._hotp._key
    for secret in (raw, base64.b32encode(raw)):
        assert repr(bytes(secret))[2:-1] not in stored
    assert not [code for code in codes if code in stored or code.replace("-", "") in stored]


def test_a_code_works_once_and_no_older_one_after_it(olga: User, clock: Clock) -> None:
    phone, _ = set_up(browser(), clock)
    before, code = phone.code(-1), phone.code()
    assert browser().post("/login/code", {"code": code}).status_code == 302
    for used in (code, before):
        assert browser().post("/login/code", {"code": used}).status_code == 403


def test_the_code_that_set_it_up_opens_nothing(olga: User, clock: Clock) -> None:
    phone, _ = set_up(browser(), clock)
    assert browser().post("/login/code", {"code": phone.code(-1)}).status_code == 403


@pytest.mark.parametrize(
    ("steps", "works"), [(-2, False), (-1, True), (0, True), (1, True), (2, False)]
)
def test_a_clock_may_be_wrong_by_one_step(
    olga: User, clock: Clock, steps: int, works: bool
) -> None:
    phone, _ = set_up(browser(), clock)
    clock.next_step()  # the code of one step before was not used
    client = browser()
    assert (client.post("/login/code", {"code": phone.code(steps)}).status_code == 302) == works
    assert is_in(client) == works


def test_wrong_codes_are_braked_with_wrong_passwords(olga: User, clock: Clock) -> None:
    phone, _ = set_up(browser(), clock)
    Client(REMOTE_ADDR=HERE).post("/login", {"username": "olga", "password": "wrong"})
    client = browser()
    for wrong in ("", "000000", "٠٠٠٠٠٠", "a" * 16):
        assert client.post("/login/code", {"code": wrong}).status_code == 403
    answer = client.post("/login/code", {"code": phone.code()})
    assert (answer.status_code, int(answer["Retry-After"]) > 0) == (429, True)
    assert not is_in(client)
    assert browser().get("/login/code").status_code == 302  # the password waits, too
    assert acts("session.").count("refused") == 5


def test_a_recovery_code_stands_for_a_code_once(olga: User, clock: Clock) -> None:
    _, codes = set_up(browser(), clock)
    assert browser().post("/login/code", {"code": codes[0].upper()}).status_code == 302
    assert browser().post("/login/code", {"code": codes[0]}).status_code == 403
    assert browser().post("/login/code", {"code": codes[1].replace("-", " ")}).status_code == 302
    used = AuditEvent.objects.filter(act="second_factor.recovery_code_used").order_by("id")
    assert [row.data["left"] for row in used] == [9, 8]


def test_a_first_step_ends_after_minutes_with_a_new_password_and_with_the_account(
    olga: User, clock: Clock
) -> None:
    phone, _ = set_up(browser(), clock)

    def late(_: Client, session: Any) -> None:
        session["entering"] = {**session["entering"], "began": session["entering"]["began"] - 301}
        session.save()

    def new_password(client: Client, session: Any) -> None:
        olga.set_password("another-long-password")
        olga.save()

    def deactivated(client: Client, session: Any) -> None:
        olga.set_password(PASSWORD)
        olga.is_active = False
        olga.save()

    changes: list[Callable[[Client, Any], None]] = [late, new_password, deactivated]
    for change in changes:
        client = browser()
        change(client, client.session)
        assert client.post("/login/code", {"code": phone.code()})["Location"] == "/login"
        assert not is_in(client)


def test_no_session_can_be_planted_before_the_first_step(olga: User, clock: Clock) -> None:
    phone, _ = set_up(browser(), clock)
    client = browser()
    first = client.session.session_key
    client.post("/login", {"username": "olga", "password": PASSWORD})
    second = client.session.session_key
    client.post("/login/code", {"code": phone.code()})
    assert len({first, second, client.session.session_key}) == 3


def test_other_browsers_are_signed_out_when_an_app_is_set_up(olga: User, clock: Clock) -> None:
    here, there = browser(), browser()
    set_up(here, clock)
    assert (is_in(here), is_in(there)) == (True, False)


def test_setting_up_needs_a_right_code_and_the_password_of_the_last_minutes(
    olga: User, clock: Clock
) -> None:
    client = browser()
    text = client.get(PAGE).content.decode()
    form = {"act": "turn-on", "offer": field(text, "offer"), "code": "000000"}
    again = client.post(PAGE, form)
    assert again.status_code == 422
    assert field(again.content.decode(), "offer") == form["offer"]  # the phone has it already
    _forget_password(client)
    assert client.post(PAGE, form).status_code == 403
    other = make_person("oscar")
    assert other
    form["offer"] = field(browser("oscar").get(PAGE).content.decode(), "offer")
    assert client.post(PAGE, {**form, "password": PASSWORD}).status_code == 422
    assert not SecondFactor.objects.exists()


def test_turning_off_and_new_codes_need_password_and_code(olga: User, clock: Clock) -> None:
    client = browser()
    phone, codes = set_up(client, clock)
    right = {"password": PASSWORD, "code": phone.code()}
    for act in ("renew", "turn-off"):
        for wrong in ({**right, "password": "no"}, {**right, "code": "000000"}):
            assert client.post(PAGE, {"act": act, **wrong}).status_code == 403
    new = client.post(PAGE, {"act": "renew", **right}).content.decode()
    assert not [code for code in codes if code in new]
    assert browser().post("/login/code", {"code": codes[0]}).status_code == 403
    AuditEvent.objects.filter(act="session.refused").update(act="x")  # the brake is not the subject
    clock.next_step()
    form = {"act": "turn-off", "password": PASSWORD, "code": phone.code()}
    assert client.post(PAGE, form).status_code == 302
    assert is_in(browser())
    assert acts() == ["turned_on", "codes_renewed", "turned_off"]


def test_a_dangerous_act_asks_for_password_and_code(olga: User, clock: Clock) -> None:
    client = browser()
    phone, _ = set_up(client, clock)
    assert 'data-proof="password code"' in client.get("/me").content.decode()
    _forget_password(client)
    assert _issue(client).json()["code"] == "password-needed"
    for wrong in (
        {"password": PASSWORD},
        {"password": PASSWORD, "code": "000000"},
        {"code": phone.code()},
    ):
        assert client.post("/step-up", wrong).status_code == 403
    assert _issue(client).status_code == 403
    right = {"password": PASSWORD, "code": phone.code()}
    assert client.post("/step-up", right).status_code == 200
    assert _issue(client).status_code == 201


def test_a_token_is_issued_only_in_a_session_that_gave_a_code(olga: User, clock: Clock) -> None:
    client = browser()
    set_up(client, clock)
    session = client.session
    del session["second_factor"]
    session.save()
    answer = _issue(client)
    assert (answer.status_code, answer.json()["code"]) == (403, "second-factor-needed")
    assert not ApiToken.objects.exists()


def test_tokens_are_asked_for_no_code(olga: User, clock: Clock, settings: Any) -> None:
    caller = Caller(token_of(olga, TokenScope.READ, TokenScope.ACT))
    set_up(browser(), clock)
    settings.ESPER_TOTP_REQUIRED_ROLES = frozenset(Role)
    assert caller.get("me").status == 200
    assert caller.post("tokens", {"name": "x", "scopes": ["read"]}).status == 201


def test_a_demanded_app_comes_before_anything_else(olga: User, clock: Clock, settings: Any) -> None:
    settings.ESPER_TOTP_REQUIRED_ROLES = frozenset({Role.OPERATOR})
    client = browser()
    for path in ("/", "/inbox", "/me", "/bar", "/admin/", "/api/docs"):
        answer = client.get(path)
        assert answer.status_code == 302, path
        assert answer["Location"].startswith(f"{PAGE}?next="), path
    assert client.get("/inbox", headers={"HX-Request": "true"})["HX-Redirect"] == PAGE
    refused = client.get("/api/v1/runs")
    assert (refused.status_code, refused.json()["code"]) == (403, "second-factor-needed")
    assert not _sockets_of(client, olga)
    assert "This server demands" in client.get(PAGE).content.decode()
    phone, _ = set_up(client, clock)
    assert client.get("/inbox").status_code == 200
    assert _sockets_of(client, olga)
    form = {"act": "turn-off", "password": PASSWORD, "code": phone.code()}
    assert client.post(PAGE, form).status_code == 403
    make_person("vera")
    assert is_in(browser("vera"))  # a role that it is not demanded of


def test_an_app_that_is_removed_during_a_sign_in_does_not_count_as_given(
    olga: User, clock: Clock, settings: Any
) -> None:
    set_up(browser(), clock)
    client = browser()
    SecondFactor.objects.all().delete()
    settings.ESPER_TOTP_REQUIRED_ROLES = frozenset({Role.OPERATOR})
    client.post("/login/code", {"code": "000000"})
    assert client.get("/inbox")["Location"].startswith(PAGE)


def test_a_role_in_a_project_is_demanded_of_as_one_of_the_account(settings: Any) -> None:
    from apps.accounts.models import Membership, Project

    settings.ESPER_TOTP_REQUIRED_ROLES = frozenset({Role.OPERATOR})
    vera = make_person("vera")
    project = Project.objects.create(name="vision")
    Membership.objects.create(project=project, user=vera, role=Role.OPERATOR)
    assert browser("vera").get("/runs").status_code == 302


def test_an_administrator_removes_the_app_of_somebody_who_lost_the_phone(
    olga: User, clock: Clock
) -> None:
    ada = make_person("ada")
    theirs = browser()
    set_up(theirs, clock)
    admin = Caller(token_of(ada, TokenScope.ACT))
    path = "people/olga/remove-second-factor"
    assert admin.post(path, {"reason": " "}).status == 422
    for role in set(Role) - {Role.ADMIN}:
        user = make_person(f"x-{role}", role)
        other = Caller(token_of(user, TokenScope.ACT))
        for asked in (path, "people/nobody/remove-second-factor"):
            assert other.post(asked, {"reason": "mine"}).status == 403
    assert SecondFactor.objects.count() == 1
    assert admin.post(path, {"reason": "she called me"}).status == 200
    assert not is_in(theirs)
    assert is_in(browser())
    event = AuditEvent.objects.get(act="second_factor.removed")
    assert (event.actor, event.object_uid, event.reason) == ("ada", "olga", "she called me")
    assert admin.post(path, {"reason": "again"}).status == 422


def test_the_page_of_people_is_for_administrators(olga: User, clock: Clock) -> None:
    make_person("ada")
    set_up(browser(), clock)
    text = browser("ada").get("/people").content.decode()
    assert "/api/v1/people/olga/remove-second-factor" in text
    assert browser("ada").get("/people").status_code == 200
    make_person("carl")
    assert browser("carl").get("/people").status_code == 403


def test_recovery_codes_work_after_the_key_was_replaced(
    olga: User, clock: Clock, settings: Any
) -> None:
    phone, codes = set_up(browser(), clock)
    settings.SECRET_KEY = "another-key-" + "0123456789abcdef" * 4
    client = browser()
    assert client.post("/login/code", {"code": phone.code()}).status_code == 403
    assert client.post("/login/code", {"code": codes[0]}).status_code == 302


def test_the_picture_needs_no_inline_style_or_script(olga: User) -> None:
    answer = browser().get(PAGE)
    text = answer.content.decode()
    assert "<svg" in text
    assert not re.search(r"<style|<script(?![^>]+src=)|<[^>]+\s(style|on\w+)=", text)
    assert "no-store" in answer["Cache-Control"]


def _forget_password(client: Client) -> None:
    session = client.session
    session["password_at"] -= HOLDS_FOR.total_seconds() + 1
    session.save()


def _issue(client: Client) -> Any:
    return client.post(
        "/api/v1/tokens",
        codec.encode({"name": "x", "scopes": ["read"], "expires_in_days": 1}),
        content_type="application/json",
        headers={"Idempotency-Key": "issue"},
    )


def _sockets_of(client: Client, user: User) -> dict[Holder, Any]:
    return rights_of({Holder(user.pk, session_key=client.session.session_key or ""): ()})
