"""An approver's change of an adaptation's settings, before they approve it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from django.db.models import F

from apps.accounts.actors import Actor
from apps.adaptations.binding import shown_hash
from apps.adaptations.models import Adaptation
from apps.adaptations.proposals import GateClosedError
from apps.adaptations.rechecking import checks_now
from apps.adaptations.remedy_proposals import known_remedy
from apps.audit.services import record
from apps.rest.problems import Problem


def editable_settings(adaptation: Adaptation) -> dict[str, Any]:
    """The settings that an approver may change, with their values."""
    if adaptation.remedy:
        return dict(adaptation.config)
    return {name: value for name, value in adaptation.config.items() if _is_size(value)}


def edit_settings(adaptation: Adaptation, settings: Mapping[str, Any], actor: Actor) -> None:
    """Change settings of an adaptation that waits, and check every gate again.

    A number of a graft may only become smaller, because its cost was judged with the larger one;
    its kernel is forecast and measured with the new one. Must run inside a transaction.

    Raises:
        GateClosedError: a hard gate does not pass now.
        Problem: 422, there is no such setting, or the value does not fit.
    """
    changes = {
        name: value
        for name, value in settings.items()
        if name not in adaptation.config or adaptation.config[name] != value
    }
    if not changes:
        return
    before = {name: adaptation.config.get(name) for name in changes}
    if adaptation.remedy:
        remedy = known_remedy(adaptation.run, adaptation.remedy, adaptation.layer, changes)
        adaptation.config = {**adaptation.config, **changes}
        adaptation.in_words = remedy.in_words(adaptation.config)
    else:
        for name, value in changes.items():
            _check_smaller(adaptation, name, value)
        adaptation.config = {**adaptation.config, **changes}
        adaptation.variant = None  # it has a size of its own now
    checks = checks_now(adaptation)
    closed = [check for check in checks if check.blocks]
    if closed:
        raise GateClosedError(closed)
    adaptation.edited = {name: [before[name], value] for name, value in changes.items()}
    adaptation.checks = [asdict(check) for check in checks]
    adaptation.evidence_hash = shown_hash(adaptation)
    _write(adaptation)
    record(
        actor=actor,
        act="adaptation.edited",
        object_kind="adaptation",
        object_uid=adaptation.uid,
        run_uid=adaptation.run.uid,
        data={"before": before, "after": changes, "evidence_hash": adaptation.evidence_hash},
    )


def _write(adaptation: Adaptation) -> None:
    Adaptation.objects.filter(pk=adaptation.pk, version=adaptation.version).update(
        version=F("version") + 1,
        config=adaptation.config,
        variant=adaptation.variant,
        in_words=adaptation.in_words,
        edited=adaptation.edited,
        checks=adaptation.checks,
        evidence_hash=adaptation.evidence_hash,
    )
    adaptation.refresh_from_db()


def _is_size(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _check_smaller(adaptation: Adaptation, name: str, value: Any) -> None:
    proposed = adaptation.config.get(name)
    if not _is_size(proposed):
        known = ", ".join(sorted(editable_settings(adaptation))) or "none"
        raise Problem(
            422,
            "invalid",
            f"{name!r} of {adaptation.slug} cannot be changed; what can be is: {known}.",
        )
    whole = isinstance(proposed, int) and not isinstance(value, int)
    if not _is_size(value) or whole or value > proposed:
        kind = "a whole number" if isinstance(proposed, int) else "a number"
        raise Problem(
            422,
            "invalid",
            f"{name} must be {kind} above 0 and at most {proposed}: a graft may only become "
            "smaller than it was proposed.",
        )
