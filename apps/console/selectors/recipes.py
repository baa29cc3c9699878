"""Recipes by host, launches, and the end of a launch's log."""

from __future__ import annotations

from dataclasses import dataclass

from apps.kernels.services import queue_is_served
from apps.recipes.models import Launch, LogChunk, Recipe
from apps.recipes.selectors import LogPage, launches, recipes
from apps.recipes.services import host_queue
from apps.runs.models import Run

LAUNCHES_SHOWN = 50
LOG_SHOWN_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class RecipeRow:
    """``up``: a worker of its host listens, so that it can be started now."""

    recipe: Recipe
    up: bool
    live: tuple[Launch, ...] = ()


def recipe_rows() -> list[RecipeRow]:
    found = list(recipes())
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
    """None as long as its trainer has not registered."""
    return Run.objects.filter(uid=launch.run_uid).first()


def launch_of(run: Run) -> Launch | None:
    """None for a run that nobody started from here."""
    return launches().filter(run_uid=run.uid).first()


def last_lines(launch: Launch) -> LogPage:
    """The end of the log; the page fetches what follows it."""
    chunks: list[LogChunk] = []
    for chunk in LogChunk.objects.filter(launch=launch).order_by("-offset").iterator():
        if chunks and launch.log_end - chunk.offset > LOG_SHOWN_BYTES:
            break
        chunks.insert(0, chunk)
    if not chunks:
        return LogPage(launch.log_end, launch.log_end, "")
    end = chunks[-1].offset + chunks[-1].length
    return LogPage(chunks[0].offset, end, "".join(chunk.text for chunk in chunks))
