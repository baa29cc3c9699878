"""One run: its state, timeline, layers and commands."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any

from django.db.models import OuterRef, Subquery
from django.http import Http404, HttpRequest, HttpResponse
from django.urls import reverse
from django.utils.translation import gettext as _

from apps.accounts.models import Project, User
from apps.accounts.policy import Act, Permission, may
from apps.adaptations.models import Adaptation, Remedy
from apps.adaptations.selectors import error_budget, waiting_for_a_person
from apps.adaptations.services import may_grant, multiplies, open_delegations, why_not_delegated
from apps.blueprints.models import KnownRemedy
from apps.console.drawing import shade
from apps.console.language import in_words
from apps.console.panels import Panel, render_page
from apps.console.request import choice, page, person, project_choices
from apps.console.run_rows import frame_matrix
from apps.console.sentences import in_sentence, title_of
from apps.console.status import ADAPTATION, SEVERITY, Status
from apps.kernels.models import SpeedUp
from apps.notifications.services import run_topic
from apps.policies.models import PolicyVersion
from apps.policies.services import current_policy, kill_over
from apps.recipes.models import Launch
from apps.recipes.selectors import (
    Branch,
    branch_tree,
    launch_of_run,
    stored_states,
    why_no_branch,
)
from apps.recipes.services import host_queue
from apps.rest.numbers import is_number
from apps.runs.models import Command, Run
from apps.runs.selectors import HUGE_COLUMNS_OF_RUN
from apps.telemetry.models import Frame, Metric
from apps.violations.models import Violation
from apps.violations.selectors import open_violations
from apps.workers.services import queue_is_served
from esper.contracts import (
    SIGNAL_INDEX,
    AdaptationState,
    CommandKind,
    CommandState,
    RunMode,
    SafetyPolicy,
    Severity,
    Signal,
)
from esper.contracts.health import LayerInfo

COMMANDS_SHOWN = 30
LAYERS_SHOWN = 200


@page
def run(request: HttpRequest, uid: str) -> HttpResponse:
    found = get_run(uid)
    if found is None:
        raise Http404("there is no such run")
    return render_page(
        request,
        "console/run.html",
        title=found.name,
        panels=RunPanels(request, found).table(),
        topics=[run_topic(found.uid)],
        run=found,
        whole=lambda: {"signals": list(Signal), "held_out": held_out_name(found)},
    )


class RunPanels:
    """The panels of one run's page, for one person."""

    def __init__(self, request: HttpRequest, run: Run) -> None:
        self._run = run
        self._user = person(request)
        self._only_poor = request.GET.get("layers") == "poor"
        self._shown = choice(request, "show", Shown, Shown.ALL)
        self._launch = launch_of_run(run.uid)
        self._tree = branch_tree(self._launch) if self._launch else []

    def table(self) -> list[Panel]:
        """All of them, as the page has them."""
        granted = ("delegation", "adaptation", "policy")
        told = ("adaptation", "remedy", "violation", "kernel")
        alone, ahead = len(self._tree) < 2, _("Approve remedies ahead")
        return [
            _panel("ask", _("Ask for a remedy"), self._ask, fold=True),
            _panel("delegations", ahead, self._delegations, granted, fold=True),
            _panel("branches", _("Branches"), self._branches, ("launch",), 30, fold=alone),
            _panel("head", _("Run"), self._head, ("run", "switch", "adaptation"), 5),
            _panel("timeline", _("Events"), self._timeline, told),
            _panel("layers", _("Layers"), self._layers, ("adaptation",), 10),
            _panel("commands", _("Commands to the trainer"), self._commands, ("run", "adaptation")),
        ]

    # Two panels of one request need each of these.

    @cached_property
    def _policy(self) -> PolicyVersion:
        return current_policy(self._run)

    @cached_property
    def _changes(self) -> list[Adaptation]:
        return changes_of(self._run)

    @cached_property
    def _offered(self) -> list[KnownRemedy]:
        return list(KnownRemedy.objects.filter(present=True))

    def _may(self, act: Act) -> Permission:
        return may(self._user, act, of=self._run)

    def _ask(self) -> dict[str, Any]:
        may_change = self._run.mode != RunMode.OBSERVE
        return {
            "known": [known for known in self._offered if known.changes_nothing or may_change],
            "many_layers": len(self._run.layers) > LAYERS_SHOWN,  # one list of names for all forms
            "may_ask": self._may(Act.PROPOSE_REMEDY),
            "may_approve": self._may(Act.APPROVE),
        }

    def _delegations(self) -> dict[str, Any]:
        policy = self._policy.safety_policy()
        return delegation_context(self._run, self._user, self._offered, policy)

    def _branches(self) -> dict[str, Any]:
        launch = self._launch
        recipe = launch.recipe if launch is not None else None
        may_start = may(self._user, Act.START_RECIPE)
        return {
            "tree": branch_rows(self._tree),
            "why_not": why_no_branch(launch),
            "recipe": recipe,
            "up": recipe is not None and queue_is_served(host_queue(recipe.host)),
            "states": stored_states(launch) if launch else [],
            "parameters": [
                (p, launch.parameters.get(p["name"], p["default"])) for p in recipe.parameters
            ]
            if launch and recipe
            else [],
            "may_branch": self._may(Act.CREATE_RUN) if may_start.allowed else may_start,
        }

    def _head(self) -> dict[str, Any]:
        run = self._run
        return {
            "pause": pause_state(run),
            "stop": stop_command(run),
            "launch": self._launch,
            "metrics": latest_metrics(run, ("step_ms", "lr")),
            "may_pause": self._may(Act.PAUSE_ADAPTATION),
            "may_stop": self._may(Act.STOP_RUN),
            "safety": self._policy,
            "budget": error_budget(run, self._policy.safety_policy()),
            "move_to": places_to_move(run, self._user) if run.ended else (),
            "waiting": waiting_of(run),
        }

    def _timeline(self) -> dict[str, Any]:
        return timeline(self._run, self._changes, self._shown)

    def _layers(self) -> dict[str, Any]:
        rows = layer_rows(self._run, self._changes, only_poor=self._only_poor)
        return {
            "rows": rows[:LAYERS_SHOWN],
            "nodes": [] if self._only_poor else topology(self._run, rows),
            "shown_signals": SHOWN_SIGNALS,
            "only_poor": self._only_poor,
        }

    def _commands(self) -> dict[str, Any]:
        return {"commands": commands(self._run)}


