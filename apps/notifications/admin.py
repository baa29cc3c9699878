"""Events and pending messages for workers, read-only."""

from __future__ import annotations

from django.contrib import admin

from apps.accounts.read_only_admin import ReadOnlyAdmin
from apps.notifications.models import Channel, Delivery, FeedEvent, OutboxMessage


@admin.register(FeedEvent)
class FeedEventAdmin(ReadOnlyAdmin):
    of_everybody = True
    list_display = ("topic", "seq", "type", "at")
    list_filter = ("type",)
    search_fields = ("topic",)


@admin.register(OutboxMessage)
class OutboxMessageAdmin(ReadOnlyAdmin):
    of_everybody = True
    list_display = ("task", "queue", "created_at", "sent_at", "attempts")
    list_filter = ("task",)


@admin.register(Channel)
class ChannelAdmin(ReadOnlyAdmin):
    page = ("me",)
    of_everybody = True
    list_display = ("uid", "owner", "kind", "disabled_at", "disabled_reason")
    list_filter = ("kind",)
    exclude = ("secret",)


@admin.register(Delivery)
class DeliveryAdmin(ReadOnlyAdmin):
    of_everybody = True
    list_display = ("uid", "channel", "type", "attempts", "status", "delivered_at", "error")
    list_filter = ("type",)
