from django.urls import path

from apps.kernels import api

urlpatterns = [
    path("kernels", api.Kernels.as_view()),
    path("kernels/<str:digest>/<str:file>", api.KernelFile.as_view()),
    path("jobs", api.Jobs.as_view()),
    path("workers", api.Workers.as_view()),
    path("workers/<str:name>/drain", api.DrainWorker.as_view()),
    path("workers/<str:name>/quarantine", api.QuarantineWorker.as_view()),
    path("workers/<str:name>/release", api.ReleaseWorker.as_view()),
    path("services/tamiyo/heartbeat", api.TamiyoHeartbeat.as_view()),
]
