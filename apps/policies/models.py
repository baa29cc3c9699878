"""The safety policy's versions, and what stops adaptation: switches, and freezes for a time."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.utils.translation import gettext as _

from apps.accounts.models import Project
from apps.accounts.visibility import InProjects, of_projects
from apps.rest.identifiers import UID_LENGTH, new_uid
from esper.contracts import SafetyPolicy


class Scope(models.TextChoices):
    """Where a version holds, the widest first. A project's is for all its runs."""

    GLOBAL = "global"
    PROJECT = "project"
    RUN = "run"


class PolicyState(models.TextChoices):
    """``DRAFT`` -> ``IN_FORCE`` -> ``REPLACED``, or ``WITHDRAWN``."""

    DRAFT = "draft"
    IN_FORCE = "in_force"
    REPLACED = "replaced"
    WITHDRAWN = "withdrawn"


def _visible_in(projects: frozenset[int]) -> Q:
    """Versions for all runs, for these projects, and for runs of these projects."""
    keys = [str(project) for project in projects]
    of_runs = Q(scope=Scope.RUN, project__in=keys)
    return Q(scope=Scope.GLOBAL) | Q(scope=Scope.PROJECT, target__in=keys) | of_runs


class PolicyVersion(models.Model):
    """One version of the thresholds; of each scope the newest with its state is in force.

    Its values are never edited. ``values`` are those in force: of its own and of the wider scopes
    the strictest. Where a wider scope changes, a new version of the narrower one follows.

    Attributes:
        target: key of the project, or uid of the run; empty for all runs.
        project: of a run's version, the key of the run's project.
        own: thresholds that were set for this scope itself.
        sources: threshold -> the scope whose value it is.
        laxer: thresholds that allow more than before; they need a second person.
        backtest: what the version would have decided on past cases.
    """

    version = models.PositiveIntegerField(unique=True)
    scope = models.CharField(max_length=8, choices=Scope.choices, default=Scope.GLOBAL)
    target = models.CharField(max_length=200, blank=True)
    project = models.CharField(max_length=200, blank=True)
    state = models.CharField(
        max_length=10, choices=PolicyState.choices, default=PolicyState.IN_FORCE, db_index=True
    )
    own = models.JSONField(default=dict)
    values = models.JSONField()  # SafetyPolicy.to_wire()
    sources = models.JSONField(default=dict)
    laxer = models.JSONField(default=list)
    backtest = models.JSONField(default=dict)
    reason = models.TextField()
    author = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True
    )
    created_at = models.DateTimeField(auto_now_add=True)
    decided_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    decided_at = models.DateTimeField(null=True, blank=True)

    objects = InProjects["PolicyVersion"]()
    visible_in = staticmethod(_visible_in)

    class Meta:
        ordering = ("-version",)

    def __str__(self) -> str:
        return f"policy v{self.version}"

    @property
    def where(self) -> str:
        """For whom it holds, in words."""
        if self.scope == Scope.GLOBAL:
            return _("all runs")
        if self.scope == Scope.PROJECT:
            name = Project.objects.filter(pk=self.target).values_list("name", flat=True).first()
            return _("project %(name)s") % {"name": name}
        return f"{self.scope} {self.target}"

    def safety_policy(self) -> SafetyPolicy:
        return SafetyPolicy.from_wire({**self.values, "version": self.version})


class Switch(models.Model):
    """Whether adaptation is on, and who changed that last."""

    on = models.BooleanField(default=True)
    changed_by = models.CharField(max_length=150, blank=True)
    reason = models.TextField(blank=True)
    changed_at = models.DateTimeField(auto_now=True)

    class Meta:
        abstract = True

    def __str__(self) -> str:
        return "on" if self.on else "off"


class AdaptationSwitch(Switch):
    """One row: may anything be adapted at all?"""

    class Meta:
        verbose_name_plural = "adaptation switches"


class ProjectSwitch(Switch):
    """Of one project; no row: on. What is killed everywhere is killed here, too."""

    project = models.OneToOneField(Project, on_delete=models.CASCADE, related_name="switch")

    objects = InProjects["ProjectSwitch"]()
    visible_in = staticmethod(of_projects)

    class Meta:
        verbose_name_plural = "project switches"


def _of_project_or_all(projects: frozenset[int]) -> Q:
    return Q(project=None) | Q(project__in=projects)


class Freeze(models.Model):
    """A span of time in which nothing is applied, by no person and no rule. No project: anywhere.

    It begins and ends by the database's clock: ``starts_at`` is in it, ``ends_at`` is not.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "frz"), editable=False
    )
    project = models.ForeignKey(
        Project, on_delete=models.CASCADE, null=True, blank=True, related_name="freezes"
    )
    starts_at = models.DateTimeField()
    ends_at = models.DateTimeField(db_index=True)
    reason = models.TextField()
    set_by = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    ended_by = models.ForeignKey(  # before its time
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, null=True, blank=True, related_name="+"
    )
    ended_at = models.DateTimeField(null=True, blank=True)
    end_reason = models.TextField(blank=True)

    objects = InProjects["Freeze"]()
    visible_in = staticmethod(_of_project_or_all)

    class Meta:
        ordering = ("-starts_at", "-id")
        constraints = (
            models.CheckConstraint(
                condition=Q(ends_at__gt=models.F("starts_at")), name="a_freeze_ends_after_its_start"
            ),
        )

    def __str__(self) -> str:
        return f"freeze {self.uid} {self.where}"

    @property
    def number(self) -> int:
        return self.pk

    @property
    def where(self) -> str:
        return "everywhere" if self.project is None else f"in project {self.project.name}"

    @property
    def in_words(self) -> str:
        """As a clause, with its end and its reason."""
        return f"a freeze {self.where} lasts until {utc(self.ends_at)}: {self.reason}"


def utc(moment: datetime) -> str:
    """A moment in a sentence of the API, which has no reader's time zone."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
