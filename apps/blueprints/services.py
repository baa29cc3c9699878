"""The catalogue: synchronised from the code, switched on and off by curators."""

from __future__ import annotations

from typing import Any

from django.db import models, transaction
from django.db.models import F

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.audit.services import record
from apps.blueprints.models import Blueprint, KnownRemedy
from apps.blueprints.offered import Rows, offered
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.rest.problems import Problem


@transaction.atomic
def sync_catalogue() -> list[str]:
    """Update both tables from the installed code; return the slugs that changed."""
    changed = _sync(Blueprint.objects, offered().blueprints) + sync_remedies()
    if changed:
        record(
            actor=SYSTEM,
            act="catalogue.synced",
            object_kind="catalogue",
            object_uid="blueprints",
            data={"changed": changed},
        )
    return changed


def sync_remedies() -> list[str]:
    """As :func:`sync_catalogue`, for the remedies alone."""
    return _sync(KnownRemedy.objects, offered().remedies)


def _sync(table: models.Manager[Any], offered_rows: Rows) -> list[str]:
    rows = {row.slug: row for row in table.all()}
    changed = []
    for slug, offer in offered_rows.items():
        values = offer | {"present": True}
        row = rows.get(slug)
        if row is None or any(getattr(row, name) != value for name, value in values.items()):
            table.update_or_create(slug=slug, defaults=values)
            changed.append(slug)
    table.exclude(slug__in=list(offered_rows)).update(present=False)
    return changed


@transaction.atomic
def switch_blueprint(
    *, blueprint: Blueprint, enabled: bool, user: User, via: str, reason: str
) -> Blueprint:
    """Allow or forbid a blueprint from the next decision on.

    Raises:
        Problem: not allowed, or no reason for switching it off.
    """
    permission = may(user, Act.SWITCH_BLUEPRINT)
    if not permission.allowed:
        raise Problem(403, permission.code, permission.why)
    if not enabled and not reason.strip():
        raise Problem(422, "reason-required", "Say why this blueprint must not be used.")
    Blueprint.objects.filter(pk=blueprint.pk).update(
        enabled=enabled,
        disabled_reason="" if enabled else reason.strip(),
        revision=F("revision") + 1,
    )
    blueprint.refresh_from_db()
    act = "blueprint.enabled" if enabled else "blueprint.disabled"
    record(
        actor=Actor.person(user, via=via),
        act=act,
        object_kind="blueprint",
        object_uid=blueprint.slug,
        reason=reason,
    )
    publish(topic=SYSTEM_TOPIC, type=act, data={"blueprint": blueprint.slug})
    return blueprint
