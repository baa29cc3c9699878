from django.urls import path

from apps.runs import api

urlpatterns = [
    path("runs/<str:uid>", api.RunDetail.as_view()),
    path("runs/<str:uid>/stop", api.StopRun.as_view()),
]
