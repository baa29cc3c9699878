"""Which sockets may stay open, and on which topics: for all of them by a few queries."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from django.utils.crypto import constant_time_compare

from apps.accounts.models import User, accesses_of
from apps.accounts.policy import Permission
from apps.accounts.services import projects_of_tokens
from apps.accounts.sessions import SignIn, live_sign_ins
from apps.accounts.step_up import demands_second_factor
from apps.notifications.tickets import Holder
from apps.notifications.topics import projects_of_topics, watch_permission


@dataclass(frozen=True, slots=True)
class Rights:
    """Of whoever holds a socket now."""

    user: User
    permissions: dict[str, Permission]


def rights_of(asked: Mapping[Holder, Collection[str]]) -> dict[Holder, Rights]:
    """Who is still signed in, with the answer for each topic that was asked about.

    The number of queries depends neither on how many sockets there are nor on their topics.
    """
    people = _people_of(asked)
    projects: dict[str, int] | None = None
    if any(person.access.limit is not None for person in people.values()):
        projects = projects_of_topics({topic for topics in asked.values() for topic in topics})
    return {
        holder: Rights(
            person,
            {topic: watch_permission(person, topic, projects) for topic in asked[holder]},
        )
        for holder, person in people.items()
    }


def _people_of(holders: Collection[Holder]) -> dict[Holder, User]:
    people = User.objects.in_bulk({holder.user_id for holder in holders})
    sign_ins = live_sign_ins({holder.session_key for holder in holders if holder.session_key})
    tokens = projects_of_tokens({holder.token_id for holder in holders if holder.token_id})
    accesses = accesses_of(list(people.values()))
    found: dict[Holder, User] = {}
    for holder in holders:
        known = people.get(holder.user_id)
        if known is None or not known.is_active:
            continue
        person = copy.copy(known)  # a token of one project sees less
        person.access = accesses[person.pk]
        if holder.session_key and not _holds(sign_ins.get(holder.session_key), person):
            continue
        if holder.token_id is not None and holder.token_id not in tokens:
            continue
        person.bound_to = tokens.get(holder.token_id) if holder.token_id is not None else None
        person.access = person.access.within(person.bound_to)
        found[holder] = person
    return found


def _holds(sign_in: SignIn | None, person: User) -> bool:
    """A session is of one person, ends when the password changes, and has given the second factor
    where one is demanded."""
    if sign_in is None or sign_in.user_id != str(person.pk):
        return False
    if not sign_in.second_factor and demands_second_factor(person):
        return False
    hashes = [person.get_session_auth_hash(), *person.get_session_auth_fallback_hash()]
    return any(constant_time_compare(sign_in.auth_hash, known) for known in hashes)
