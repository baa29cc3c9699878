from django.urls import path

from apps.accounts import api

urlpatterns = [
    path("me", api.Me.as_view()),
    path("tokens", api.Tokens.as_view()),
    path("tokens/<str:uid>", api.Token.as_view()),
]
