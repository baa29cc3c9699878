"""Recipes as their hosts report them, launches of them, and the ends of their logs."""

from __future__ import annotations

from functools import partial

from django.conf import settings
from django.db import models

from apps.accounts.models import DEFAULT_PROJECT, Project
from apps.accounts.visibility import InProjects, of_projects
from apps.recipes.files import Parameter
from apps.rest.identifiers import UID_LENGTH, new_uid
from esper.contracts import LAUNCH_ENDED, LaunchState


class Recipe(models.Model):
    """What a host's worker found in its folder; the host starts its file, never this row."""

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "rec"), editable=False
    )
    host = models.CharField(max_length=120)
    slug = models.CharField(max_length=80)
    digest = models.CharField(max_length=64, blank=True)
    name = models.CharField(max_length=80)
    description = models.TextField(blank=True)
    argv = models.JSONField(default=list)
    resume_argv = models.JSONField(default=list)
    branch_argv = models.JSONField(default=list)
    directory = models.TextField(blank=True)
    environment = models.JSONField(default=list)
    grace_seconds = models.PositiveIntegerField(default=20)
    parameters = models.JSONField(default=list)  # Parameter.to_wire()
    present = models.BooleanField(default=True)  # the file is there
    problem = models.TextField(blank=True)  # why its file cannot be used
    registered_at = models.DateTimeField()

    class Meta:
        ordering = ("host", "slug")
        constraints = (
            models.UniqueConstraint(fields=("host", "slug"), name="one_recipe_per_host_and_slug"),
        )

    def __str__(self) -> str:
        return f"{self.host}/{self.slug}"

    @property
    def usable(self) -> bool:
        return self.present and not self.problem

    @property
    def resumable(self) -> bool:
        return bool(self.resume_argv)

    @property
    def branchable(self) -> bool:
        return bool(self.branch_argv)

    def parameter_list(self) -> tuple[Parameter, ...]:
        return tuple(Parameter.from_wire(wire) for wire in self.parameters)


class Launch(models.Model):
    """One start of a recipe. ``attempt`` counts its starts: resuming it is the next one."""

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "lau"), editable=False
    )
    recipe = models.ForeignKey(Recipe, on_delete=models.PROTECT, related_name="launches")
    digest = models.CharField(max_length=64)  # of the file that the person was shown
    parameters = models.JSONField(default=dict)
    requested_by = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.PROTECT, related_name="launches"
    )
    project = models.ForeignKey(Project, on_delete=models.PROTECT, default=DEFAULT_PROJECT)
    # The run is registered by the trainer under the uid that its token is for.
    run_uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "run"), editable=False
    )
    # Of a branch: the launch whose stored state its run begins from, and which state that is.
    branch_of = models.ForeignKey(
        "self", on_delete=models.PROTECT, null=True, blank=True, related_name="branches"
    )
    branch_state = models.CharField(max_length=200, blank=True)
    branch_step = models.BigIntegerField(null=True, blank=True)
    branch_digest = models.CharField(max_length=64, blank=True)  # SHA-256 of what was copied
    state = models.CharField(
        max_length=10,
        choices=[(s, s.capitalize()) for s in LaunchState],
        default=LaunchState.REQUESTED,
        db_index=True,
    )
    attempt = models.PositiveIntegerField(default=1)
    reason = models.TextField(blank=True)  # of the state that it is in
    command = models.JSONField(default=list)  # as it was started
    pid = models.PositiveIntegerField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    exit_signal = models.CharField(max_length=20, blank=True)
    last_lines = models.JSONField(default=list)
    stopped_by = models.CharField(max_length=150, blank=True)
    log_end = models.BigIntegerField(default=0)  # bytes of the host's log that we have seen
    created_at = models.DateTimeField(auto_now_add=True)
    requested_at = models.DateTimeField()  # this attempt
    started_at = models.DateTimeField(null=True, blank=True)
    seen_at = models.DateTimeField(null=True, blank=True)  # its host has last looked at it
    stop_requested_at = models.DateTimeField(null=True, blank=True)
    ended_at = models.DateTimeField(null=True, blank=True)

    objects = InProjects["Launch"]()
    visible_in = staticmethod(of_projects)

    class Meta:
        verbose_name_plural = "launches"
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"L-{self.pk} {self.recipe_id} {self.state}"

    @property
    def number(self) -> int:
        return self.pk

    @property
    def owner_id(self) -> int:
        """The owner of its run."""
        return self.requested_by_id

    @property
    def ended(self) -> bool:
        return self.state in LAUNCH_ENDED


def of_launch(projects: frozenset[int]) -> models.Q:
    """Of a row with a ``launch``."""
    return models.Q(launch__project__in=projects)


class StoredState(models.Model):
    """A checkpoint of a launch that lies on its host, as the host has seen it last."""

    launch = models.ForeignKey(Launch, on_delete=models.CASCADE, related_name="states")
    name = models.CharField(max_length=200)  # of the file or folder
    step = models.BigIntegerField()
    size_bytes = models.BigIntegerField()
    written_at = models.DateTimeField()

    objects = InProjects["StoredState"]()
    visible_in = staticmethod(of_launch)

    class Meta:
        ordering = ("launch", "-step", "name")
        constraints = (
            models.UniqueConstraint(
                fields=("launch", "name"), name="one_state_per_launch_and_name"
            ),
        )

    def __str__(self) -> str:
        return f"{self.name} of {self.launch_id}"


class LogChunk(models.Model):
    """Whole lines of a launch's log, redacted on its host; only the last of them are kept."""

    launch = models.ForeignKey(Launch, on_delete=models.CASCADE, related_name="chunks")
    offset = models.BigIntegerField()  # of its first byte, in the host's log
    length = models.PositiveIntegerField()
    text = models.TextField()

    class Meta:
        ordering = ("launch", "offset")
        constraints = (
            models.UniqueConstraint(fields=("launch", "offset"), name="one_chunk_per_offset"),
        )
