"""The pages."""

from django.urls import path

from apps.console import views

app_name = "console"
urlpatterns = [
    path("login", views.SignIn.as_view(), name="sign-in"),
    path("logout", views.SignOut.as_view(), name="sign-out"),
    path("bar", views.bar, name="bar"),
    path("", views.overview, name="overview"),
    path("inbox", views.inbox, name="inbox"),
    path("runs", views.runs, name="runs"),
    path("runs/<str:uid>", views.run, name="run"),
    path("adaptations/<str:uid>", views.adaptation, name="adaptation"),
    path("blueprints", views.blueprints, name="blueprints"),
    path("blueprints/<slug:slug>", views.blueprint, name="blueprint"),
    path("violations", views.violations, name="violations"),
    path("policy", views.policy, name="policy"),
    path("kernels", views.kernels, name="kernels"),
    path("audit", views.audit, name="audit"),
    path("me", views.me, name="me"),
]
