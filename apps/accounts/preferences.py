"""How a person wants the pages to be, and the views of lists that they have saved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any
from zoneinfo import available_timezones

from django.conf import settings

from apps.accounts.models import User
from apps.rest.problems import Problem

THEMES = ("", "light", "dark")  # empty: as the system
DENSITIES = ("", "compact")  # empty: comfortable
MAX_VIEWS = 40
LONGEST_NAME, LONGEST_QUERY = 60, 500


@dataclass(frozen=True, slots=True)
class SavedView:
    """A list with its filters, under a name: ``path`` and the ``query`` of its address."""

    name: str
    path: str
    query: str

    @property
    def address(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path


@dataclass(frozen=True, slots=True)
class Preferences:
    """Empty texts leave a choice to the browser or the system.

    Attributes:
        language: of the pages, as in ``settings.LANGUAGES``.
        zone: name of a time zone, such as Europe/Berlin.
        keys: single-key shortcuts are on.
        notify: an open page tells the system of decisions that wait.
    """

    language: str = ""
    zone: str = ""
    theme: str = ""
    density: str = ""
    keys: bool = True
    notify: bool = False
    views: tuple[SavedView, ...] = ()


def preferences_of(user: User) -> Preferences:
    """A person's choices; the defaults for what they have not chosen."""
    kept: dict[str, Any] = dict(user.preferences)
    views = tuple(SavedView(**view) for view in kept.pop("views", ()))
    return Preferences(**kept, views=views)


def save_settings(
    user: User, *, language: str, zone: str, theme: str, density: str, keys: bool, notify: bool
) -> None:
    """Raises ``Problem`` 422 for a choice that there is not."""
    if language and language not in dict(settings.LANGUAGES):
        raise Problem(422, "invalid", f"There is no language called {language!r}.")
    if zone and zone not in time_zones():
        raise Problem(422, "invalid", f"There is no time zone called {zone!r}.")
    if theme not in THEMES or density not in DENSITIES:
        raise Problem(422, "invalid", "There is no such theme or density.")
    _keep(
        user,
        language=language,
        zone=zone,
        theme=theme,
        density=density,
        keys=keys,
        notify=notify,
    )


def save_view(user: User, view: SavedView) -> None:
    """Add a view; one of the same name and page is replaced.

    Raises:
        Problem: no name, too long, or too many (422).
    """
    name = view.name.strip()
    if not name or len(name) > LONGEST_NAME or len(view.query) > LONGEST_QUERY:
        raise Problem(422, "invalid", f"A view has a name of at most {LONGEST_NAME} letters.")
    others = [
        one for one in preferences_of(user).views if (one.name, one.path) != (name, view.path)
    ]
    if len(others) >= MAX_VIEWS:
        raise Problem(422, "invalid", f"You have {MAX_VIEWS} views already; remove one.")
    _keep_views(user, (*others, SavedView(name, view.path, view.query)))


def remove_view(user: User, *, name: str, path: str) -> None:
    """Nothing happens where there is none of that name."""
    views = preferences_of(user).views
    _keep_views(user, tuple(one for one in views if (one.name, one.path) != (name, path)))


@cache
def time_zones() -> tuple[str, ...]:
    """Names that a person may choose."""
    return tuple(sorted(name for name in available_timezones() if "/" in name or name == "UTC"))


def _keep_views(user: User, views: tuple[SavedView, ...]) -> None:
    _keep(user, views=[{"name": v.name, "path": v.path, "query": v.query} for v in views])


def _keep(user: User, **chosen: Any) -> None:
    user.preferences = {**user.preferences, **chosen}
    User.objects.filter(pk=user.pk).update(preferences=user.preferences)
