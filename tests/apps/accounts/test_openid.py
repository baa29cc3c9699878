"""Signing in through an OpenID provider: who gets in, as whom, and who never does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from django.core.exceptions import ImproperlyConfigured
from django.db import IntegrityError
from django.http import HttpResponse
from django.test import Client

from apps.accounts.models import Identity, Membership, Project, SecondFactor, User
from apps.accounts.step_up import HOLDS_FOR
from apps.audit.models import AuditEvent
from esper.contracts import Role
from esper_web import env
from esper_web.env import GroupRole
from tests.apps.accounts.small_provider import (
    CLIENT,
    KEY,
    OTHER_KEY,
    SECRET,
    Claims,
    SmallProvider,
    public_jwk,
    serving,
    signed,
)
from tests.apps.cast import PASSWORD, make_person
from tests.tls import TRUSTS_NOBODY

pytestmark = pytest.mark.django_db

ANNA: Claims = {"sub": "0aa1", "preferred_username": "anna", "groups": ["ops", "others"]}
ROLES = (
    GroupRole("admins", Role.ADMIN),
    GroupRole("ops", Role.OPERATOR),
    GroupRole("vision", Role.RESEARCHER, "vision"),
    GroupRole("lost", Role.ADMIN, "no such project"),
)


@pytest.fixture
def provider(settings: Any) -> Iterator[SmallProvider]:
    with serving() as made:
        settings.ESPER_OIDC_ISSUER = made.issuer
        settings.ESPER_OIDC_CLIENT_ID, settings.ESPER_OIDC_CLIENT_SECRET = CLIENT, SECRET
        settings.ESPER_OIDC_ROLES, settings.ESPER_OIDC_NAME = ROLES, "Example"
        made.person = ANNA
        yield made


def begin(client: Client, query: str = "") -> tuple[str, str]:
    """To the provider and back as a browser goes; the way to our page, and to the provider's."""
    asked = client.get(f"/login/provider{query}")["Location"]
    back = httpx.get(asked, verify=TRUSTS_NOBODY).headers["Location"]
    return back.removeprefix("http://testserver"), asked


def sign_in(client: Client, query: str = "") -> HttpResponse:
    answer: HttpResponse = client.get(begin(client, query)[0])
    return answer


def is_in(client: Client) -> bool:
    return client.get("/me").status_code == 200


def test_a_person_with_a_mapped_group_gets_in_and_keeps_the_account(
    provider: SmallProvider,
) -> None:
    client = Client()
    assert "Sign in with Example" in client.get("/login").content.decode()
    answer = sign_in(client, "?next=/runs%3Fstate=running")
    assert (answer.status_code, answer["Location"]) == (302, "/runs?state=running")
    assert is_in(client)
    anna = User.objects.get(username="anna")
    assert (anna.role, anna.has_usable_password()) == (Role.OPERATOR, False)
    started = AuditEvent.objects.get(act="session.started")
    assert (started.actor, started.via) == ("anna", "provider")
    provider.person = {**ANNA, "preferred_username": "renamed", "groups": ["admins", "ops"]}
    assert sign_in(Client()).status_code == 302
    anna.refresh_from_db()
    assert (User.objects.count(), anna.username, anna.role) == (1, "anna", Role.ADMIN)
    assert AuditEvent.objects.get(act="person.role_set").data["before"] == "operator"
    assert client.post("/logout").status_code == 302
    assert not is_in(client)


def test_the_request_has_pkce_state_and_nonce_and_differs_each_time(
    provider: SmallProvider,
) -> None:
    asked = [parse_qs(urlsplit(begin(Client())[1]).query) for _ in range(2)]
    for name in ("state", "nonce", "code_challenge"):
        first, second = (one[name][0] for one in asked)
        assert len(first) >= 43
        assert first != second
    assert asked[0]["code_challenge_method"] == ["S256"]
    assert asked[0]["response_type"] == ["code"]


PUBLIC_PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _unsigned(claims: Claims) -> str:
    return jwt.encode(claims, None, "none", headers={"kid": "k1"})


