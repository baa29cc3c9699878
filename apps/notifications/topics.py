"""Which topics there are, and who may watch them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from apps.accounts.models import Access
from apps.accounts.policy import Act, Permission, may
from apps.accounts.visibility import projects_of_rows
from apps.notifications.services import INBOX_TOPIC, SYSTEM_TOPIC

if TYPE_CHECKING:
    from django.contrib.auth.models import AnonymousUser

    from apps.accounts.models import User

TOPICS = "run:<uid>, launch:<uid>, inbox or system; of a project inbox:<key> or system:<key>"
_NO_TOPIC = Permission(False, "no-such-topic", "There is no such topic.")
_OBJECT_TOPIC = re.compile(r"(run|launch):(run|lau)_[0-9A-Z]{26}")
_PROJECT_TOPIC = re.compile(r"(?:inbox|system):([1-9][0-9]{0,17})", re.ASCII)


def watch_permission(
    user: User | AnonymousUser, topic: str, projects: Mapping[str, int] | None = None
) -> Permission:
    """May ``user`` watch ``topic``? The same right as reading the same thing over REST.

    What the person does not see does not exist.

    Args:
        projects: of ``projects_of_topics``, where they were read for many topics at once.
    """
    permission = may(user, Act.VIEW)
    if not permission.allowed or topic in {INBOX_TOPIC, SYSTEM_TOPIC}:
        return permission
    access: Access = user.access  # type: ignore[union-attr]  # signed in: it may view
    if of_project := _PROJECT_TOPIC.fullmatch(topic):
        return permission if int(of_project[1]) in access.roles else _NO_TOPIC
    if not _OBJECT_TOPIC.fullmatch(topic):
        return _NO_TOPIC
    if access.limit is None:
        return permission
    found = projects_of_topics([topic]) if projects is None else projects
    return permission if found.get(topic) in access.limit else _NO_TOPIC


def projects_of_topics(topics: Collection[str]) -> dict[str, int]:
    """The project of each topic of a run or a launch that exists."""
    found: dict[str, int] = {}
    for kind, model in (("run", "Run"), ("launch", "Launch")):
        uids = {topic.partition(":")[2] for topic in topics if topic.startswith(f"{kind}:")}
        rows = projects_of_rows(model, uids)
        found |= {f"{kind}:{uid}": project for uid, project in rows.items()}
    return found


def recheck(user: User | AnonymousUser, topic: str) -> Permission:
    """As ``watch_permission``, by the projects that the person has now."""
    for name in ("access", "has_one_project"):
        vars(user).pop(name, None)
    return watch_permission(user, topic)
