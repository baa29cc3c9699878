from django.urls import path

from apps.kernels import api, cache_api

urlpatterns = [
    path("kernels", api.Kernels.as_view()),
    path("kernels/cache", cache_api.Cache.as_view()),
    path("kernels/cache/scrub", cache_api.CacheScrub.as_view()),
    path("kernels/<str:digest>", api.KernelDetail.as_view()),
    path("kernels/<str:digest>/pin", cache_api.PinKernel.as_view()),
    path("kernels/<str:digest>/unpin", cache_api.UnpinKernel.as_view()),
    path("kernels/<str:digest>/evict", cache_api.EvictKernel.as_view()),
    path("kernels/<str:digest>/<str:file>", api.KernelFile.as_view()),
]
