from django.urls import path

from apps.runs import api

urlpatterns = [
    path("runs/<str:uid>", api.RunDetail.as_view()),
    path("runs/<str:uid>/pause-adaptation", api.PauseAdaptation.as_view()),
    path("runs/<str:uid>/resume-adaptation", api.ResumeAdaptation.as_view()),
    path("runs/<str:uid>/stop", api.StopRun.as_view()),
]