def _panel(
    name: str,
    title: str,
    build: Callable[[], dict[str, Any]],
    events: tuple[str, ...] = (),
    every: int = 0,
    *,
    fold: bool = False,
) -> Panel:
    return Panel(name, title, f"console/run/{name}.html", build, events, every, fold)


@dataclass(frozen=True, slots=True)
class Limited:
    """A number setting of a remedy that can be delegated, with limits that are proposed."""

    name: str
    low: float
    high: float
    multiplies: bool


def delegation_context(
    run: Run, user: User, known: Sequence[KnownRemedy], policy: SafetyPolicy
) -> dict[str, Any]:
    """What is delegated in this run, and what could be."""
    offered = [] if run.mode == RunMode.OBSERVE else known
    return {
        "open": open_delegations(run),
        "lengths": DELEGATION_HOURS,
        "may_grant": may_grant(run, user),
        "may_revoke": may(user, Act.REJECT, of=run),
        "choices": [
            (remedy, list(_limited(remedy)))
            for remedy in offered
            if not why_not_delegated(remedy, policy)
        ],
    }


@dataclass(frozen=True, slots=True)
class BranchRow:
    """A launch of the tree, with its steps on an axis from 0 to 100 that all rows share."""

    launch: Launch
    run: Run | None
    depth: int
    parent: str  # of which run it is a branch, in words; empty: the tree begins with it
    changed: Mapping[str, tuple[object, object]]
    from_x: float
    to_x: float


def branch_rows(tree: Sequence[Branch]) -> list[BranchRow]:
    """The tree as the page draws it."""
    most = max([1, *(one.run.step for one in tree if one.run is not None)])
    names = {one.launch.pk: _branch_name(one) for one in tree}
    rows = []
    for one in tree:
        first = one.launch.branch_step or 0
        last = max(first, one.run.step) if one.run is not None else first
        parent = one.launch.branch_of
        rows.append(
            BranchRow(
                launch=one.launch,
                run=one.run,
                depth=one.depth,
                parent="" if parent is None else names.get(parent.pk, f"L-{parent.number}"),
                changed=one.changed,
                from_x=round(100 * min(first, most) / most, 1),
                to_x=round(100 * min(last, most) / most, 1),
            )
        )
    return rows


def _branch_name(one: Branch) -> str:
    return f"L-{one.launch.number}" if one.run is None else f"R-{one.run.number}"


DELEGATION_HOURS = (1, 4, 8, 24)


