from typing import Any

from django.urls import path

from apps.notifications.consumers import StreamConsumer

# path() is typed for views; channels gives it applications.
_consumer: Any = StreamConsumer.as_asgi()

websocket_urlpatterns = [path("ws/v1/stream", _consumer)]
