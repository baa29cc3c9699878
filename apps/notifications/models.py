"""What a transaction sends: events for people who watch, and messages for workers and channels."""

from __future__ import annotations

from functools import partial
from urllib.parse import urlsplit

from django.conf import settings
from django.db import models

from apps.accounts.models import ApiToken, Project
from apps.accounts.visibility import InProjects
from apps.rest.identifiers import UID_LENGTH, new_uid


class Feed(models.Model):
    """A topic's counter: ``run:<uid>``, ``inbox`` or ``system``."""

    topic = models.CharField(max_length=64, primary_key=True)
    last_seq = models.BigIntegerField(default=0)


class FeedEvent(models.Model):
    """One visible change. Sockets deliver it and replay it from this row."""

    topic = models.CharField(max_length=64)
    seq = models.BigIntegerField()
    type = models.CharField(max_length=40)
    data = models.JSONField(default=dict)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("topic", "seq")
        constraints = (
            models.UniqueConstraint(fields=("topic", "seq"), name="one_event_per_topic_and_seq"),
        )


class OutboxMessage(models.Model):
    """A Celery message of a committed change; ``sent_at`` is null while it is pending."""

    task = models.CharField(max_length=80)
    queue = models.CharField(max_length=120)
    args = models.JSONField(default=list)
    created_at = models.DateTimeField(auto_now_add=True)
    sent_at = models.DateTimeField(null=True, blank=True, db_index=True)
    attempts = models.PositiveIntegerField(default=0)

    class Meta:
        ordering = ("id",)


class SocketTicket(models.Model):
    """Lets a client without cookies open one socket; its secret is stored as SHA-256 only.

    ``token``: the bearer token that asked for it; the socket ends with it.
    """

    digest = models.CharField(max_length=64, unique=True)
    user = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="+")
    token = models.ForeignKey(ApiToken, on_delete=models.CASCADE, null=True, related_name="+")
    expires_at = models.DateTimeField(db_index=True)


class ChannelKind(models.TextChoices):
    """How a person is told: the body of a webhook, a chat's payload, or a mail."""

    WEBHOOK = "webhook"  # Standard Webhooks
    SLACK = "slack"  # {"text": …}, which Slack, Mattermost and others take
    MAIL = "mail"
    PUSH = "push", "Browser push"  # one browser, also while it is closed


class DutyShift(models.Model):
    """From when to when a person is on duty: told first of what waits."""

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "dty"), editable=False
    )
    user = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="duty_shifts"
    )
    begins = models.DateTimeField()
    ends = models.DateTimeField(db_index=True)

    class Meta:
        ordering = ("begins", "id")

    def __str__(self) -> str:
        return f"{self.user_id} from {self.begins:%Y-%m-%d %H:%M}"


class Channel(models.Model):
    """Where a person wants to be told of which events."""

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "chn"), editable=False
    )
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="channels"
    )
    kind = models.CharField(max_length=8, choices=ChannelKind.choices)
    # an address, or of a mail its recipient; of a push the browser's address at its push service
    target = models.CharField(max_length=1000)
    events = models.JSONField(default=list)
    quiet_from = models.TimeField(null=True, blank=True)  # UTC; events wait until quiet_until
    quiet_until = models.TimeField(null=True, blank=True)
    # encrypted: what signs the bodies of a webhook, or the keys of a browser
    secret = models.BinaryField(default=b"")
    only_on_duty = models.BooleanField(default=False)  # else, and when nobody is, always
    site = models.CharField(max_length=200)  # the server's address as its owner uses it
    disabled_at = models.DateTimeField(null=True, blank=True)
    disabled_reason = models.CharField(max_length=200, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.kind} of {self.owner_id}"

    @property
    def place(self) -> str:
        """The target in words; a browser's address at its push service says nothing to people."""
        return urlsplit(self.target).netloc if self.kind == ChannelKind.PUSH else self.target


def _of_project_or_none(projects: frozenset[int]) -> models.Q:
    return models.Q(project=None) | models.Q(project__in=projects)


class Delivery(models.Model):
    """One event for one channel, with what became of it: the delivery log.

    ``project``: of the run that the event is about; null: the event is about the server.
    """

    uid = models.CharField(
        max_length=UID_LENGTH, unique=True, default=partial(new_uid, "msg"), editable=False
    )
    channel = models.ForeignKey(Channel, on_delete=models.CASCADE, related_name="deliveries")
    project = models.ForeignKey(Project, on_delete=models.CASCADE, null=True, related_name="+")
    type = models.CharField(max_length=40)
    data = models.JSONField()
    created_at = models.DateTimeField(auto_now_add=True)
    due_at = models.DateTimeField(null=True, db_index=True)  # null: it is over
    attempts = models.PositiveSmallIntegerField(default=0)
    status = models.PositiveSmallIntegerField(null=True, blank=True)  # of the last answer
    error = models.CharField(max_length=300, blank=True)
    delivered_at = models.DateTimeField(null=True, blank=True)

    objects = InProjects["Delivery"]()
    visible_in = staticmethod(_of_project_or_none)

    class Meta:
        verbose_name_plural = "deliveries"
        ordering = ("-id",)

    def __str__(self) -> str:
        return f"{self.type} {self.uid}"
