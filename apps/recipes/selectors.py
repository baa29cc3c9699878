"""Recipes and launches as people see them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from django.db.models import QuerySet

from apps.recipes.models import Launch, LogChunk, Recipe, StoredState
from apps.runs.models import Run
from apps.runs.selectors import HUGE_COLUMNS

LOG_PAGE_BYTES = 64 * 1024
TREE_SHOWN = 200  # launches of one tree


def recipes() -> QuerySet[Recipe]:
    """The recipes in the folders of all hosts, usable or not."""
    return Recipe.objects.filter(present=True)


def launches() -> QuerySet[Launch]:
    return Launch.objects.select_related("recipe", "requested_by", "project", "branch_of")


def launch_of_run(run_uid: str) -> Launch | None:
    """The launch that started a run; None: the run was started elsewhere."""
    return launches().filter(run_uid=run_uid).first()


def stored_states(launch: Launch) -> list[StoredState]:
    """What its run can be branched from, the newest first."""
    return list(StoredState.objects.filter(launch=launch))


def ancestors_of_run(run_uid: str) -> list[str]:
    """The uids of the runs that a run began from, its parent first. Empty: it is no branch."""
    found: list[str] = []
    parent = _parent_of(run_uid)
    while parent is not None and parent not in found:
        found.append(parent)
        parent = _parent_of(parent)
    return found


def _parent_of(run_uid: str) -> str | None:
    branches = Launch.objects.filter(run_uid=run_uid).exclude(branch_of=None)
    return branches.values_list("branch_of__run_uid", flat=True).first()


def why_no_branch(launch: Launch | None) -> str:
    """Why a branch of the run of this launch cannot be started; empty: it can."""
    if launch is None:
        return "The run was not started from a recipe, so Esper cannot start a branch of it."
    recipe = launch.recipe
    if not recipe.branchable:
        return "Its recipe has no branch_argv, so it does not say how a run begins from a state."
    if not recipe.usable:
        return f"Its recipe cannot be used: {recipe.problem or 'its file was removed.'}"
    if recipe.digest != launch.digest:
        return "The file of its recipe has changed since, and may not read the stored states."
    return ""


@dataclass(frozen=True, slots=True)
class Branch:
    """A launch in the tree of its branches.

    Attributes:
        run: None until its trainer has registered.
        depth: of the launch that the tree begins with, 0.
        changed: the parameters that differ from its parent's, with both values.
    """

    launch: Launch
    run: Run | None
    depth: int
    changed: Mapping[str, tuple[object, object]]


def branch_tree(launch: Launch) -> list[Branch]:
    """All launches that began from one, each before its branches; of what the caller may see.

    At most ``TREE_SHOWN`` are read.
    """
    first = launch
    seen = {launch.pk}
    while first.branch_of_id is not None and first.branch_of_id not in seen:
        above = launches().filter(pk=first.branch_of_id).first()
        if above is None:
            break
        seen.add(above.pk)
        first = above
    members, level = {first.pk: first}, [first.pk]
    while level and len(members) < TREE_SHOWN:
        found = launches().filter(branch_of__in=level).order_by("branch_step", "id")
        new = [one for one in found[: TREE_SHOWN - len(members)] if one.pk not in members]
        members |= {one.pk: one for one in new}
        level = [one.pk for one in new]
    below: dict[int, list[Launch]] = defaultdict(list)
    for one in members.values():
        if one.pk != first.pk and one.branch_of_id is not None:
            below[one.branch_of_id].append(one)
    uids = [one.run_uid for one in members.values()]
    runs = {run.uid: run for run in Run.objects.filter(uid__in=uids).defer(*HUGE_COLUMNS)}
    return list(_walk(first, None, 0, below, runs))


def _walk(
    launch: Launch,
    parent: Launch | None,
    depth: int,
    below: Mapping[int, list[Launch]],
    runs: Mapping[str, Run],
) -> Iterator[Branch]:
    yield Branch(launch, runs.get(launch.run_uid), depth, _changed(launch, parent))
    for child in below.get(launch.pk, ()):
        yield from _walk(child, launch, depth + 1, below, runs)


def _changed(launch: Launch, parent: Launch | None) -> dict[str, tuple[object, object]]:
    if parent is None:
        return {}
    old = parent.parameters
    return {
        name: (old.get(name), value)
        for name, value in launch.parameters.items()
        if old.get(name) != value
    }


@dataclass(frozen=True, slots=True)
class LogPage:
    """Lines from ``start`` to ``end``; earlier lines than ``start`` may have been removed."""

    start: int
    end: int
    text: str
    more: bool = False


def log_page(launch: Launch, *, after: int, limit: int = LOG_PAGE_BYTES) -> LogPage:
    """Whole chunks from the byte ``after`` on, at least one where there is one."""
    start: int | None = None
    end, texts = after, list[str]()
    for chunk in LogChunk.objects.filter(launch=launch, offset__gte=after).iterator():
        if texts and chunk.offset + chunk.length - after > limit:
            return LogPage(start or 0, end, "".join(texts), more=True)
        start = chunk.offset if start is None else start
        end = chunk.offset + chunk.length
        texts.append(chunk.text)
    return LogPage(after if start is None else start, end, "".join(texts))
