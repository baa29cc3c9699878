"""The language of the pages: who chooses it, what it changes, and what it must not change."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest
from django.test import Client
from django.utils import translation

from apps.accounts.models import User
from apps.audit.models import AuditEvent
from apps.console.language import as_written
from apps.console.templatetags.console import count, quoted, told_details
from tests.apps.cast import PASSWORD
from tests.apps.console.catalogue import READ
from tests.apps.console.test_pages import FAILED_PANEL, page_addresses

GERMAN = {"accept-language": "de-AT,de;q=0.9,en;q=0.5"}
SETTINGS = {"language": "", "zone": "", "theme": "", "density": "", "keys": "on"}


def heading(client: Client, address: str = "/inbox", **more: Any) -> str:
    text = client.get(address, **more).content.decode()
    return text.split("<h1", 1)[1].split(">", 1)[1].split("<", 1)[0]


# --- who chooses ----------------------------------------------------------------------------------


def test_a_browser_s_wish_gives_way_to_its_cookie_and_that_to_the_account(world: Any) -> None:
    client = world.client("olga")
    assert heading(client) == "Inbox"
    assert heading(client, headers=GERMAN) == "Eingang"
    client.cookies["language"] = "en-gb"
    assert heading(client, headers=GERMAN) == "Inbox"
    client.post("/me/settings", {**SETTINGS, "language": "de"})
    assert heading(client) == "Eingang"  # the cookie of this browser ended with it
    client.cookies["language"] = "en-gb"
    assert heading(client) == "Eingang"
    assert heading(world.client("olga")) == "Eingang"  # in every browser
    assert heading(world.client("vera")) == "Inbox"


@pytest.mark.parametrize("wish", ["fr", "en-US", "", "x" * 600, "de\x00"])
def test_a_language_that_there_is_not_is_english(world: Any, wish: str) -> None:
    client = world.client("olga")
    assert heading(client, headers={"accept-language": wish}) == "Inbox"
    client.cookies["language"] = "../de"
    assert heading(client) == "Inbox"


def test_an_unknown_language_is_refused_and_changes_nothing(world: Any) -> None:
    client = world.client("olga")
    assert client.post("/me/settings", {**SETTINGS, "language": "xx"}).status_code == 422
    assert User.objects.get(username="olga").preferences == {}


def test_a_visitor_chooses_beside_the_sign_in_form_and_stays_on_the_page(db: None) -> None:
    client = Client()
    page = client.get("/login?next=/inbox").content.decode()
    assert 'name="language" value="de" lang="de">Deutsch</button>' in page
    chosen = client.post("/language", {"language": "de", "next": "/login?next=/inbox"})
    assert (chosen.status_code, chosen["Location"]) == (302, "/login?next=/inbox")
    assert heading(client, "/login?next=/inbox") == "Anmelden"
    elsewhere = client.post("/language", {"language": "de", "next": "https://evil.example/"})
    assert "evil" not in elsewhere["Location"]


@pytest.mark.parametrize("address", ["/", "/nowhere", "/login"])
def test_a_page_names_its_language_and_what_it_depends_on(world: Any, address: str) -> None:
    for headers, language in (({}, "en"), (GERMAN, "de")):
        answer = world.client("ada").get(address, headers=headers, follow=True)
        assert f'<html lang="{language}"' in answer.content.decode()
        assert answer["Content-Language"].startswith(language)
        assert {"Accept-Language", "Cookie"} <= set(answer["Vary"].split(", "))


def test_a_page_leaves_no_language_behind(world: Any) -> None:
    """Its thread writes the audit log and answers the API next."""
    world.client("ada").get("/", headers=GERMAN)
    assert translation.get_language() == "en-gb"


def test_the_scripts_have_their_catalogue_only_in_another_language(world: Any) -> None:
    client = world.client("vera")
    assert "words.js" not in client.get("/").content.decode()
    assert '<script src="/words.js?de" defer>' in client.get("/", headers=GERMAN).content.decode()
    script = client.get("/words.js?de", headers=GERMAN).content.decode()
    assert json.dumps("Genehmigt.") in script


# --- what it changes, and what it must not --------------------------------------------------------


class Machine(HTMLParser):
    """A page without its words: tags, and the attributes that programs read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.parts: list[Any] = []
        self.option_without_value = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("name") in ("csrf-token", "csrfmiddlewaretoken") or tag == "html":
            return
        if tag == "script" and str(given.get("src")).startswith("/words.js"):
            return
        self.option_without_value = tag == "option" and "value" not in given
        own = {name: value for name, value in given.items() if name not in READ}
        self.parts.append((tag, own))

    def handle_data(self, data: str) -> None:
        if self.option_without_value:  # its text is what a form sends
            self.parts.append(data)


