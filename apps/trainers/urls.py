from django.urls import path

from apps.trainers import api

urlpatterns = [
    path("runs", api.Runs.as_view()),
    path("runs/<str:uid>/hello", api.Hello.as_view()),
    path("runs/<str:uid>/telemetry", api.Telemetry.as_view()),
    path("runs/<str:uid>/commands", api.RunCommands.as_view()),
    path("runs/<str:uid>/commands/<str:seq>/ack", api.CommandAnswer.as_view()),
    path("runs/<str:uid>/rollbacks", api.LocalRollbacks.as_view()),
    path("runs/<str:uid>/remedies", api.Remedies.as_view()),
    path("runs/<str:uid>/remedy-proposals", api.RemedyProposals.as_view()),
    path("runs/<str:uid>/remedy-verdicts", api.RemedyVerdicts.as_view()),
    path("runs/<str:uid>/finish", api.Finish.as_view()),
]