def _limited(remedy: KnownRemedy) -> Iterator[Limited]:
    for name, value in remedy.settings.items():
        if is_number(value):
            of_factor = multiplies(remedy, name)
            yield Limited(
                name=name,
                low=0.5 if of_factor else value,
                high=2.0 if of_factor else value,
                multiplies=of_factor,
            )


WAITING_SHOWN = 3


def waiting_of(run: Run) -> list[Adaptation]:
    """What waits for a person in this run, the next to expire first; a plan is one."""
    rows = waiting_for_a_person().filter(run=run).select_related("plan", "blueprint")
    found: dict[object, Adaptation] = {}
    for row in rows:
        found.setdefault(row.plan_id or row.uid, row)
    return list(found.values())[:WAITING_SHOWN]


def get_run(uid: str) -> Run | None:
    return Run.objects.select_related("owner", "project").filter(uid=uid).first()


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """One event of a run at a step."""

    step: int | None
    at: datetime
    adaptation: Adaptation | None = None
    violation: Violation | None = None
    remedy: Remedy | None = None
    speed_up: SpeedUp | None = None
    number: int | None = None  # of the adaptation whose kernel that is


EVENTS_READ = 500  # of each kind; the timeline lists the newest, the axis of the charts has all
ENTRIES_SHOWN = 60


class Shown(StrEnum):
    """Which entries the timeline lists; the axis of the charts always has all."""

    ALL = "all"
    ADAPTATIONS = "adaptations"
    FINDINGS = "findings"
    REMEDIES = "remedies"
    KERNELS = "kernels"

    def has(self, entry: TimelineEntry) -> bool:
        """Whether an entry is of this kind."""
        of_kind = {
            Shown.ALL: True,
            Shown.ADAPTATIONS: entry.adaptation is not None,
            Shown.FINDINGS: entry.violation is not None,
            Shown.REMEDIES: entry.remedy is not None
            or (entry.adaptation is not None and bool(entry.adaptation.remedy)),
            Shown.KERNELS: entry.speed_up is not None,
        }
        return of_kind[self]


def changes_of(run: Run) -> list[Adaptation]:
    """All adaptations of the run, the newest first."""
    related = ("blueprint", "decided_by", "taken_back_by")
    return list(Adaptation.objects.filter(run=run).select_related(*related))


def timeline(run: Run, changes: Sequence[Adaptation], shown: str = Shown.ALL) -> dict[str, Any]:
    """What happened, newest first, and the same at its steps for the axis of the charts."""
    adaptations = changes[:EVENTS_READ]
    violations = list(
        Violation.objects.filter(run=run)
        .select_related("run")
        .defer(*HUGE_COLUMNS_OF_RUN)[:EVENTS_READ]
    )
    remedies = list(
        Remedy.objects.filter(run=run).select_related("adaptation", "undoes", "undone_by")[
            :EVENTS_READ
        ]
    )
    entries = [
        *(
            TimelineEntry(
                step=row.graft_step or row.proposed_step, at=row.created_at, adaptation=row
            )
            for row in adaptations
        ),
        *(TimelineEntry(step=row.step, at=row.created_at, violation=row) for row in violations),
        *(TimelineEntry(step=row.step, at=row.created_at, remedy=row) for row in remedies),
        *_tried_kernels(run, ENTRIES_SHOWN, {row.uid: row.pk for row in adaptations}),
    ]
    markers = [
        *(_graft_marker(row) for row in adaptations if row.graft_step is not None),
        *(_remedy_marker(row) for row in remedies),
        *(_finding_marker(row) for row in violations if row.step is not None),
    ]
    wanted = [entry for entry in entries if Shown(shown).has(entry)]
    newest = sorted(wanted, key=lambda entry: entry.at, reverse=True)[:ENTRIES_SHOWN]
    return {"entries": newest, "markers": markers, "shown": shown, "kinds": list(Shown)}


def _tried_kernels(run: Run, most: int, numbers: Mapping[str, int]) -> list[TimelineEntry]:
    """Compiled kernels that the trainer has tried, with the step of its answer."""
    found = SpeedUp.objects.filter(run_uid=run.uid, speedup__isnull=False, ended_at__isnull=False)
    trials = list(found.order_by("-id")[:most])
    uids = [trial.adaptation_uid for trial in trials]
    answers = Command.objects.filter(
        run=run, kind=CommandKind.SPEED_UP, adaptation_uid__in=uids
    ).values_list("adaptation_uid", "step")
    steps = dict(answers)
    return [
        TimelineEntry(
            step=steps.get(trial.adaptation_uid),
            at=trial.ended_at,
            speed_up=trial,
            number=numbers.get(trial.adaptation_uid),
        )
        for trial in trials
        if trial.ended_at is not None
    ]


