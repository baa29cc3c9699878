"""Which topics there are, and who may watch them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from apps.accounts.models import Access
from apps.accounts.policy import Act, Permission, may
from apps.accounts.visibility import sees
from apps.notifications.services import INBOX_TOPIC, SYSTEM_TOPIC

if TYPE_CHECKING:
    from django.contrib.auth.models import AnonymousUser

    from apps.accounts.models import User

TOPICS = "run:<uid>, launch:<uid>, inbox or system; of a project inbox:<key> or system:<key>"
_NO_TOPIC = Permission(False, "no-such-topic", "There is no such topic.")
_OBJECT_TOPIC = re.compile(r"(?P<kind>run|launch):(?P<uid>(run|lau)_[0-9A-Z]{26})")
_PROJECT_TOPIC = re.compile(r"(?:inbox|system):([1-9][0-9]{0,17})", re.ASCII)


def watch_permission(user: User | AnonymousUser, topic: str) -> Permission:
    """May ``user`` watch ``topic``? The same right as reading the same thing over REST.

    What the person does not see does not exist.
    """
    permission = may(user, Act.VIEW)
    if not permission.allowed or topic in {INBOX_TOPIC, SYSTEM_TOPIC}:
        return permission
    access: Access = user.access  # type: ignore[union-attr]  # signed in: it may view
    if of_project := _PROJECT_TOPIC.fullmatch(topic):
        return permission if int(of_project[1]) in access.roles else _NO_TOPIC
    if not (of_object := _OBJECT_TOPIC.fullmatch(topic)):
        return _NO_TOPIC
    model = "Run" if of_object["kind"] == "run" else "Launch"
    return permission if sees(access.limit, model, of_object["uid"]) else _NO_TOPIC


def recheck(user: User | AnonymousUser, topic: str) -> Permission:
    """As ``watch_permission``, by the projects that the person has now."""
    for name in ("access", "has_one_project"):
        vars(user).pop(name, None)
    return watch_permission(user, topic)
