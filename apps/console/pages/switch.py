"""The adaptation switch: what is stopped, and which trainers have confirmed it, after how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import OuterRef, Subquery
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.translation import gettext as _

from apps.accounts.models import Project, User
from apps.accounts.policy import Act, Permission, may
from apps.accounts.projects import projects_of
from apps.blueprints.models import Blueprint
from apps.console.bar import adaptation_switch
from apps.console.language import as_written
from apps.console.panels import Panel, render_page
from apps.console.request import page, person
from apps.console.run_rows import live_runs
from apps.policies.models import Freeze, ProjectSwitch, utc
from apps.policies.selectors import freezes
from apps.runs.models import Command, Run
from esper.contracts import CommandKind, CommandState

_PAUSES = (CommandKind.PAUSE_ADAPTATION, CommandKind.RESUME_ADAPTATION)


@page
def switch(request: HttpRequest) -> HttpResponse:
    user = person(request)

    def everything() -> dict[str, Any]:
        state = adaptation_switch()
        return {"switch": state, "kill": may(user, Act.KILL)}

    def trainers() -> dict[str, Any]:
        answers = trainer_answers()
        return {
            "rows": [(one, may(user, Act.PAUSE_ADAPTATION, of=one.run)) for one in answers],
            "summary": summary(answers),
            "several": len(user.access.roles) > 1,
        }

    def blueprints() -> dict[str, Any]:
        return {
            "blueprints": list(Blueprint.objects.filter(present=True).order_by("enabled", "slug")),
            "may_switch": may(user, Act.SWITCH_BLUEPRINT),
        }

    def projects() -> dict[str, Any]:
        return {"rows": project_rows(user, trainer_answers())}

    def freeze_panel() -> dict[str, Any]:
        everywhere = may(user, Act.EDIT_POLICY)
        places = [("", _("everywhere"))] if everywhere.allowed else []
        places += [
            (one.uid, _("project %(name)s") % {"name": one.name})
            for one in projects_of(user).order_by("name")
            if may(user, Act.EDIT_POLICY, of=one).allowed
        ]
        return {"rows": freeze_rows(user), "places": places}

    panels = [
        Panel("all", _("Everything"), "console/switch/all.html", everything, ("switch",)),
        Panel(
            "freezes",
            _("Freezes"),
            "console/switch/freezes.html",
            freeze_panel,
            ("freeze",),
            every=30,
        ),
        Panel(
            "trainers",
            _("Each run"),
            "console/switch/trainers.html",
            trainers,
            ("switch", "run"),
            every=5,
        ),
        Panel("blueprints", _("Each blueprint"), "console/switch/blueprints.html", blueprints),
    ]
    if len(user.access.roles) > 1:
        template = "console/switch/projects.html"
        events = ("switch", "run")
        panels.insert(1, Panel("projects", _("Each project"), template, projects, events, every=5))
    return render_page(
        request,
        "console/simple.html",
        title=_("Adaptation switch"),
        panels=panels,
        intro=_("Stops or allows changes of models. Training continues either way."),
    )


@dataclass(frozen=True, slots=True)
class TrainerAnswer:
    """A live run, and the newest command that pauses or resumes its adaptation."""

    run: Run
    command: Command | None

    @property
    def confirmed(self) -> bool:
        return self.command is not None and self.command.state == CommandState.APPLIED

    @property
    def seconds(self) -> float | None:
        """From the command to the trainer's answer."""
        if self.command is None or self.command.acknowledged_at is None:
            return None
        return (self.command.acknowledged_at - self.command.issued_at).total_seconds()

    @property
    def paused(self) -> bool:
        return self.command is not None and self.command.kind == CommandKind.PAUSE_ADAPTATION


def trainer_answers() -> list[TrainerAnswer]:
    """Those that have not confirmed come first."""
    newest = Command.objects.filter(run=OuterRef("pk"), kind__in=_PAUSES).order_by("-seq")
    live = live_runs().select_related("project")
    runs = list(live.annotate(pause_id=Subquery(newest.values("pk")[:1])))
    commands = Command.objects.in_bulk([run.pause_id for run in runs if run.pause_id])
    answers = [TrainerAnswer(run, commands.get(run.pause_id)) for run in runs]
    return sorted(answers, key=lambda one: (one.command is None, one.confirmed, -one.run.pk))


@dataclass(frozen=True, slots=True)
class ProjectRow:
    """``switch`` None: it was never used. ``summary``: what the trainers have answered."""

    project: Project
    switch: ProjectSwitch | None
    live: int
    summary: str
    kill: Permission

    @property
    def on(self) -> bool:
        return self.switch is None or self.switch.on


def project_rows(user: User, answers: Sequence[TrainerAnswer]) -> list[ProjectRow]:
    """Those that are killed come first."""
    switches = {switch.project_id: switch for switch in ProjectSwitch.objects.all()}
    rows = []
    for project in projects_of(user).order_by("name"):
        own = [one for one in answers if one.run.project_id == project.pk]
        kill = may(user, Act.KILL, of=project)
        rows.append(ProjectRow(project, switches.get(project.pk), len(own), summary(own), kill))
    return sorted(rows, key=lambda row: row.on)


def summary(answers: Sequence[TrainerAnswer]) -> str:
    """How many of the asked trainers have confirmed, and how long the slowest took."""
    asked = [one for one in answers if one.command is not None]
    if not asked:
        return _("No trainer was asked yet.")
    confirmed = [one for one in asked if one.confirmed]
    times = [one.seconds for one in confirmed if one.seconds is not None]
    count = {"confirmed": len(confirmed), "asked": len(asked)}
    if not times:
        return _("%(confirmed)s of %(asked)s trainers have confirmed.") % count
    slowest = {"seconds": as_written(f"{max(times):.1f}")}
    return _(
        "%(confirmed)s of %(asked)s trainers have confirmed, the slowest after %(seconds)s s."
    ) % (count | slowest)


FREEZES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class FreezeRow:
    """``open``: in effect, or to come; ``may``: end it."""

    freeze: Freeze
    where: str
    begins: str
    ends: str
    word: str
    tone: str
    shape: str
    open: bool
    may: Permission


def freeze_rows(user: User) -> list[FreezeRow]:
    """The latest freezes, those that are over too."""
    now = timezone.now()
    rows = []
    for one in freezes()[:FREEZES_SHOWN]:
        if one.ended_at is not None or one.ends_at <= now:
            word, tone, shape = (_("Ended early") if one.ended_at else _("Over")), "off", "disc"
        elif one.starts_at <= now:
            word, tone, shape = _("In effect"), "caution", "half"
        else:
            word, tone, shape = _("To come"), "normal", "disc"
        permission = may(user, Act.EDIT_POLICY, of=one.project)
        rows.append(
            FreezeRow(
                freeze=one,
                where=_("project %(name)s") % {"name": one.project.name}
                if one.project
                else _("everywhere"),
                begins=utc(one.starts_at),
                ends=utc(one.ends_at),
                word=word,
                tone=tone,
                shape=shape,
                open=tone != "off",
                may=permission,
            )
        )
    return rows
