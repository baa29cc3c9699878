from django.urls import path

from apps.violations import api

urlpatterns = [
    path("violations", api.Violations.as_view()),
    path("violations/acknowledge", api.AcknowledgeViolations.as_view()),
    path("violations/<str:uid>", api.ViolationDetail.as_view()),
    path("violations/<str:uid>/acknowledge", api.AcknowledgeViolation.as_view()),
]
