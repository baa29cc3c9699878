"""The catalogue: synchronised from the code, switched on and off by curators."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import F

from apps.accounts.actors import SYSTEM, Actor
from apps.accounts.models import User
from apps.accounts.policy import Act, may
from apps.audit.services import record
from apps.blueprints.models import Blueprint, KnownRemedy
from apps.notifications.services import SYSTEM_TOPIC, publish
from apps.rest.problems import Problem


@transaction.atomic
def sync_catalogue() -> list[str]:
    """Update both tables from the installed code; return the slugs that changed.

    Imports torch, so it runs in workers and in set-up, never in a web process.
    """
    from esper.blueprints import list_blueprints

    changed = []
    offered = list_blueprints()
    for blueprint in offered:
        values: dict[str, Any] = {
            "ident": blueprint.id,
            "title": blueprint.title,
            "category": blueprint.category,
            "kind": blueprint.kind,
            "adaptation_type": blueprint.adaptation_type,
            "risk": blueprint.risk,
            "mergeable": blueprint.mergeable,
            "idea": blueprint.idea,
            "source": blueprint.source,
            "when": blueprint.when,
            "conflicts": sorted(blueprint.conflicts),
            "requires": sorted(blueprint.requires),
            "tunes": list(blueprint.tunes),
            "version": blueprint.version,
            "present": True,
        }
        row = Blueprint.objects.filter(slug=blueprint.slug).first()
        if row is None or any(getattr(row, name) != value for name, value in values.items()):
            Blueprint.objects.update_or_create(slug=blueprint.slug, defaults=values)
            changed.append(blueprint.slug)
    slugs = [blueprint.slug for blueprint in offered]
    Blueprint.objects.exclude(slug__in=slugs).update(present=False)
    changed += sync_remedies()
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
    from esper.remedies import list_remedies

    changed = []
    offered = list_remedies()
    for remedy in offered:
        values: dict[str, Any] = {
            "title": remedy.title,
            "phrase": remedy.phrase or remedy.title,
            "idea": remedy.idea,
            "source": remedy.source,
            "when": remedy.when,
            "risk": remedy.risk,
            "changes_weights": remedy.changes_weights,
            "stays": remedy.stays,
            "asks": remedy.asks,
            "scope": remedy.scope,
            "settings": remedy.default_config(),
            "present": True,
        }
        row = KnownRemedy.objects.filter(slug=remedy.slug).first()
        if row is None or any(getattr(row, name) != value for name, value in values.items()):
            KnownRemedy.objects.update_or_create(slug=remedy.slug, defaults=values)
            changed.append(remedy.slug)
    slugs = [remedy.slug for remedy in offered]
    KnownRemedy.objects.exclude(slug__in=slugs).update(present=False)
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
