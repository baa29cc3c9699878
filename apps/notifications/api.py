from __future__ import annotations

from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.authentication import person
from apps.accounts.endpoint import Endpoint
from apps.notifications.serializers import EventsOutput
from apps.notifications.services import event_to_wire, events_after, last_seq
from apps.notifications.topics import TOPICS, watch_permission
from apps.rest.filters import parse_parameter, text, whole_number
from apps.rest.problems import Problem
from apps.rest.schema import documented, query


class Events(Endpoint):
    parameters = frozenset({"topic", "after"})

    @documented(
        "list_events",
        answer=EventsOutput,
        parameters=[
            query("topic", description=TOPICS, required=True),
            query("after", whole_number),
        ],
        summary="Events of a topic after a sequence number, oldest first",
    )
    def get(self, request: Request) -> Response:
        topic = parse_parameter(request, "topic", text)
        if topic is None:
            raise Problem(400, "invalid", f"topic is required: {TOPICS}.")
        permission = watch_permission(person(request), topic)
        if not permission.allowed:
            raise Problem(404, "not-found", permission.why)
        after = parse_parameter(request, "after", whole_number, default=0)
        newest = last_seq(topic)
        events = [event_to_wire(event) for event in events_after(topic, after)]
        return Response({"results": events, "seq": newest})
