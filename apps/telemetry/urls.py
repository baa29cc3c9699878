from django.urls import path

from apps.telemetry import api

urlpatterns = [
    path("runs/<str:uid>/frames", api.Frames.as_view()),
    path("runs/<str:uid>/metrics", api.Series.as_view()),
    path("runs/<str:uid>/heatmap", api.Heatmap.as_view()),
]
