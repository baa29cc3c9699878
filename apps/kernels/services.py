"""All that other apps may do with kernels and their cache."""

from apps.kernels.cache import (
    SCRUB_BATCH,
    limit_cache,
    plan_warm_up,
    report_corrupt,
    scrub,
    warm,
    warm_next,
)
from apps.kernels.cache_store import kernel_store
from apps.kernels.rows import note_use, store_kernel

__all__ = [
    "SCRUB_BATCH",
    "kernel_store",
    "limit_cache",
    "note_use",
    "plan_warm_up",
    "report_corrupt",
    "scrub",
    "store_kernel",
    "warm",
    "warm_next",
]
