from django.urls import path

from apps.blueprints import api

urlpatterns = [
    path("remedies", api.KnownRemedies.as_view()),
    path("remedies/<str:slug>", api.KnownRemedyDetail.as_view()),
    path("blueprints", api.Blueprints.as_view()),
    path("blueprints/<str:slug>", api.BlueprintDetail.as_view()),
    path("blueprints/<str:slug>/enable", api.EnableBlueprint.as_view()),
    path("blueprints/<str:slug>/disable", api.DisableBlueprint.as_view()),
]
