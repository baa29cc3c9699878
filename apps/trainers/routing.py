from typing import Any

from django.urls import path

from apps.trainers.consumers import TrainerConsumer

# path() is typed for views; channels gives it applications.
_consumer: Any = TrainerConsumer.as_asgi()

websocket_urlpatterns = [path("ws/v1/trainer/<str:uid>", _consumer)]
