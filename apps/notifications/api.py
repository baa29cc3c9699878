from __future__ import annotations

from django.http import HttpResponseBase
from rest_framework.request import Request
from rest_framework.response import Response

from apps.accounts.act_endpoint import act_endpoint
from apps.accounts.authentication import person, via
from apps.accounts.endpoint import READERS, Endpoint
from apps.accounts.models import ApiToken, User
from apps.notifications.channels import add_channel, remove_channel, replay
from apps.notifications.duty import add_shift, coming_shifts, remove_shift
from apps.notifications.models import Channel, Delivery, DutyShift
from apps.notifications.serializers import (
    ChannelInput,
    ChannelOutput,
    DeliveryOutput,
    EventsOutput,
    NewChannelOutput,
    ShiftInput,
    ShiftOutput,
    TicketOutput,
)
from apps.notifications.services import event_to_wire, events_after, last_seq
from apps.notifications.tickets import issue_ticket
from apps.notifications.topics import TOPICS, watch_permission
from apps.rest.etag import cacheable_response
from apps.rest.fields import parse
from apps.rest.filters import parse_parameter, text, whole_number
from apps.rest.idempotency import idempotent
from apps.rest.pagination import PARAMETERS, page_response
from apps.rest.problems import Problem, not_found
from apps.rest.schema import documented, listing, page_of, query
from apps.rest.throttling import ActThrottle


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


class SocketTickets(Endpoint):
    throttle_classes = (ActThrottle,)
    writers = READERS

    @documented(
        "issue_socket_ticket",
        answer=TicketOutput,
        status=201,
        summary="A ticket for one socket, for clients without a browser's session",
    )
    def post(self, request: Request) -> Response:
        token = request.auth if isinstance(request.auth, ApiToken) else None
        ticket, ends = issue_ticket(person(request), token)
        site = request.build_absolute_uri("/ws/v1/stream")
        url = f"ws{site.removeprefix('http')}?ticket={ticket}"
        answer = {"ticket": ticket, "expires_at": ends, "url": url}
        return Response(TicketOutput(answer).data, status=201)


class Duty(Endpoint):
    throttle_classes = (ActThrottle,)
    parameters = PARAMETERS

    @documented("list_duty", answer=page_of(ShiftOutput), parameters=listing())
    def get(self, request: Request) -> HttpResponseBase:
        """Shifts of now and later."""
        rows = coming_shifts()
        return page_response(request, rows, lambda rows: ShiftOutput(rows, many=True).data)

    @documented("add_duty", body=ShiftInput, answer=ShiftOutput, status=201, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        given = parse(ShiftInput, request.data)
        name = given["who"]
        who = User.objects.filter(username=name).first() if name else person(request)
        if who is None:
            raise Problem(422, "invalid", f"There is nobody called {name!r}.")
        shift = add_shift(
            who=who,
            begins=given["begins"],
            ends=given["ends"],
            user=person(request),
            via=via(request),
        )
        return Response(ShiftOutput(shift).data, status=201)


class DutyDetail(Endpoint):
    @documented("remove_duty", answer=None, status=204)
    def delete(self, request: Request, uid: str) -> Response:
        shift = DutyShift.objects.select_related("user").filter(uid=uid).first()
        if shift is None:
            raise not_found("shift")
        remove_shift(shift=shift, user=person(request), via=via(request))
        return Response(status=204)


class Channels(Endpoint):
    throttle_classes = (ActThrottle,)
    parameters = PARAMETERS

    @documented("list_channels", answer=page_of(ChannelOutput), parameters=listing())
    def get(self, request: Request) -> HttpResponseBase:
        """The caller's own."""
        rows = Channel.objects.filter(owner=person(request))
        return page_response(request, rows, lambda rows: ChannelOutput(rows, many=True).data)

    @documented("add_channel", body=ChannelInput, answer=NewChannelOutput, status=201, act=True)
    @idempotent
    def post(self, request: Request) -> Response:
        channel, secret = add_channel(
            owner=person(request),
            via=via(request),
            site=request.build_absolute_uri("/"),
            **parse(ChannelInput, request.data),
        )
        return Response(NewChannelOutput(channel, context={"secret": secret}).data, status=201)


class ChannelDetail(Endpoint):
    @documented("read_channel", answer=ChannelOutput)
    def get(self, request: Request, uid: str) -> Response:
        return cacheable_response(request, ChannelOutput(_channel(request, uid)).data)

    @documented("remove_channel", answer=None, status=204)
    def delete(self, request: Request, uid: str) -> Response:
        remove_channel(channel=_channel(request, uid), user=person(request), via=via(request))
        return Response(status=204)


class Deliveries(Endpoint):
    parameters = PARAMETERS

    @documented(
        "list_deliveries",
        answer=page_of(DeliveryOutput),
        parameters=listing(),
        summary="What was sent to a channel, and what became of it",
    )
    def get(self, request: Request, uid: str) -> HttpResponseBase:
        rows = _channel(request, uid).deliveries.select_related("channel")
        return page_response(request, rows, lambda rows: DeliveryOutput(rows, many=True).data)


ReplayDelivery = act_endpoint(
    "replay_delivery",
    lambda *, delivery, user, via, **_: replay(delivery=delivery, user=user, via=via),
    subject="delivery",
    find=lambda request, uid: _delivery(request, uid),
    answer=lambda _, delivery: Response(DeliveryOutput(delivery).data),
    output=DeliveryOutput,
)


def _channel(request: Request, uid: str) -> Channel:
    found = Channel.objects.filter(owner=person(request), uid=uid).first()
    if found is None:
        raise not_found("channel")
    return found


def _delivery(request: Request, uid: str) -> Delivery:
    own = Delivery.objects.filter(channel__owner=person(request))
    found = own.select_related("channel").filter(uid=uid).first()
    if found is None:
        raise not_found("delivery")
    return found
