from django.urls import path

from apps.policies import api

urlpatterns = [
    path("policies", api.Policies.as_view()),
    path("policies/current", api.CurrentPolicy.as_view()),
    path("runs/<str:uid>/policy", api.RunPolicy.as_view()),
    path("policies/<int:version>", api.PolicyDetail.as_view()),
    path("policies/<str:version>/approve", api.ApprovePolicy.as_view()),
    path("policies/<str:version>/withdraw", api.WithdrawPolicy.as_view()),
    path("freezes", api.Freezes.as_view()),
    path("freezes/<str:uid>/end", api.EndFreeze.as_view()),
]