def _with_the_public_key(secret: bytes) -> Callable[[Claims], str]:
    """As a library signs that does not refuse to: ours does."""

    def sign(claims: Claims) -> str:
        import base64
        import hashlib
        import hmac

        def part(content: Any) -> bytes:
            return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=")

        text = part({"alg": "HS256", "typ": "JWT", "kid": "k1"}) + b"." + part(claims)
        mac = hmac.new(secret, text, hashlib.sha256).digest()
        return (text + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()

    return sign


def _changed_after_signing(claims: Claims) -> str:
    head, _, signature = signed({**claims, "sub": "somebody"}).split(".")
    return ".".join([head, signed(claims).split(".")[1], signature])


def _without(name: str) -> Callable[[Claims], Claims]:
    return lambda claims: {key: value for key, value in claims.items() if key != name}


FORGED_CLAIMS: dict[str, Callable[[Claims], Claims]] = {
    "issuer": lambda claims: {**claims, "iss": "https://evil.example"},
    "issuer with a slash": lambda claims: {**claims, "iss": f"{claims['iss']}/"},
    "audience": lambda claims: {**claims, "aud": "another"},
    "several audiences": lambda claims: {**claims, "aud": [CLIENT, "another"]},
    "authorized party": lambda claims: {**claims, "azp": "another"},
    "nonce": lambda claims: {**claims, "nonce": "of another sign-in"},
    "expired": lambda claims: {**claims, "exp": time.time() - 60},
    "of the future": lambda claims: {**claims, "iat": time.time() + 600},
    "not yet": lambda claims: {**claims, "nbf": time.time() + 600},
    "empty subject": lambda claims: {**claims, "sub": ""},
    "subject is a number": lambda claims: {**claims, "sub": 7},
    **{f"no {name}": _without(name) for name in ("iss", "aud", "nonce", "exp", "iat", "sub")},
}
FORGED_SIGNATURES: dict[str, Callable[[Claims], str]] = {
    "none": _unsigned,
    "None": lambda claims: _unsigned(claims).replace("eyJhbGciOiJub25l", "eyJhbGciOiJOb25l"),
    "HS256 with the public key": _with_the_public_key(PUBLIC_PEM),
    "HS256 with the key as JSON": _with_the_public_key(json.dumps(public_jwk()).encode()),
    "HS256 with the secret": _with_the_public_key(SECRET.encode()),
    "another key": lambda claims: jwt.encode(claims, OTHER_KEY, "RS256", headers={"kid": "k1"}),
    "a key that there is not": lambda claims: jwt.encode(
        claims, OTHER_KEY, "RS256", headers={"kid": "k2"}
    ),
    "its own key": lambda claims: jwt.encode(
        claims, OTHER_KEY, "RS256", headers={"kid": "k1", "jku": "http://127.0.0.1:9/keys"}
    ),
    "changed after signing": _changed_after_signing,
    "no token": lambda claims: "",
    "no text": lambda claims: None,  # type: ignore[return-value,dict-item]
    "three dots": lambda claims: "...",
}


@pytest.mark.parametrize("forgery", FORGED_CLAIMS)
def test_no_forged_claim_gets_in(provider: SmallProvider, forgery: str) -> None:
    provider.change = FORGED_CLAIMS[forgery]
    _gets_not_in(sign_in(client := Client()), client)


@pytest.mark.parametrize("forgery", FORGED_SIGNATURES)
def test_no_forged_signature_gets_in(provider: SmallProvider, forgery: str) -> None:
    provider.sign = FORGED_SIGNATURES[forgery]
    _gets_not_in(sign_in(client := Client()), client)


def _gets_not_in(answer: HttpResponse, client: Client, status: int = 403) -> None:
    assert answer.status_code == status
    assert 'role="alert"' in answer.content.decode()
    assert not is_in(client)
    assert not User.objects.exists()


def test_a_code_and_a_way_back_work_once(provider: SmallProvider) -> None:
    client = Client()
    back, _ = begin(client)
    trip = client.cookies["esper_trip"].value
    assert client.get(back).status_code == 302
    User.objects.all().delete()
    client.cookies.clear()
    _gets_not_in(client.get(back), client, 400)  # its trip has ended here
    client.cookies["esper_trip"] = trip
    _gets_not_in(client.get(back), client)  # the provider takes the code once


def test_the_answer_to_another_browser_signs_nobody_in(provider: SmallProvider) -> None:
    theirs, mine = Client(), Client()
    back, _ = begin(theirs)
    _gets_not_in(mine.get(back), mine, 400)
    begin(mine)  # a trip of its own, with another state
    _gets_not_in(mine.get(back), mine, 400)
    begin(mine)
    state = back.partition("state=")[2]
    _gets_not_in(mine.get(back.replace(state, "")), mine, 400)


def test_another_verifier_or_nonce_redeems_no_code(provider: SmallProvider) -> None:
    """A code that was stolen is worth nothing in the trip of somebody else."""
    theirs, mine = Client(), Client()
    stolen = parse_qs(urlsplit(begin(theirs)[0]).query)["code"][0]
    own = parse_qs(urlsplit(begin(mine)[0]).query)
    path = f"/login/provider/callback?code={stolen}&state={own['state'][0]}"
    _gets_not_in(mine.get(path), mine)


def test_an_answer_in_the_name_of_another_provider_is_refused(provider: SmallProvider) -> None:
    client = Client()
    back, _ = begin(client)
    _gets_not_in(client.get(f"{back}&iss=https://evil.example"), client)


def test_nobody_without_a_mapped_group_gets_in(provider: SmallProvider) -> None:
    for groups in (["others"], [], None, "oops", {"ops": True}, [["ops"]], ["lost"]):
        provider.person = {**ANNA, "groups": groups}
        client = Client()
        answer = sign_in(client)
        _gets_not_in(answer, client)
        assert "none of its groups may use Esper" in answer.content.decode()
    refused = AuditEvent.objects.filter(act="session.not_admitted")
    assert {(one.object_uid, one.data["why"]) for one in refused} == {("0aa1", "no-group")}


def test_who_leaves_the_group_gets_in_no_more(provider: SmallProvider) -> None:
    assert sign_in(Client()).status_code == 302
    provider.person = {**ANNA, "groups": []}
    client = Client()
    assert sign_in(client).status_code == 403
    assert not is_in(client)


def test_a_deactivated_account_stays_out(provider: SmallProvider) -> None:
    sign_in(Client())
    User.objects.update(is_active=False)
    client = Client()
    assert sign_in(client).status_code == 403
    assert not is_in(client)


@pytest.mark.parametrize("claim", ["preferred_username", "email"])
def test_no_name_and_no_mail_address_gives_the_account_of_somebody_else(
    provider: SmallProvider, claim: str
) -> None:
    ada = make_person("ada")
    User.objects.filter(pk=ada.pk).update(email="ada@example.org")
    make_person("olga@example.org", Role.VIEWER)
    for name in ("ada", "ADA", "olga@example.org"):
        provider.person = {"sub": "evil", "groups": ["ops"], claim: name, "email_verified": True}
        client = Client()
        answer = sign_in(client)
        assert answer.status_code == 403
        assert "There is an account" in answer.content.decode()
        assert not is_in(client)
    provider.person = {"sub": "evil", "groups": ["ops"], "email": "ada@example.org"}
    sign_in(client := Client())
    assert client.get("/api/v1/me").json()["username"] == "ada@example.org"  # an account of its own
    assert Identity.objects.get().user != ada


def test_a_subject_of_another_issuer_is_another_person(provider: SmallProvider) -> None:
    ada = make_person("ada")
    Identity.objects.create(user=ada, issuer="https://elsewhere.example", subject=ANNA["sub"])
    sign_in(client := Client())
    assert client.get("/api/v1/me").json()["username"] == "anna"


def test_groups_give_roles_in_projects_and_take_them_back(provider: SmallProvider) -> None:
    vision = Project.objects.create(name="vision")
    other = Project.objects.create(name="other")
    provider.person = {**ANNA, "groups": ["vision"]}
    assert sign_in(Client()).status_code == 302
    anna = User.objects.get(username="anna")
    assert anna.role == Role.VIEWER
    Membership.objects.create(project=other, user=anna, role=Role.CURATOR)  # by hand
    assert _memberships(anna) == {"vision": "researcher", "other": "curator"}
    provider.person = {**ANNA, "groups": ["ops"]}
    sign_in(Client())
    assert _memberships(anna) == {"other": "curator"}
    acts = AuditEvent.objects.filter(object_uid=vision.uid).order_by("id")
    assert [one.act for one in acts] == ["project.member_set", "project.member_removed"]


def _memberships(user: User) -> dict[str, str]:
    return dict(Membership.objects.filter(user=user).values_list("project__name", "role"))


CLAIMS_WITH_GROUPS: dict[str, tuple[str, Claims, bool]] = {
    "a list": ("groups", {"groups": ["ops"]}, True),
    "one": ("hd", {"hd": "ops"}, True),
    "inside": ("realm_access.roles", {"realm_access": {"roles": ["ops"]}}, True),
    "an address as a name": (
        "https://x.example/groups",
        {"https://x.example/groups": ["ops"]},
        True,
    ),
    "a verified mail": ("email", {"email": "ops", "email_verified": True}, True),
    "a mail that is not verified": ("email", {"email": "ops", "email_verified": False}, False),
    "a mail, perhaps verified": ("email", {"email": "ops", "email_verified": "true"}, False),
}


@pytest.mark.parametrize("kind", CLAIMS_WITH_GROUPS)
def test_groups_are_read_from_the_claim_that_is_set(
    provider: SmallProvider, settings: Any, kind: str
) -> None:
    settings.ESPER_OIDC_GROUPS_CLAIM, claims, gets_in = CLAIMS_WITH_GROUPS[kind]
    provider.person = {"sub": "s1", "preferred_username": "anna", **claims}
    sign_in(client := Client())
    assert is_in(client) == gets_in


@pytest.mark.parametrize("next_page", ["https://evil.example/", "//evil.example", "javascript:x"])
def test_it_never_leads_to_another_site(provider: SmallProvider, next_page: str) -> None:
    assert sign_in(Client(), f"?next={next_page}")["Location"] == "/"


BROKEN: dict[str, dict[str, tuple[int, bytes]]] = {
    "no metadata": {"/.well-known/openid-configuration": (500, b"oops")},
    "metadata is no JSON": {"/.well-known/openid-configuration": (200, b"<html>")},
    "metadata is a list": {"/.well-known/openid-configuration": (200, b"[]")},
    "of another": {"/.well-known/openid-configuration": (200, b'{"issuer": "https://x.example"}')},
    "deep": {"/.well-known/openid-configuration": (200, b"[" * 200_000)},
    "token endpoint fails": {"/token": (503, b"")},
    "it refuses our secret": {"/token": (401, b'{"error": "invalid_client"}')},
    "too long": {"/token": (200, b" " * (2 << 20))},
    "no keys": {"/keys": (500, b"")},
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_provider_becomes_a_sentence(provider: SmallProvider, kind: str) -> None:
    provider.broken = BROKEN[kind]
    client = Client()
    answer = client.get("/login/provider")
    if answer.status_code == 302:
        back = httpx.get(answer["Location"], verify=TRUSTS_NOBODY).headers["Location"]
        answer = client.get(back.removeprefix("http://testserver"))
    text = answer.content.decode()
    assert answer.status_code == 502
    assert "Example does not work at present" in text
    assert "secret" not in text
    assert not is_in(client)


def test_keys_without_a_list_are_refused(provider: SmallProvider) -> None:
    for keys in (b"{}", b'{"keys": 3}', b'{"keys": [3]}', b'{"keys": [{"kty": "oct", "k": "eA"}]}'):
        provider.broken = {"/keys": (200, keys)}
        _gets_not_in(sign_in(client := Client()), client)


def test_a_provider_that_is_not_there_becomes_a_sentence(
    provider: SmallProvider, settings: Any
) -> None:
    settings.ESPER_OIDC_ISSUER = "http://127.0.0.1:9"
    assert Client().get("/login/provider").status_code == 502


def test_an_endpoint_without_https_is_not_used(provider: SmallProvider) -> None:
    for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
        for address in ("http://id.example.org/x", "javascript:alert(1)", "file:///etc/passwd", ""):
            provider.metadata = {name: address}
            assert Client().get("/login/provider").status_code == 502


def test_a_person_who_refuses_there_reads_so_here(provider: SmallProvider) -> None:
    client = Client()
    state = parse_qs(urlsplit(begin(client)[1]).query)["state"][0]
    path = f"/login/provider/callback?error=access_denied&state={state}"
    answer = client.get(path)
    assert (answer.status_code, "has not signed you in" in answer.content.decode()) == (403, True)


def test_a_code_of_the_app_is_asked_for_here_too(
    provider: SmallProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign_in(Client())
    SecondFactor.objects.create(user=User.objects.get(username="anna"), secret=b"", last_step=0)
    monkeypatch.setattr("apps.console.proving.accept_code", lambda _, code: code == "right")
    client = Client()
    assert sign_in(client, "?next=/runs")["Location"] == "/login/code"
    assert not is_in(client)
    assert client.post("/login/code", {"code": "wrong"}).status_code == 403
    assert client.post("/login/code", {"code": "right"})["Location"] == "/runs"
    assert is_in(client)
    session = client.session
    session["password_at"] = 0.0
    session.save()
    assert client.get(begin(client, "?again=1")[0]).status_code == 403  # it stands for no code
    assert client.post("/step-up", {"code": "wrong"}).status_code == 403
    assert _issue(client).status_code == 403
    assert client.post("/step-up", {"code": "right"}).status_code == 200
    assert _issue(client).status_code == 201


def test_two_first_sign_ins_at_once_become_a_sentence(
    provider: SmallProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(_: Claims) -> User:
        raise IntegrityError("UNIQUE constraint failed")

    monkeypatch.setattr("apps.console.pages.provider.person_of", twice)
    answer = sign_in(Client())
    assert (answer.status_code, "Sign in again" in answer.content.decode()) == (503, True)


def test_a_demanded_app_is_not_set_up_twice(provider: SmallProvider, settings: Any) -> None:
    """Where the provider says that it has asked for a second factor."""
    settings.ESPER_TOTP_REQUIRED_ROLES = frozenset({Role.OPERATOR})
    sign_in(client := Client())
    assert client.get("/runs").status_code == 302
    provider.person = {**ANNA, "amr": ["pwd", "mfa"]}
    sign_in(client := Client())
    assert client.get("/runs").status_code == 200


@pytest.mark.parametrize(
    ("auth_time", "works"), [(None, True), (0, True), (-HOLDS_FOR.total_seconds() - 5, False)]
)
def test_before_a_dangerous_act_the_provider_asks_again(
    provider: SmallProvider, auth_time: float | None, works: bool
) -> None:
    client = Client()
    sign_in(client)
    session = client.session
    session["password_at"] = 0.0
    session.save()
    assert _issue(client).json()["code"] == "password-needed"
    assert client.post("/step-up", {"password": ""}).status_code == 403
    assert _issue(client).status_code == 403
    assert 'data-proof="provider"' in client.get("/me").content.decode()
    if auth_time is not None:
        provider.person = {**ANNA, "auth_time": time.time() + auth_time}
    back, asked = begin(client, "?again=1&next=/me")
    assert parse_qs(urlsplit(asked).query)["prompt"] == ["login"]
    assert client.get(back).status_code == (302 if works else 403)
    assert _issue(client).status_code == (201 if works else 403)


def test_another_person_cannot_prove_for_this_one(provider: SmallProvider) -> None:
    client = Client()
    sign_in(client)
    session = client.session
    session["password_at"] = 0.0
    session.save()
    provider.person = {**ANNA, "sub": "other", "preferred_username": "otto"}
    assert client.get(begin(client, "?again=1")[0]).status_code == 403
    assert _issue(client).status_code == 403
    assert client.get("/api/v1/me").json()["username"] == "anna"


def _issue(client: Client) -> Any:
    return client.post(
        "/api/v1/tokens",
        b'{"name": "x", "scopes": ["read"], "expires_in_days": 1}',
        content_type="application/json",
        headers={"Idempotency-Key": "issue"},
    )


# --- linking an account of this server ---


@pytest.fixture
def olga() -> Client:
    """A person with a password of this server, who has just given it."""
    make_person("olga")
    User.objects.filter(username="olga").update(email="olga@example.org")
    client = Client()
    client.post("/login", {"username": "olga", "password": PASSWORD})
    return client


def offer(client: Client) -> HttpResponse:
    """To the provider and back, up to the question."""
    answer: HttpResponse = client.get(begin(client, "?link=1")[0])
    return answer


def link(client: Client, **proof: str) -> HttpResponse:
    return client.post("/me/identity", {"act": "link", **proof})  # type: ignore[return-value]


def unlink(client: Client, **proof: str) -> HttpResponse:
    return client.post("/me/identity", {"act": "unlink", **proof})  # type: ignore[return-value]


def identity_acts() -> list[str]:
    found = AuditEvent.objects.filter(act__startswith="person.identity").order_by("id")
    return [f"{event.act} {event.actor} {event.data['subject']}" for event in found]


def forget_the_password(client: Client) -> None:
    session = client.session
    session["password_at"] = 0.0
    session.save()


def test_a_local_account_is_linked_used_and_unlinked(provider: SmallProvider, olga: Client) -> None:
    assert "Not linked" in olga.get("/me").content.decode()
    _, asked = begin(olga, "?link=1")
    assert parse_qs(urlsplit(asked).query)["prompt"] == ["login"]
    assert offer(olga)["Location"] == "/me/identity"
    question = olga.get("/me/identity").content.decode()
    assert "<strong>anna</strong>" in question
    assert "<strong>olga</strong>" in question
    assert not Identity.objects.exists()  # nothing without the person's word
    assert link(olga).status_code == 302
    assert "Linked" in olga.get("/me").content.decode()

    other = Client()
    sign_in(other)
    assert other.get("/api/v1/me").json()["username"] == "olga"
    assert User.objects.count() == 1

    assert unlink(olga).status_code == 302
    assert is_in(olga)
    assert not is_in(other)  # it had come in by the link
    assert sign_in(Client()).status_code == 302
    assert User.objects.get(identities__subject="0aa1").username == "anna"  # another account
    assert identity_acts() == [
        "person.identity_linked olga 0aa1",
        "person.identity_unlinked olga 0aa1",
    ]


def test_the_groups_take_no_rights_from_the_last_admin_with_a_password(
    provider: SmallProvider,
) -> None:
    """Else nobody could administer the server while the provider is away."""
    ada, second = make_person("ada", Role.ADMIN), make_person("bea", Role.ADMIN)
    off, provided = make_person("off", Role.ADMIN), make_person("provided", Role.ADMIN)
    off.is_active = False
    provided.set_unusable_password()
    for one in (off, provided):
        one.save()
    client = Client()
    client.post("/login", {"username": "ada", "password": PASSWORD})
    second.role = Role.OPERATOR
    second.save()
    offer(client)
    link(client)

    sign_in(Client())
    ada.refresh_from_db()
    assert ada.role == Role.ADMIN
    kept = AuditEvent.objects.get(act="person.role_kept")
    assert (kept.object_uid, kept.data) == ("ada", {"role": "admin", "by_groups": "operator"})

    second.role = Role.ADMIN
    second.save()
    sign_in(Client())
    ada.refresh_from_db()
    assert ada.role == Role.OPERATOR


def test_no_name_and_no_mail_address_links(provider: SmallProvider, olga: Client) -> None:
    provider.person = {**ANNA, "email": "olga@example.org", "email_verified": True}
    offer(olga)
    other = Client()
    sign_in(other)
    assert other.get("/api/v1/me").json()["username"] == "anna"
    assert not User.objects.get(username="olga").identities.exists()


def test_a_link_needs_the_password_and_the_code_of_the_app(
    provider: SmallProvider, olga: Client
) -> None:
    offer(olga)
    forget_the_password(olga)
    for proof in ({}, {"password": "wrong"}):
        assert link(olga, **proof).status_code == 403
    assert not Identity.objects.exists()
    assert link(olga, password=PASSWORD).status_code == 302
    SecondFactor.objects.create(
        user=User.objects.get(username="olga"), secret=b"none fits", last_step=0
    )
    assert unlink(olga, password=PASSWORD).status_code == 403
    assert Identity.objects.exists()


def test_an_account_of_the_provider_belongs_to_one_person(
    provider: SmallProvider, olga: Client
) -> None:
    sign_in(Client())
    offer(olga)
    answer = link(olga)
    assert answer.status_code == 409
    assert b"belongs to another person" in answer.content
    assert Identity.objects.get().user.username == "anna"


def test_an_account_is_linked_once(provider: SmallProvider, olga: Client) -> None:
    offer(olga)
    link(olga)
    provider.person = {**ANNA, "sub": "second"}
    offer(olga)
    assert link(olga).status_code == 409
    assert Identity.objects.get().subject == "0aa1"


def test_who_may_not_sign_in_there_is_not_linked(provider: SmallProvider, olga: Client) -> None:
    provider.person = {**ANNA, "groups": ["others"]}
    assert offer(olga).status_code == 403
    assert link(olga).status_code == 409
    refused = AuditEvent.objects.get(act="session.not_admitted")
    assert refused.object_uid == "0aa1" or "0aa1" in str(refused.data)


def test_an_answer_is_for_the_person_and_the_session_that_asked(
    provider: SmallProvider, olga: Client
) -> None:
    back, _ = begin(olga, "?link=1")
    make_person("oscar")
    olga.post("/logout")
    olga.post("/login", {"username": "oscar", "password": PASSWORD})
    assert olga.get(back).status_code == 403
    assert link(olga).status_code == 409
    assert not Identity.objects.exists()


def test_an_old_answer_links_nothing(provider: SmallProvider, olga: Client) -> None:
    offer(olga)
    session = olga.session
    session["offered_identity"] = {**session["offered_identity"], "at": time.time() - 301}
    session.save()
    assert link(olga).status_code == 409
    assert not Identity.objects.exists()


def test_a_cancelled_link_is_forgotten(provider: SmallProvider, olga: Client) -> None:
    offer(olga)
    assert olga.post("/me/identity", {"act": "cancel"}).status_code == 302
    assert link(olga).status_code == 409


def test_who_has_no_password_stays_linked(provider: SmallProvider) -> None:
    client = Client()
    sign_in(client)
    assert "cannot be unlinked" in client.get("/me/identity").content.decode()
    assert unlink(client).status_code == 403
    assert Identity.objects.exists()


def test_another_site_cannot_confirm(provider: SmallProvider) -> None:
    make_person("olga")
    client = Client(enforce_csrf_checks=True)
    client.force_login(User.objects.get(username="olga"))
    offer(client)
    assert link(client).status_code == 403
    assert not Identity.objects.exists()


def test_without_a_provider_nothing_of_it_is_there() -> None:
    make_person("olga")
    assert "Sign in with" not in Client().get("/login").content.decode()
    for path in ("/login/provider", "/login/provider/callback?code=x&state=y"):
        assert Client().get(path).status_code == 404
    form = {"username": "olga", "password": PASSWORD}
    client = Client()
    assert client.post("/login", form).status_code == 302
    assert client.get("/me/identity").status_code == 404
    assert "identity" not in client.get("/me").content.decode()


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (env.issuer, "http://id.example.org"),
        (env.issuer, "ftp://id.example.org"),
        (env.issuer, "https://id.example.org/?a=b"),
        (env.issuer, "id.example.org"),
        (env.group_roles, "ops"),
        (env.group_roles, "ops=boss"),
        (env.group_roles, "=admin"),
        (env.roles, "approver"),
    ],
)
def test_a_bad_setting_stops_the_start(
    read: Any, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("X", value)
    with pytest.raises(ImproperlyConfigured, match="X"):
        read("X")


def test_settings_are_read_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("https://id.example.org/realms/a", "http://127.0.0.1:8080", ""):
        monkeypatch.setenv("X", value)
        assert env.issuer("X") == value
    monkeypatch.setenv("X", "cn=esper=admin, /esper/ops=operator,v=researcher@vision lab")
    assert env.group_roles("X") == (
        GroupRole("cn=esper", Role.ADMIN),
        GroupRole("/esper/ops", Role.OPERATOR),
        GroupRole("v", Role.RESEARCHER, "vision lab"),
    )
    with pytest.raises(ImproperlyConfigured, match="A needs C too"):
        env.together("A", "given", {"B": "b", "C": ""})
    env.together("A", "", {"C": ""})
