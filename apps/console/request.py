"""What every page reads from its request: the person, and the choices in the address."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from django.contrib.auth.decorators import login_required
from django.http import Http404, HttpRequest, HttpResponse
from django.views.decorators.cache import never_cache
from django.views.decorators.http import require_safe

from apps.accounts.models import Project, User
from apps.accounts.projects import projects_of

P = ParamSpec("P")
E = TypeVar("E", bound=StrEnum)
_View = Callable[Concatenate[HttpRequest, P], HttpResponse]


def page(view: _View[P]) -> _View[P]:
    """Require a signed-in person and GET, and forbid caching: a page shows live data."""

    @wraps(view)
    def shown(request: HttpRequest, /, *args: P.args, **kwargs: P.kwargs) -> HttpResponse:
        return view(request, *args, **kwargs)

    return login_required(require_safe(never_cache(shown)))


def person(request: HttpRequest) -> User:
    if not isinstance(request.user, User):
        raise TypeError("a page needs a signed-in person")
    return request.user


def choice(request: HttpRequest, name: str, words: type[E], default: E | None = None) -> str:
    """The value of a filter in the address; an unknown value answers 404."""
    value = request.GET.get(name, "")
    if not value:
        return str(default) if default else ""
    if value not in set(words):
        raise Http404(f"there is no {name} {value!r}")
    return value


def project_choices(user: User) -> list[Project]:
    """For the filter by project; empty where the person sees one project only."""
    several = len(user.access.roles) > 1
    return list(projects_of(user).order_by("name")) if several else []


def page_number(request: HttpRequest) -> int:
    text = request.GET.get("page", "1")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 1
