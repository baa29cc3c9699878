"""Django's admin: people can be edited there, everything else is read-only."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib import admin
from django.urls import reverse

from apps.accounts.models import User
from apps.runs.models import Run

WRITABLE = {User}


def registered() -> list[Any]:
    return [model for model in admin.site._registry if model not in WRITABLE]


def test_states_and_audit_rows_are_registered_read_only() -> None:
    names = {model.__name__ for model in registered()}
    assert {"Adaptation", "AuditEvent", "Command", "Kernel", "CompileJob", "Run"} <= names


@pytest.mark.parametrize("who", ["carl", "ada"])
def test_nobody_adds_changes_or_deletes_what_services_write(world: Any, who: str) -> None:
    client = world.client(who)
    for model in registered():
        kind = f"admin:{model._meta.app_label}_{model._meta.model_name}"
        assert client.get(reverse(f"{kind}_changelist")).status_code == 200
        assert client.get(reverse(f"{kind}_add")).status_code == 403
        row = model.objects.first()
        if row is None:
            continue
        assert client.get(reverse(f"{kind}_change", args=[row.pk])).status_code == 200
        assert client.post(reverse(f"{kind}_change", args=[row.pk]), {}).status_code == 403
        assert client.post(reverse(f"{kind}_delete", args=[row.pk]), {}).status_code == 403


def test_names_cannot_turn_the_text_of_the_admin_round(world: Any) -> None:
    Run.objects.update(name="epyt\u202e\u2066digits\u200b", host="\u202e")
    run = Run.objects.first()
    assert run is not None
    for address in (
        reverse("admin:runs_run_changelist"),
        reverse("admin:runs_run_change", args=[run.pk]),
    ):
        answer = world.client("ada").get(address)
        assert answer.status_code == 200
        text = answer.content.decode()
        assert "epyt⟨U+202E⟩⟨U+2066⟩digits⟨U+200B⟩" in text
        assert not {"\u202e", "\u2066", "\u200b"} & set(text)
        if "Content-Length" in answer:
            assert int(answer["Content-Length"]) == len(answer.content)


def test_only_admins_manage_people_and_nobody_deletes_them(world: Any) -> None:
    address = reverse("admin:accounts_user_changelist")
    assert world.client("ada").get(address).status_code == 200
    assert world.client("carl").get(address).status_code == 403
    olga = world.people["olga"]
    delete = reverse("admin:accounts_user_delete", args=[olga.pk])
    assert world.client("ada").post(delete, {"post": "yes"}).status_code == 403


def test_an_admin_changes_a_role_and_the_rights_follow(world: Any) -> None:
    vera = world.people["vera"]
    form = {"username": "vera", "role": "curator", "is_active": "on"}
    answer = world.client("ada").post(reverse("admin:accounts_user_change", args=[vera.pk]), form)
    assert answer.status_code == 302
    vera.refresh_from_db()
    assert (vera.role, vera.is_staff, vera.is_superuser) == ("curator", True, False)


@pytest.mark.parametrize("who", ["vera", "rafi", "olga"])
def test_others_do_not_get_into_the_admin(world: Any, who: str) -> None:
    assert world.client(who).get("/admin/").status_code == 302


def test_plurals_are_english() -> None:
    plurals = [str(model._meta.verbose_name_plural) for model in admin.site._registry]
    assert [word for word in plurals if re.search(r"[^aeiou]ys$|(ch|sh|x)s$", word)] == []
