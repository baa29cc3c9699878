"""The one view behind every act of a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.serializers import Serializer

from apps.accounts.authentication import person, via
from apps.accounts.endpoint import Endpoint
from apps.accounts.step_up import require_recent_password
from apps.accounts.visibility import everything
from apps.rest.etag import given_version
from apps.rest.fields import ReasonInput, parse
from apps.rest.idempotency import idempotent
from apps.rest.schema import documented
from apps.rest.throttling import ActThrottle


def act_endpoint(
    name: str,
    service: Callable[..., Any],
    *,
    subject: str,
    find: Callable[[Request, str], Any],
    answer: Callable[[Request, Any], Response],
    output: type[Serializer[Any]],
    body: type[Serializer[Any]] = ReasonInput,
    status: int = 200,
    versioned: bool = False,
    dangerous: bool = False,
) -> type[Endpoint]:
    """A view that takes the same steps for every act, so that none of them forgets one.

    Args:
        name: the operation's name in clients.
        service: does the act, and returns what it has changed. It is called with the subject,
            ``user``, ``via`` and the fields of the body.
        subject: under which name the service takes what it acts on.
        find: the subject of an address; raises ``Problem`` 404.
        answer: the response that shows what the service returned.
        output: the serializer of that response, for the OpenAPI document.
        versioned: the act needs ``If-Match``; the service gets it as ``version``, None where it is
            missing, and refuses that after it has checked the rights.
        dangerous: a person in a browser needs to have given the password lately.
    """

    class ActEndpoint(Endpoint):
        throttle_classes = (ActThrottle,)

        @documented(name, body=body, answer=output, status=status, act=True, versioned=versioned)
        @idempotent
        def post(self, request: Request, /, **address: str) -> Response:
            if dangerous:
                require_recent_password(request)
            (key,) = address.values()
            arguments = {"version": given_version(request)} if versioned else {}
            arguments[subject] = find(request, key)
            arguments |= parse(body, request.data)
            with everything():  # the object was found within what this person sees
                changed = service(user=person(request), via=via(request), **arguments)
            return answer(request, changed)

    ActEndpoint.__name__ = ActEndpoint.__qualname__ = name.title().replace("_", "")
    return ActEndpoint
