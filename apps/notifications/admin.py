"""Events and pending messages for workers, read-only."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.notifications.models import FeedEvent, OutboxMessage


@admin.register(FeedEvent)
class FeedEventAdmin(ReadOnlyAdmin):
    list_display = ("topic", "seq", "type", "at")
    list_filter = ("type",)
    search_fields = ("topic",)


@admin.register(OutboxMessage)
class OutboxMessageAdmin(ReadOnlyAdmin):
    list_display = ("task", "queue", "created_at", "sent_at", "attempts")
    list_filter = ("task",)
