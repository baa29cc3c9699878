"""The ASGI application: HTTP to Django, websockets to consumers.

Trainers authenticate by token only, so their sockets take neither cookies nor an Origin; browsers'
sockets use the session cookie, so their Origin must be the server's own. Who opens a socket with a
ticket has neither.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from django.core.asgi import get_asgi_application

from esper_web.tracing import trace_requests

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.local")
trace_requests()
django_application = get_asgi_application()

from channels.auth import AuthMiddlewareStack  # noqa: E402 (models exist only after set-up)
from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.urls import re_path  # noqa: E402

from apps.notifications.routing import websocket_urlpatterns as browser_routes  # noqa: E402
from apps.trainers.routing import websocket_urlpatterns as trainer_routes  # noqa: E402
from esper_web.body_limit import BodyLimit  # noqa: E402
from esper_web.same_origin import SameOrigin  # noqa: E402

# Static files come from whitenoise's synchronous iterators. Django reads each of them whole in a
# thread, which is what we want for files of this size, and warns about it once in each process.
warnings.filterwarnings("ignore", message="StreamingHttpResponse must consume synchronous")

TRAINER_PREFIX = "/ws/v1/trainer/"


class NoSuchSocket(AsyncWebsocketConsumer):
    """Answers an unknown path; URLRouter alone would raise and log a traceback for each scanner."""

    async def connect(self) -> None:
        """Answers 403 to the handshake."""
        await self.close(4404)


no_such_socket: Any = NoSuchSocket.as_asgi()
_nothing_else: Any = re_path(r"", no_such_socket)
trainer_sockets: Any = URLRouter([*trainer_routes, _nothing_else])
ticket_sockets: Any = URLRouter([*browser_routes, _nothing_else])
browser_sockets: Any = SameOrigin(AuthMiddlewareStack(URLRouter([*browser_routes, _nothing_else])))


async def sockets(scope: Any, receive: Any, send: Any) -> None:
    """Chooses by path and query: a trainer's socket, one with a ticket, or a browser's."""
    if str(scope["path"]).startswith(TRAINER_PREFIX):
        await trainer_sockets(scope, receive, send)
    elif scope["query_string"].startswith(b"ticket="):  # no cookie counts, so no Origin is needed
        await ticket_sockets(scope, receive, send)
    else:
        await browser_sockets(scope, receive, send)


application = ProtocolTypeRouter({"http": BodyLimit(django_application), "websocket": sockets})
