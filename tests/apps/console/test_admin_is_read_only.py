"""Django's admin: services edit people and reference data there; the rest is read-only."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib import admin
from django.urls import reverse

from apps.accounts.models import Membership, Project, User
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.policies.models import PolicyVersion
from apps.policies.services import current_policy
from apps.runs.models import Run

# What is edited there, each through a service.
WRITABLE = {User, Blueprint, PolicyVersion, Project, Membership}


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


def _admin(model: Any, view: str, *args: Any) -> str:
    return reverse(f"admin:{model._meta.app_label}_{model._meta.model_name}_{view}", args=args)


def test_nobody_deletes_reference_data_and_viewers_of_the_admin_do_not_edit_it(world: Any) -> None:
    Membership.objects.create(
        project=Project.objects.create(name="vision"), user=world.people["carl"], role="admin"
    )
    for model in WRITABLE - {User}:
        row = model.objects.first()
        assert row is not None
        assert world.client("ada").post(_admin(model, "delete", row.pk), {}).status_code == 403
    for model in (Project, Membership):
        row = model.objects.first()
        assert world.client("carl").get(_admin(model, "add")).status_code == 403
        assert world.client("carl").post(_admin(model, "change", row.pk), {}).status_code == 403


def test_a_curator_switches_a_blueprint_with_a_reason_through_the_service(world: Any) -> None:
    carl, row = world.client("carl"), Blueprint.objects.get(slug="mlp_gelu_2048")
    address = _admin(Blueprint, "change", row.pk)
    page = carl.get(address).content.decode()
    assert 'href="/blueprints/mlp_gelu_2048"' in page  # the link into the console
    assert f'href="{address}"' in carl.get("/blueprints/mlp_gelu_2048").content.decode()
    refused = carl.post(address, {"disabled_reason": ""})
    assert "Say why this blueprint must not be used." in refused.content.decode()
    assert carl.post(address, {"disabled_reason": "too slow"}).status_code == 302
    row.refresh_from_db()
    assert (row.enabled, row.disabled_reason) == (False, "too slow")
    event = AuditEvent.objects.filter(act="blueprint.disabled").latest("id")
    assert (event.actor, event.reason) == ("carl", "too slow")
    action = {"action": "switch_on", "_selected_action": [row.pk]}
    carl.post(_admin(Blueprint, "changelist"), action)
    row.refresh_from_db()
    assert row.enabled
    off = {"action": "switch_off", "_selected_action": [row.pk]}
    answer = carl.post(_admin(Blueprint, "changelist"), off, follow=True)
    assert "Say why" in answer.content.decode()
    row.refresh_from_db()
    assert row.enabled


def test_a_curator_writes_a_policy_version_in_the_admin(world: Any) -> None:
    carl, before = world.client("carl"), current_policy()
    address = _admin(PolicyVersion, "add")
    form = {
        name: field.initial
        for name, field in carl.get(address).context["adminform"].form.fields.items()
        if name != "reason"
    }
    same = carl.post(address, {**form, "reason": "why not"})
    assert "All values are the same" in same.content.decode()
    stricter = {**form, "confidence_auto": 0.9, "reason": "more care"}
    answer = carl.post(address, stricter)
    assert answer.status_code == 302, answer.context["errors"]
    now = current_policy()
    assert (now.version, now.values["confidence_auto"]) == (before.version + 1, 0.9)
    assert (now.author.username, now.reason, now.own.keys()) == (
        "carl",
        "more care",
        {*before.own, "confidence_auto"},
    )
    assert carl.post(_admin(PolicyVersion, "change", now.pk), {}).status_code == 403


def test_an_admin_makes_a_project_and_gives_a_role_in_it(world: Any) -> None:
    ada, vera = world.client("ada"), world.people["vera"]
    assert ada.post(_admin(Project, "add"), {"name": "vision"}).status_code == 302
    project = Project.objects.get(name="vision")
    form = {"project": project.pk, "user": vera.pk, "role": "operator"}
    assert ada.post(_admin(Membership, "add"), form).status_code == 302
    member = Membership.objects.get(project=project, user=vera)
    assert member.role == "operator"
    change = _admin(Membership, "change", member.pk)
    assert ada.post(change, {"role": "viewer"}).status_code == 302
    member.refresh_from_db()
    assert member.role == "viewer"
    acts = AuditEvent.objects.filter(object_uid=project.uid).values_list("act", flat=True)
    assert sorted(acts) == ["project.created", "project.member_set", "project.member_set"]