# Under which names training scripts report a held-out loss, as the diagnosis reads them.
HELD_OUT = ("eval_loss", "val_loss", "valid_loss", "validation_loss")


def held_out_name(run: Run) -> str:
    """The metric that the loss is compared with; empty without one."""
    names = Metric.objects.filter(run=run, name__in=HELD_OUT).order_by()
    found = set(names.values_list("name", flat=True).distinct())
    return next((name for name in HELD_OUT if name in found), "")


def _marker(
    kind: str, row: Adaptation | Remedy | Violation, step: int | None, shown: Status, **other: str
) -> dict[str, Any]:
    return {
        "kind": kind,
        "id": row.uid,
        "step": step,
        "layer": row.layer,
        "tone": shown.tone,
        "shape": shown.shape,
        "word": in_words(shown.word).lower(),
        **other,
    }


def _graft_marker(row: Adaptation) -> dict[str, Any]:
    return _marker(
        "adaptation",
        row,
        row.graft_step,
        ADAPTATION[AdaptationState(row.state)],
        label=f"A-{row.number} {title_of(row)}",
        href=reverse("console:adaptation", args=[row.uid]),
    )


def _remedy_marker(row: Remedy) -> dict[str, Any]:
    shown = Status("normal", "half", _("changed by the training script"))
    word = _("%(remedy)s of %(layer)s") % {
        "remedy": in_words(row.kind.replace("_", " ")),
        "layer": row.layer or _("the whole run"),
    }
    return _marker("remedy", row, row.step, shown, label=word, href=f"#entry-{row.uid}")


def _finding_marker(row: Violation) -> dict[str, Any]:
    shown = SEVERITY[Severity(row.severity)]
    over = row.resolved_step is not None or row.acknowledged_at is not None
    ended = _("%(severity)s, over") % {"severity": in_words(shown.word)}
    return _marker(
        "finding",
        row,
        row.step if row.since_step is None else row.since_step,
        Status("off", shown.shape, ended) if over else shown,
        label=f"V-{row.number} {in_sentence(row.text)}"[:200],
        href=f"{reverse('console:violations')}?state=all&run={row.run.uid if row.run else ''}"
        f"#{row.uid}",
    )


@dataclass(frozen=True, slots=True)
class LayerRow:
    """A layer with its newest signals; None means not measured.

    Attributes:
        values: of ``SHOWN_SIGNALS``; None without a frame.
    """

    info: LayerInfo
    values: list[float] | None
    adaptations: Sequence[Adaptation] = ()

    @property
    def health(self) -> float | None:
        return None if self.values is None else _known(self.values[0])

    @property
    def shade(self) -> str:
        health = self.health
        return shade(math.nan if health is None else health)

    @property
    def signals(self) -> list[float | None]:
        """In the order of ``SHOWN_SIGNALS``."""
        values = self.values
        return [None] * len(SHOWN_SIGNALS) if values is None else [_known(v) for v in values]


SHOWN_SIGNALS = (
    Signal.HEALTH,
    Signal.GRAD_NORM,
    Signal.UPDATE_RATIO,
    Signal.DEAD_FRACTION,
    Signal.SATURATION,
    Signal.STABLE_RANK,
)


def layer_rows(
    run: Run, changes: Sequence[Adaptation], *, only_poor: bool = False
) -> list[LayerRow]:
    """Layers in the order of the model, with their values in the newest frame."""
    frame = Frame.objects.filter(run=run).order_by("-step").first()
    values = frame_matrix(run, frame)
    by_layer: dict[str, list[Adaptation]] = defaultdict(list)
    for adaptation in changes:
        by_layer[adaptation.layer].append(adaptation)
    infos = run.layer_infos()
    places = [SIGNAL_INDEX[signal] for signal in SHOWN_SIGNALS]
    known = [None] * len(infos) if values is None else values[:, places].tolist()
    rows = [
        LayerRow(info, own, by_layer.get(info.name, ()))
        for info, own in zip(infos, known, strict=True)
    ]
    if only_poor:
        rows = [row for row in rows if (row.health or 1.0) < 0.5]
    return rows


