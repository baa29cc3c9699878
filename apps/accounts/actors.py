"""Who did something: a person, or a part of the system."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apps.accounts.models import User


class ActorKind(StrEnum):
    PERSON = "person"
    RULE = "rule"
    TAMIYO = "tamiyo"
    TRAINER = "trainer"
    WORKER = "worker"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Actor:
    kind: ActorKind
    name: str
    via: str = ""  # "session", "token esp_ab12…", empty for the system itself

    @classmethod
    def person(cls, user: User, *, via: str = "") -> Actor:
        return cls(ActorKind.PERSON, user.get_username(), via)


SYSTEM = Actor(ActorKind.SYSTEM, "system")
