"""Version 1 of the REST API. The apps know their own paths; nothing here knows the apps' code."""

from django.urls import include, path, re_path

from apps.rest.unknown import UnknownPath

_APPS = (
    "accounts",
    "audit",
    "notifications",
    "runs",
    "telemetry",
    "blueprints",
    "policies",
    "workers",
    "kernels",
    "violations",
    "recipes",
    "adaptations",
    "trainers",
)

urlpatterns = [
    *(path("", include(f"apps.{app}.urls")) for app in _APPS),
    re_path(r"^.*$", UnknownPath.as_view()),
]