def test_a_page_in_german_differs_in_its_words_only(world: Any) -> None:
    client = world.client("ada")
    for address in page_addresses(world):
        english = client.get(address).content.decode()
        german = client.get(address, headers=GERMAN).content.decode()
        assert FAILED_PANEL not in english
        assert "nicht gezeigt werden" not in german
        assert Machine(german).parts == Machine(english).parts, address


def test_numbers_are_written_as_the_language_writes_them(world: Any) -> None:
    address = f"/adaptations/{world.adaptations['waiting'].uid}?panel=why"
    client = world.client("ada")
    assert "<strong>0.66</strong>" in client.get(address).content.decode()
    assert "<strong>0,66</strong>" in client.get(address, headers=GERMAN).content.decode()
    with translation.override("de"):
        assert as_written("−12,345.678") == "−12.345,678"
        assert as_written("67.5%") == "67,5 %"
        assert count(1_100_000_000) == "1,1 Mrd."
        assert quoted("x") == "„x“"
        done = {"share": 0.002, "updates": 0, "factors": [1.0], "restore_best": True}
        assert told_details(done) == [("share", "0,002"), ("restore_best", "ja")]


API = (
    *("runs", "adaptations", "violations", "blueprints", "policies", "audit", "me", "workers"),
    *("runs?format=csv", "adaptations?format=csv", "audit/export", "runs/nowhere", "runs?x=1"),
)


def _bytes(answer: Any) -> bytes:
    return b"".join(answer.streaming_content) if answer.streaming else answer.content


def test_the_api_and_its_exports_are_the_same_bytes_in_every_language(world: Any) -> None:
    client = world.client("ada")
    User.objects.filter(username="ada").update(preferences={"language": "de"})
    addresses = [f"/api/v1/{path}" for path in API] + ["/api/schema", "/healthz"]
    for address in addresses:
        answers = []
        for wish in ("en", "de", "fr"):
            client.cookies["language"] = wish
            answer = client.get(address, headers={"accept-language": wish})
            assert "Content-Language" not in answer.headers
            assert "Accept-Language" not in answer.headers.get("Vary", "")
            # A request has a number of its own.
            body = [line for line in _bytes(answer).splitlines() if b"request_id" not in line]
            answers.append((answer.status_code, body))
        assert answers[0] == answers[1] == answers[2], address


def test_a_refusal_of_the_api_is_english_for_a_german_reader(world: Any) -> None:
    uid = world.adaptations["waiting"].uid
    answers = []
    for headers in ({}, GERMAN):
        client = world.client("vera")
        answer = client.post(
            f"/api/v1/adaptations/{uid}/approve",
            {"reason": ""},
            content_type="application/json",
            headers={**headers, "idempotency-key": f"one-{len(headers)}"},
        )
        answers.append((answer.status_code, answer.json().get("detail")))
    assert answers[0] == answers[1]


def test_the_audit_log_is_the_same_whatever_the_language_of_who_acts(db: None) -> None:
    from tests.apps.cast import make_person

    make_person("olga")
    rows = []
    for headers in ({}, GERMAN):
        AuditEvent.objects.all()._raw_delete("default")
        client = Client(headers=headers)
        client.post("/login", {"username": "olga", "password": "wrong"})
        client.post("/login", {"username": "olga", "password": PASSWORD})
        client.post("/me/settings", SETTINGS)
        rows.append(list(AuditEvent.objects.order_by("id").values_list("act", "reason")))
    assert rows[0] == rows[1]
