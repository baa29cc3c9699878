from django.urls import path

from apps.kernels import api, cache_api

urlpatterns = [
    path("kernels", api.Kernels.as_view()),
    path("kernels/cache", cache_api.Cache.as_view()),
    path("kernels/cache/scrub", cache_api.CacheScrub.as_view()),
    path("kernels/<str:digest>/pin", cache_api.PinKernel.as_view()),
    path("kernels/<str:digest>/unpin", cache_api.UnpinKernel.as_view()),
    path("kernels/<str:digest>/evict", cache_api.EvictKernel.as_view()),
    path("kernels/<str:digest>/<str:file>", api.KernelFile.as_view()),
    path("jobs", api.Jobs.as_view()),
    path("workers", api.Workers.as_view()),
    path("workers/<str:name>/drain", api.DrainWorker.as_view()),
    path("workers/<str:name>/quarantine", api.QuarantineWorker.as_view()),
    path("workers/<str:name>/release", api.ReleaseWorker.as_view()),
    path("services/tamiyo/heartbeat", api.TamiyoHeartbeat.as_view()),
]
