"""The installation's kernel store, as its settings name it."""

from __future__ import annotations

from functools import lru_cache

from django.conf import settings
from django.db.models import F

from apps.kernels.models import CacheCounter
from apps.kernels.selectors import MIB
from esper.compilation.store import Store
from esper.compilation.store_tiers import open_store


def kernel_store() -> Store:
    """The store of this process; made once for each place that the settings name."""
    return _open(
        str(settings.ESPER_KERNEL_STORE_DIR),
        settings.ESPER_KERNEL_STORE_URL,
        settings.ESPER_HOST_CACHE_MIB * MIB,
    )


@lru_cache(maxsize=4)
def _open(directory: str, url: str, near_bytes: int) -> Store:
    return open_store(directory, url, near_bytes=near_bytes, count=count)


def count(name: str, by: int = 1) -> None:
    """Add to one of ``selectors.Counter``, for all processes and for good."""
    if not CacheCounter.objects.filter(pk=name).update(value=F("value") + by):
        counter, made = CacheCounter.objects.get_or_create(pk=name, defaults={"value": by})
        if not made:
            CacheCounter.objects.filter(pk=counter.pk).update(value=F("value") + by)
