"""Which rows a request may see: those of the projects of whoever asks. Pages, API, admin, exports.

The default manager of every model with rows of a run is :class:`InProjects`. During a request it
finds only rows of the caller's projects, so that a new page or route cannot forget it: what is
foreign does not exist there, and answers 404. Workers, trainers' calls and Tamiyo see everything;
so does a service, once the object it acts on has been found within the caller's projects.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from asgiref.sync import iscoroutinefunction
from django.apps import apps
from django.db import models
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils.decorators import sync_and_async_middleware

# The keys of projects; None: all of them.
Projects = frozenset[int] | None
Find = Callable[[], Projects]
_M = TypeVar("_M", bound=models.Model)
_present: ContextVar[Find | None] = ContextVar("visible_projects", default=None)


def visible_projects() -> Projects:
    """The projects that the present request may see; None: all, or it is no request."""
    find = _present.get()
    return None if find is None else find()


def limit_to(find: Find | None) -> None:
    """For the rest of this request."""
    _present.set(find)


@contextmanager
def limited_to(find: Find | None) -> Iterator[None]:
    """For a block."""
    token = _present.set(find)
    try:
        yield
    finally:
        _present.reset(token)


@contextmanager
def everything() -> Iterator[None]:
    """For what keeps an invariant over all projects: places on a host, kernels in use, a kill."""
    with limited_to(None):
        yield


class InProjects(models.Manager[_M]):
    """The model says by ``visible_in`` which of its rows belong to some projects."""

    def get_queryset(self) -> QuerySet[_M]:
        rows = super().get_queryset()
        projects = visible_projects()
        if projects is None:
            return rows
        model: Any = self.model
        return rows.filter(model.visible_in(projects))


def of_projects(projects: frozenset[int]) -> Q:
    """Of a row with its own ``project``."""
    return Q(project__in=projects)


def of_run(projects: frozenset[int]) -> Q:
    """Of a row with a ``run``. By a subquery: a join could be neither locked nor updated."""
    return Q(run__in=runs_in(projects))


def of_run_or_none(projects: frozenset[int]) -> Q:
    """As ``of_run``; a row without a run is about the whole server."""
    return Q(run=None) | of_run(projects)


def of_adaptation(projects: frozenset[int]) -> Q:
    """Of a row with an ``adaptation``."""
    return Q(adaptation__run__in=runs_in(projects))


def of_run_uid(projects: frozenset[int]) -> Q:
    """Of a row that holds the uid of a run."""
    return Q(run_uid__in=runs_in(projects).values("uid"))


def runs_in(projects: frozenset[int]) -> QuerySet[Any]:
    """All runs of some projects. By the model's name: apps below ``runs`` ask too."""
    return apps.get_model("runs", "Run")._base_manager.filter(project__in=projects)


def runs_in_project(uid: str) -> QuerySet[Any]:
    """Those of one project that the present request may see."""
    return apps.get_model("runs", "Run")._default_manager.filter(project__uid=uid)


def sees(projects: Projects, model: str, uid: str) -> bool:
    """Whether a run or a launch (by the model's name) is in one of these projects."""
    return projects is None or projects_of_rows(model, [uid]).get(uid) in projects


def projects_of_rows(model: str, uids: Collection[str]) -> dict[str, int]:
    """The project of each of these runs, or launches (by the model's name), that exists."""
    if not uids:
        return {}
    rows = apps.get_model({"Run": "runs", "Launch": "recipes"}[model], model)._base_manager
    return dict(rows.filter(uid__in=uids).values_list("uid", "project"))


def _of_session(request: HttpRequest) -> Find:
    """Of a browser's session; a token replaces it when the API has identified its owner."""

    def find() -> Projects:
        access = getattr(request.user, "access", None)
        return access.limit if access is not None else frozenset()

    return find


@sync_and_async_middleware
def visibility_middleware(get_response: Any) -> Any:
    """Limit each request to what its session may see; nobody is signed in: nothing."""
    if iscoroutinefunction(get_response):

        async def answer_async(request: HttpRequest) -> Any:
            with limited_to(_of_session(request)):
                return await get_response(request)

        return answer_async

    def answer(request: HttpRequest) -> Any:
        with limited_to(_of_session(request)):
            return get_response(request)

    return answer
