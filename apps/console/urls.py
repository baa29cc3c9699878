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
    path("workers", views.workers, name="workers"),
    path("kernels", views.kernels, name="kernels"),
    path("kernels/<str:digest>", views.kernel, name="kernel"),
    path("recipes", views.recipes, name="recipes"),
    path("recipes/<str:uid>", views.recipe, name="recipe"),
    path("launches/<str:uid>", views.launch, name="launch"),
    path("audit", views.audit, name="audit"),
    path("me", views.me, name="me"),
]
