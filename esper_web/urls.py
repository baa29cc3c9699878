"""The routes of the web process."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView

from apps.console.pages.sign_in import admin_sign_in
from apps.rest.problem_codes import problems_page
from esper_web import probes

urlpatterns = [
    path("healthz", probes.healthz, name="healthz"),
    path("readyz", probes.readyz, name="readyz"),
    path("metrics", probes.metrics, name="metrics"),
    path("admin/login/", admin_sign_in),
    path("admin/", admin.site.urls),
    path("api/v1/", include("esper_web.api_v1")),
    path("api/schema", SpectacularAPIView.as_view(), name="schema"),
    path(
        "api/docs",
        SpectacularSwaggerSplitView.as_view(template_name="esper_web/api_docs.html"),
        name="api-docs",
    ),
    path("api/docs/problems", problems_page, name="api-problems"),
    path("", include("apps.console.urls")),
]
