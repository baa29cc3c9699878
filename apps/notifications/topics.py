"""Which topics there are, and who may watch them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from apps.accounts.policy import Act, Permission, may
from apps.notifications.services import INBOX_TOPIC, SYSTEM_TOPIC

if TYPE_CHECKING:
    from django.contrib.auth.models import AnonymousUser

    from apps.accounts.models import User

TOPICS = "run:<uid>, launch:<uid>, inbox or system"
_OBJECT_TOPIC = re.compile(r"(run:run|launch:lau)_[0-9A-Z]{26}")


def watch_permission(user: User | AnonymousUser, topic: str) -> Permission:
    """May ``user`` watch ``topic``? The same right as reading the same thing over REST."""
    if topic not in {INBOX_TOPIC, SYSTEM_TOPIC} and not _OBJECT_TOPIC.fullmatch(topic):
        return Permission(False, "no-such-topic", "There is no such topic.")
    return may(user, Act.VIEW)
