"""What a transaction sends: events for people who watch, and messages for workers."""

from __future__ import annotations

from django.db import models


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