@dataclass(frozen=True, slots=True)
class Node:
    """A layer, or a block of a large model, as the topology draws it."""

    name: str
    layers: int
    health: float | None  # the lowest
    shade: str
    grafts: list[Adaptation]
    findings: list[Violation]  # open ones that began here


NODES_SHOWN = 80
FEWEST_NODES = 8  # fewer tell nothing: the next level is drawn, with neighbours joined


def topology(run: Run, rows: Sequence[LayerRow]) -> list[Node]:
    """The layers in the order in which they run; blocks where they are too many to draw."""
    findings: dict[str, list[Violation]] = defaultdict(list)
    for found in open_violations().filter(run=run).exclude(layer=""):
        findings[found.layer].append(found)
    ordered = sorted(rows, key=lambda row: row.info.order)
    places = [tuple(row.info.name.split(".")) for row in ordered]
    depth = next((size for size in (9, 4, 3, 2, 1) if _blocks(places, size) <= NODES_SHOWN), 1)
    if depth < 4 and _blocks(places, depth) < FEWEST_NODES < _blocks(places, depth + 1):
        depth += 1
    groups: dict[str, list[LayerRow]] = {}
    for row, place in zip(ordered, places, strict=True):
        groups.setdefault(".".join(place[:depth]), []).append(row)
    joined = _joined(groups) if len(groups) > NODES_SHOWN else groups
    return [_node(name, members, findings) for name, members in joined.items()]


def _joined(groups: Mapping[str, list[LayerRow]]) -> dict[str, list[LayerRow]]:
    """Neighbouring blocks as one: ``block.0 … block.4``."""
    names = list(groups)
    size = math.ceil(len(names) / NODES_SHOWN)
    parts = [names[first : first + size] for first in range(0, len(names), size)]
    return {
        part[0] if len(part) == 1 else f"{part[0]} … {part[-1].rpartition('.')[2]}": [
            row for name in part for row in groups[name]
        ]
        for part in parts
    }


def _blocks(places: Sequence[tuple[str, ...]], depth: int) -> int:
    return len({place[:depth] for place in places})


def _node(name: str, members: Sequence[LayerRow], findings: Mapping[str, list[Violation]]) -> Node:
    health = min((row.health for row in members if row.health is not None), default=None)
    return Node(
        name=name,
        layers=len(members),
        health=health,
        shade=shade(math.nan if health is None else health),
        grafts=[
            found
            for row in members
            for found in row.adaptations
            if found.grafted and not found.remedy
        ],
        findings=[found for row in members for found in findings.get(row.info.name, [])],
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def commands(run: Run) -> list[Command]:
    return list(Command.objects.filter(run=run).order_by("-seq")[:COMMANDS_SHOWN])


_PAUSE_KINDS = (CommandKind.PAUSE_ADAPTATION, CommandKind.RESUME_ADAPTATION)


@dataclass(frozen=True, slots=True)
class PauseState:
    """Whether a pause was requested, and the command with the trainer's answer."""

    paused: bool
    command: Command | None
    killed: str = ""  # who has switched adaptation off, and where; empty while it is on

    @property
    def pending(self) -> bool:
        return self.command is not None and self.command.state in (
            CommandState.ISSUED,
            CommandState.ACCEPTED,
        )


def pause_state(run: Run) -> PauseState:
    newest = Command.objects.filter(run=run, kind__in=_PAUSE_KINDS).order_by("-seq").first()
    kill = kill_over(run.project_id)
    return PauseState(bool(run.adaptation_paused_by), newest, kill.in_words if kill else "")


def stop_command(run: Run) -> Command | None:
    return Command.objects.filter(run=run, kind=CommandKind.STOP_RUN).order_by("-seq").first()


def latest_metrics(run: Run, names: Sequence[str]) -> dict[str, Metric]:
    """The newest value of each metric."""
    newest = (
        Metric.objects.filter(run=run, name=OuterRef("name")).order_by("-step").values("pk")[:1]
    )
    rows = Metric.objects.filter(run=run, name__in=names, pk=Subquery(newest))
    return {metric.name: metric for metric in rows}


def places_to_move(run: Run, user: User) -> list[Project]:
    """The other projects, where the person manages them and the run's own."""
    if not may(user, Act.MANAGE_PEOPLE, of=run.project).allowed:
        return []
    others = [one for one in project_choices(user) if one.pk != run.project_id]
    return [one for one in others if may(user, Act.MANAGE_PEOPLE, of=one).allowed]
