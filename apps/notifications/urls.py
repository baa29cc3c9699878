from django.urls import path

from apps.notifications import api

urlpatterns = [
    path("duty", api.Duty.as_view()),
    path("duty/<str:uid>", api.DutyDetail.as_view()),
    path("ws-tickets", api.SocketTickets.as_view()),
    path("events", api.Events.as_view()),
    path("channels", api.Channels.as_view()),
    path("channels/<str:uid>", api.ChannelDetail.as_view()),
    path("channels/<str:uid>/deliveries", api.Deliveries.as_view()),
    path("deliveries/<str:uid>/replay", api.ReplayDelivery.as_view()),
]
