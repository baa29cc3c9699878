"""Records what the apps below the audit log report."""

from __future__ import annotations

from typing import Any

from apps.accounts.actors import Actor
from apps.accounts.signals import account_changed
from apps.audit.services import record


def record_account_change(
    sender: type[Any], *, actor: Actor, act: str, object_kind: str, object_uid: str, **event: Any
) -> None:
    """One audit event for each issued or revoked token and each new person."""
    record(
        actor=actor,
        act=act,
        object_kind=object_kind,
        object_uid=object_uid,
        run_uid=event.get("run_uid", ""),
        data=event.get("data"),
    )


def connect() -> None:
    """Called once, when the app is ready; connecting twice changes nothing."""
    account_changed.connect(record_account_change, dispatch_uid="audit.record_account_change")
