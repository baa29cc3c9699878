from django.urls import path

from apps.accounts import (
    api,
    people_api,
    project_api,
    schema,  # noqa: F401 (its import registers the schemes)
)

urlpatterns = [
    path("", api.Index.as_view()),
    path("me", api.Me.as_view()),
    path("sessions", api.Sessions.as_view()),
    path("sessions/end-others", api.EndOtherSessions.as_view()),
    path("people/<str:name>/remove-second-factor", people_api.RemoveSecondFactor.as_view()),
    path("projects", project_api.Projects.as_view()),
    path("projects/<str:uid>", project_api.ProjectDetail.as_view()),
    path("projects/<str:uid>/set-member", project_api.SetMember.as_view()),
    path("projects/<str:uid>/create-service-account", project_api.CreateServiceAccount.as_view()),
    path("projects/<str:uid>/end-service-account", project_api.EndServiceAccount.as_view()),
    path("tokens", api.Tokens.as_view()),
    path("tokens/<str:uid>", api.Token.as_view()),
]
