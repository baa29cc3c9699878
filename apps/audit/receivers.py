"""Records what the apps below the audit log report."""

from __future__ import annotations

from typing import Any

from django.contrib.auth.signals import user_logged_out

from apps.accounts.actors import Actor
from apps.accounts.models import User
from apps.accounts.signals import account_changed
from apps.audit.services import note_sign_out, record


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
        reason=event.get("reason", ""),
        data=event.get("data"),
    )


def record_sign_out(sender: type[Any], *, user: User | None, **_: Any) -> None:
    """From whichever page; signing out without a session changes nothing."""
    if user is not None and user.is_authenticated:
        note_sign_out(user)


def connect() -> None:
    """Called once, when the app is ready; connecting twice changes nothing."""
    account_changed.connect(record_account_change, dispatch_uid="audit.record_account_change")
    user_logged_out.connect(record_sign_out, dispatch_uid="audit.record_sign_out")
