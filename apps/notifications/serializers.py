from __future__ import annotations

from typing import Any

from rest_framework import serializers

from apps.notifications.channels import EVENTS
from apps.notifications.models import Channel, ChannelKind, Delivery, DutyShift
from apps.rest.fields import BoundedList, Flag, Members, PersonsInput, Text


class EventOutput(serializers.Serializer[Any]):
    """One event, exactly as the websocket sends it."""

    topic = serializers.CharField()
    seq = serializers.IntegerField()
    ts = serializers.CharField()
    type = serializers.CharField()
    data = Members()  # type: ignore[assignment]  # a field; the metaclass takes it away


class EventsOutput(serializers.Serializer[Any]):
    """``seq`` is the topic's newest number: ask again with ``after`` until it is reached."""

    results = EventOutput(many=True)
    seq = serializers.IntegerField()


class TicketOutput(serializers.Serializer[Any]):
    """``url``: where one socket may be opened with it, until ``expires_at``."""

    ticket = serializers.CharField()
    expires_at = serializers.DateTimeField()
    url = serializers.CharField()


class PushKeysInput(PersonsInput):
    """As ``PushSubscription.toJSON()`` gives them: base64 for addresses."""

    p256dh = Text(max_length=100)
    auth = Text(max_length=40)


class ChannelInput(PersonsInput):
    """``target``: an https address; of a mail it is left out: it goes to the account's address.

    ``keys``: of a push, with the ``endpoint`` of the browser's subscription as ``target``.

    ``quiet_from`` and ``quiet_until``: UTC; events between them wait, but for the urgent ones.
    """

    kind = serializers.ChoiceField(choices=ChannelKind.choices)
    target = Text(max_length=1000, allow_blank=True, default="")
    events = BoundedList(
        child=serializers.ChoiceField(choices=list(EVENTS)),
        allow_empty=False,
        max_length=len(EVENTS),
    )
    quiet_from = serializers.TimeField(allow_null=True, default=None)
    quiet_until = serializers.TimeField(allow_null=True, default=None)
    only_on_duty = Flag(default=False)
    keys = PushKeysInput(allow_null=True, default=None)


class ChannelOutput(serializers.ModelSerializer[Channel]):
    events = serializers.ListField(child=serializers.CharField())

    class Meta:
        model = Channel
        fields: tuple[str, ...] = (
            *("uid", "kind", "target", "events", "quiet_from", "quiet_until"),
            *("only_on_duty", "disabled_at", "disabled_reason", "created_at"),
        )


class NewChannelOutput(ChannelOutput):
    """``secret`` signs the bodies of a webhook; it is shown this once, and empty for others."""

    secret = serializers.SerializerMethodField()

    class Meta(ChannelOutput.Meta):
        fields: tuple[str, ...] = (*ChannelOutput.Meta.fields, "secret")

    def get_secret(self, channel: Channel) -> str:
        secret: str = self.context["secret"]
        return secret


class ShiftInput(PersonsInput):
    """``who`` empty: the caller."""

    who = Text(max_length=150, allow_blank=True, default="")
    begins = serializers.DateTimeField()
    ends = serializers.DateTimeField()


class ShiftOutput(serializers.ModelSerializer[DutyShift]):
    who = serializers.CharField(source="user.username")

    class Meta:
        model = DutyShift
        fields = ("uid", "who", "begins", "ends")


class DeliveryOutput(serializers.ModelSerializer[Delivery]):
    """``due_at`` null: it is over. ``status``: of the last answer, null without one."""

    channel = serializers.CharField(source="channel.uid")
    data = Members()  # type: ignore[assignment]  # a field; the metaclass takes it away

    class Meta:
        model = Delivery
        fields = (
            *("uid", "channel", "type", "data", "created_at", "due_at", "attempts", "status"),
            *("error", "delivered_at"),
        )
