from django.urls import path

from apps.notifications import api

urlpatterns = [path("events", api.Events.as_view())]
