"""What a page offers to a role is allowed to it, and where it offers nothing it says why."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

import pytest
from django.core.cache import cache
from django.db import transaction
from django.test import Client
from django.urls import reverse

from apps.accounts.models import Membership, Project
from apps.adaptations.models import Adaptation, Plan
from apps.runs.models import Run
from esper.contracts import Role
from tests.apps.console.test_pages import page_addresses
from tests.apps.console.world import World, build_world
from tests.apps.console.world_busy import make_plan, make_variants

HAVE_NO_ACTS = ("/report", "/accessibility", "/search", "/bar", "/wall", "/status", "/audit")
OF_ADMINS = "/move"  # to another project: nobody else needs to know that it can be done
PEOPLE = ("vera", "rafi", "olga", "carl", "ada")
NOT_ALLOWED = {"not-eligible", "self-approval", "not-a-member", "not-signed-in", "service-account"}


def signed_in(world: World, who: str) -> Client:
    """With the password given just now, so that dangerous acts are tried too."""
    client = world.client(who)
    session = client.session
    session["password_at"] = time.time()
    session.save()
    return client


def pages_of(world: World) -> list[str]:
    """Every page with acts, with each state of what it shows once."""
    found = [one for one in page_addresses(world) if not one.startswith(HAVE_NO_ACTS)]
    found += ["/switch", "/incidents", "/projects"]
    for name, rows in (
        ("adaptation", {one.state: one for one in Adaptation.objects.all()}.values()),
        ("run", {(one.state, one.project_id): one for one in Run.objects.all()}.values()),
        ("plan", Plan.objects.all()),
    ):
        found += [reverse(f"console:{name}", args=[row.uid]) for row in rows]
    return list(dict.fromkeys(found))


@dataclass
class Form:
    """A form that sends an act, with what it would send as it stands."""

    given: dict[str, str]
    body: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, list[float]] = field(default_factory=dict)
    buttons: list[dict[str, str]] = field(default_factory=list)


class Forms(HTMLParser):
    """Reads the forms of a page, and where its links lead."""

    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self.links: set[str] = set()
        self._form: Form | None = None
        self._select: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "a" and given.get("href", "").startswith(("/", "?")):
            self.links.add(given["href"])
        elif tag == "form":
            self._form = (
                Form(given) if {"data-act", "data-api", "data-forms"} & set(given) else None
            )
            if self._form:
                self.forms.append(self._form)
        elif self._form is not None:
            self._field(tag, given)

    def _field(self, tag: str, given: dict[str, str]) -> None:
        form = self._form
        assert form is not None
        if tag == "button" and given.get("type") == "submit":
            form.buttons.append(given)
        elif tag == "select":
            self._select = given
        elif tag == "option" and self._select.get("name"):
            self._take(form, self._select, given.get("value", ""))
        elif tag in {"input", "textarea"}:
            words = {"number": given.get("min", "1"), "date": "2030-01-01"}
            plain = "words" if "reason" in given.get("name", "") or "required" in given else ""
            self._take(form, given, given.get("value") or words.get(given.get("type", ""), plain))

    def _take(self, form: Form, given: dict[str, str], text: str) -> None:
        """As ``acts.js`` does."""
        name = given.get("name", "")
        value: Any = text
        if given.get("data-parameter") == "number":
            value = float(text or 1)
        elif given.get("data-parameter") == "flag" or "data-flag" in given:
            value = text == "true"
        elif name in form.given.get("data-number", "").split():
            value = int(float(text or 1))
        if "data-limit" in given:
            form.limits.setdefault(given["data-limit"], []).append(float(text or 1))
        elif "data-was" in given or "data-for" in given or not name:
            return
        elif "data-list" in given:
            form.body.setdefault(name, []).append(text)
        elif "data-parameter" in given:
            form.parameters.setdefault(name, value)
        else:
            form.body.setdefault(name, value)

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._form = None
        elif tag == "select":
            self._select = {}


@dataclass(frozen=True)
class Control:
    method: str
    address: str
    body: str
    version: str


def forms_of(text: str) -> Forms:
    read = Forms()
    read.feed(text)
    return read


def controls_of(text: str) -> Iterator[Control]:
    for form in forms_of(text).forms:
        if "hidden" in form.given:  # until a script shows it
            continue
        for button in form.buttons:
            if "disabled" in button or button.get("aria-disabled") == "true":
                continue
            address = button.get("data-url") or form.given.get("data-act")
            address = address or f"{form.given['data-api']}/{button['data-path']}"
            body = form.body | json.loads(form.given.get("data-body", "{}"))
            if "data-settings" in form.given:
                body["config"] = form.parameters
            if "data-parameters" in form.given:
                body["parameters"] = form.parameters
            if "data-limits" in form.given:
                body["limits"] = form.limits
            if {"data-secret", "data-parameters", "data-no-reason"} & set(form.given):
                body.pop("reason", None)
            else:
                body.setdefault("reason", "words")
            yield Control(
                form.given.get("data-method", "POST"),
                address,
                json.dumps(body | json.loads(button.get("data-body", "{}"))),
                form.given.get("data-if-match", "1"),
            )


@dataclass(frozen=True)
class Panel:
    text: str
    acts: frozenset[str]

    @property
    def says_why(self) -> bool:
        return bool(_WHY.search(re.sub(r"<[^>]+>", " ", self.text)))

    def shows(self, act: str) -> bool:
        """What the act is about is in this panel; it may be of a project of others."""
        uid = _UID.search(act)
        return 'class="empty' not in self.text if uid is None else uid[0] in self.text


_UID = re.compile(r"[a-z]{3}_[0-9A-Z]{26}")
_WHY = re.compile(r"\b(may|own run|cannot be|belongs to)\b")


def panels_of(text: str) -> Iterator[tuple[str, Panel]]:
    for part in re.split(r'(?=<\w+[^>]* id="panel-)', text)[1:]:
        found = re.search(r'id="(panel-[\w-]+)"', part)
        assert found
        acts = frozenset(one.address for one in controls_of(part))
        yield found[1], Panel(part, acts)


def try_act(client: Client, control: Control) -> tuple[int, str]:
    """Status and code of the answer; nothing of it stays."""
    cache.clear()  # the rates of acts
    with transaction.atomic():
        answer = client.generic(
            control.method,
            control.address,
            control.body,
            content_type="application/json",
            HTTP_IDEMPOTENCY_KEY="k" * 20,
            HTTP_IF_MATCH=f'"{control.version}"',
        )
        transaction.set_rollback(True)
    code = answer.json().get("code", "") if answer.status_code >= 400 else ""
    return answer.status_code, code


@pytest.fixture
def mixed(db: None) -> World:
    """Also a project in which the roles are others than those of the accounts."""
    world = build_world(steps=60)
    make_plan(world, "digits-cnn", ["classifier.0", "classifier.4"])
    make_variants(world, "mlp_gelu_2048")
    other = Project.objects.create(name="vision")
    for name, role in (("olga", Role.VIEWER), ("vera", Role.OPERATOR), ("carl", Role.VIEWER)):
        Membership.objects.create(project=other, user=world.people[name], role=role)
    Run.objects.filter(name="topics-lm").update(project=other)
    return world


def test_what_a_page_offers_is_allowed_and_what_it_does_not_is_explained(mixed: World) -> None:
    """A panel in which one person may act says to the others why they may not."""
    panels: dict[tuple[str, str], dict[str, Panel]] = {}
    refused = []
    for who in PEOPLE:
        client = signed_in(mixed, who)
        tried: set[tuple[str, str]] = set()
        for address in pages_of(mixed):
            answer = client.get(address)
            if answer.status_code == 404:  # of a project of others
                continue
            text = answer.content.decode()
            for name, panel in panels_of(text):
                panels.setdefault((address, name), {})[who] = panel
            for control in controls_of(text):
                if (control.method, control.address) in tried:
                    continue
                tried.add((control.method, control.address))
                status, code = try_act(client, control)
                if code in NOT_ALLOWED or status >= 500:
                    refused.append(f"{who} on {address}: {control.address} {status} {code}")
        assert len(tried) > 1, who
    assert refused == []
    assert "\n".join(silent(panels)) == ""


def silent(panels: dict[tuple[str, str], dict[str, Panel]]) -> Iterator[str]:
    for (address, name), seen in panels.items():
        offered = {act for panel in seen.values() for act in panel.acts}
        for who, panel in seen.items():
            missing = {act for act in offered - panel.acts if panel.shows(act)}
            missing = {act for act in missing if not act.endswith(OF_ADMINS)}
            if missing and not panel.says_why:
                yield f"{address} {name} says nothing to {who} of {sorted(missing)}"
