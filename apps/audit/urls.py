from django.urls import path

from apps.audit import api

urlpatterns = [
    path("audit", api.AuditLog.as_view()),
    path("audit/<int:number>", api.AuditEntry.as_view()),
    path("audit/verify", api.AuditVerification.as_view()),
    path("audit/export", api.AuditExport.as_view()),
]
