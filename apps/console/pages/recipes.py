"""Recipes, one recipe with its launches, and one launch with its log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.http import Http404, HttpRequest, HttpResponse
from django.utils.translation import gettext as _

from apps.accounts.policy import Act, may
from apps.console.panels import Panel, render_page
from apps.console.request import page, person, project_choices
from apps.notifications.services import launch_topic
from apps.recipes.models import Launch, LogChunk, Recipe
from apps.recipes.selectors import LogPage, launches
from apps.recipes.selectors import recipes as all_recipes
from apps.recipes.services import host_queue
from apps.runs.models import Run
from apps.workers.services import queue_is_served

LAUNCHES_SHOWN = 50
LOG_SHOWN_BYTES = 64 * 1024


@page
def recipes(request: HttpRequest) -> HttpResponse:
    events = ("recipe", "launch.changed")
    panels = [
        Panel(
            "recipes",
            _("Available recipes"),
            "console/recipes/list.html",
            lambda: {"rows": recipe_rows()},
            events,
            every=15,
        ),
        Panel(
            "launches",
            _("Launches"),
            "console/recipes/launches.html",
            lambda: {"launches": recent_launches()},
            events,
            every=30,
        ),
    ]
    return render_page(
        request,
        "console/simple.html",
        title=_("Recipes"),
        panels=panels,
        intro=_("Trainings that this server can start, and those that it has started."),
    )


@page
def recipe(request: HttpRequest, uid: str) -> HttpResponse:
    found = get_recipe(uid)
    if found is None:
        raise Http404("there is no such recipe")
    may_start = may(person(request), Act.START_RECIPE)
    places = project_choices(person(request))
    projects = [one for one in places if may(person(request), Act.CREATE_RUN, of=one).allowed]

    def about() -> dict[str, Any]:
        fresh = get_recipe(uid)
        return {
            "recipe": fresh,
            "row": fresh and row_of(fresh),
            "parameters": [(p, p["default"]) for p in fresh.parameters] if fresh else [],
            "may_start": may_start,
            "projects": projects,
        }

    panels = [
        Panel("about", found.name, "console/recipes/about.html", about, ("recipe",), every=15),
        Panel(
            "launches",
            _("Launches of this recipe"),
            "console/recipes/launches.html",
            lambda: {"launches": recent_launches(found)},
            ("launch.changed",),
            every=30,
        ),
    ]
    return render_page(request, "console/simple.html", title=found.name, panels=panels)


@page
def launch(request: HttpRequest, uid: str) -> HttpResponse:
    found = get_launch(uid)
    if found is None:
        raise Http404("there is no such launch")
    user = person(request)

    def head() -> dict[str, Any]:
        return {
            "run": run_of(found),
            "may_stop": may(user, Act.STOP_LAUNCH, of=found),
            "may_start": may(user, Act.START_RECIPE),
        }

    panels = [
        Panel(
            "head", _("Launch"), "console/recipes/launch.html", head, ("launch.changed",), every=5
        ),
        Panel(
            "log",
            _("Log"),
            "console/recipes/log.html",
            lambda: {"log": last_lines(found)},
        ),
    ]
    return render_page(
        request,
        "console/launch.html",
        title=f"L-{found.number} {found.recipe.name}",
        panels=panels,
        topics=[launch_topic(found.uid)],
        launch=found,
    )


@dataclass(frozen=True, slots=True)
class RecipeRow:
    """``up``: a worker on its host serves the queue, so the recipe can be started now."""

    recipe: Recipe
    up: bool
    live: tuple[Launch, ...] = ()


def recipe_rows() -> list[RecipeRow]:
    found = list(all_recipes())
    up = {host: queue_is_served(host_queue(host)) for host in {recipe.host for recipe in found}}
    live = list(launches().filter(ended_at=None))
    return [
        RecipeRow(
            recipe,
            up[recipe.host],
            tuple(launch for launch in live if launch.recipe_id == recipe.pk),
        )
        for recipe in found
    ]


def row_of(recipe: Recipe) -> RecipeRow:
    return RecipeRow(recipe, queue_is_served(host_queue(recipe.host)))


def get_recipe(uid: str) -> Recipe | None:
    return Recipe.objects.filter(uid=uid).first()


def get_launch(uid: str) -> Launch | None:
    return launches().filter(uid=uid).first()


def recent_launches(recipe: Recipe | None = None) -> list[Launch]:
    found = launches() if recipe is None else launches().filter(recipe=recipe)
    return list(found[:LAUNCHES_SHOWN])


def run_of(launch: Launch) -> Run | None:
    """None until its trainer has registered a run."""
    return Run.objects.filter(uid=launch.run_uid).first()


def last_lines(launch: Launch) -> LogPage:
    """The end of the log so far; the page fetches what follows it."""
    chunks: list[LogChunk] = []
    for chunk in LogChunk.objects.filter(launch=launch).order_by("-offset").iterator():
        if chunks and launch.log_end - chunk.offset > LOG_SHOWN_BYTES:
            break
        chunks.insert(0, chunk)
    if not chunks:
        return LogPage(launch.log_end, launch.log_end, "")
    end = chunks[-1].offset + chunks[-1].length
    return LogPage(chunks[0].offset, end, "".join(chunk.text for chunk in chunks))
