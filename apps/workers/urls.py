from django.urls import path

from apps.workers import api

urlpatterns = [
    path("jobs", api.Jobs.as_view()),
    path("jobs/<str:uid>", api.JobDetail.as_view()),
    path("workers/<str:name>", api.WorkerDetail.as_view()),
    path("workers", api.Workers.as_view()),
    path("workers/<str:name>/drain", api.DrainWorker.as_view()),
    path("workers/<str:name>/quarantine", api.QuarantineWorker.as_view()),
    path("workers/<str:name>/release", api.ReleaseWorker.as_view()),
    path("services/tamiyo/heartbeat", api.TamiyoHeartbeat.as_view()),
]
