from django.urls import path

from apps.runs.consumers import TrainerConsumer

websocket_urlpatterns = [path("ws/v1/trainer/<str:uid>", TrainerConsumer.as_asgi())]
