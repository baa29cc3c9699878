"""The kernel cache: what stays, what goes, what is found corrupt, and what is built ahead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.utils import timezone

from apps.adaptations.models import Adaptation
from apps.adaptations.selectors import integration_status
from apps.audit.models import AuditEvent
from apps.kernels import cache
from apps.kernels.cache_store import count, kernel_store
from apps.kernels.models import Kernel, WarmUp
from apps.kernels.selectors import Counter, cache_stats, evictable
from apps.kernels.services import store_kernel
from apps.notifications.models import OutboxMessage
from apps.rest.problems import Problem
from apps.violations.models import Violation
from apps.workers.models import CompileJob
from apps.workers.services import close_builders
from esper.compilation.bundle import pack
from esper.contracts import (
    CommandState,
    CostForecast,
    JobState,
    KernelDraft,
    KernelKey,
    KernelReport,
    KernelSpec,
)
from tests.apps.cast import CERTIFICATE, make_layer
from tests.apps.stage import Stage

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def empty_store(settings: Any, tmp_path: Path) -> Iterator[None]:
    settings.ESPER_KERNEL_STORE_DIR = tmp_path / "kernels"
    yield
    close_builders()
    assert not list((tmp_path / "kernels").glob(".incoming*"))


@pytest.fixture
def stored(kernel_private_key: str) -> Any:
    """Signs, stores and notes the kernel number ``n``; used ``n`` days after the epoch."""

    def make(number: int, **fields: Any) -> Kernel:
        version, config, shape = "0123456789abcdef", {"rank": number}, (8, 16)
        key = KernelKey("proj_lora_64", version, config, "Linear", shape, shape, "float32", "cpu",
                        "x86_64 AVX2", "2.13.0", "3.11.7")  # fmt: skip
        report = KernelReport(CERTIFICATE, CostForecast(128, 2048, 0.01, 0.1))
        bundle = pack(
            KernelDraft(key, KernelSpec("proj_lora_64", version, config, 7), report),
            private_key=kernel_private_key,
        )
        kernel_store().put(bundle)
        kernel = store_kernel(bundle=bundle, key=key, report=report, worker="w", build_ms=20.0)
        used = timezone.now().replace(year=2000, month=1, day=number)
        Kernel.objects.filter(pk=kernel.pk).update(last_used_at=used, **fields)
        kernel.refresh_from_db()
        return kernel

    return make


def in_store() -> set[str]:
    return set(kernel_store().list())


def limited(settings: Any, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(cache, "MIB", 1)
    settings.ESPER_KERNEL_CACHE_MIB = most


@pytest.mark.django_db(transaction=True)
def test_the_longest_unused_go_first_and_only_until_the_rest_fits(
    stage: Stage, stored: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (stored(number) for number in (1, 2, 3))
    limited(settings, monkeypatch, second.size_bytes + third.size_bytes)

    assert cache.limit_cache() == 1

    assert in_store() == {second.digest, third.digest}
    first.refresh_from_db()
    assert first.evicted_at is not None  # the row stays
    assert cache_stats()["evictions"] == 1
    assert AuditEvent.objects.get(act="kernel.evicted").object_uid == first.digest
    assert cache.limit_cache() == 0


@pytest.mark.django_db(transaction=True)
def test_pinned_and_needed_kernels_are_never_evicted(
    stage: Stage, stored: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned, needed, ordered, free = (stored(number) for number in (1, 2, 3, 4))
    cache.pin(kernel=pinned, user=stage.operator, via="api")
    adaptation = stage.propose()
    Adaptation.objects.filter(pk=adaptation.pk).update(kernel=needed)
    stage.run.commands.create(
        epoch=1, seq=900, kind="graft", kernel_digest=ordered.digest, signature="",
        state=CommandState.ISSUED, issued_at=timezone.now(), expires_at=timezone.now(),
    )  # fmt: skip
    limited(settings, monkeypatch, 1)

    assert [kernel.pk for kernel in evictable()] == [free.pk]
    assert cache.limit_cache() == 1

    assert in_store() == {pinned.digest, needed.digest, ordered.digest}
    for kernel in (pinned, needed, ordered):
        with pytest.raises(Problem, match="pinned, in use"):
            cache.evict(kernel=kernel, user=stage.operator, via="api")


@pytest.mark.django_db(transaction=True)
def test_a_person_pins_unpins_and_evicts_and_the_log_says_who(stage: Stage, stored: Any) -> None:
    kernel = stored(1)
    for act in (cache.pin, cache.unpin, cache.evict):
        with pytest.raises(Problem, match="Only"):
            act(kernel=kernel, user=stage.viewer, via="api")

    assert cache.pin(kernel=kernel, user=stage.operator, via="api").pinned_by == "olga"
    assert cache.unpin(kernel=kernel, user=stage.operator, via="api").pinned_by == ""
    assert cache.evict(kernel=kernel, user=stage.operator, via="api", reason="old").evicted_at

    assert in_store() == set()
    acts = AuditEvent.objects.filter(object_uid=kernel.digest).values_list("act", "actor")
    assert [act for act, _ in acts.order_by("id")] == [
        "kernel.pinned",
        "kernel.unpinned",
        "kernel.evicted",
    ]
    with pytest.raises(Problem, match="not in the cache"):
        cache.pin(kernel=kernel, user=stage.operator, via="api")


@pytest.mark.parametrize("harm", ["a flipped bit", "a missing file", "a missing kernel"])
def test_a_corrupt_kernel_is_moved_away_reported_and_asked_for_again(
    stage: Stage, stored: Any, harm: str
) -> None:
    good, bad = stored(1), stored(2)
    CompileJob.objects.create(
        adaptation_uid="a", run_uid=stage.run.uid, blueprint_slug="proj_lora_64",
        config={"rank": 2}, layer=make_layer().to_wire(), capability="cpu",
        kernel_digest=bad.digest, state=JobState.DONE,
    )  # fmt: skip
    folder = kernel_store().path(bad.digest)  # type: ignore[attr-defined]
    if harm == "a flipped bit":
        data = bytearray((folder / "recipe.json").read_bytes())
        data[5] ^= 1
        (folder / "recipe.json").write_bytes(data)
    elif harm == "a missing file":
        (folder / "report.json").unlink()
    else:
        kernel_store().remove(bad.digest)

    assert cache.scrub() == 1
    assert cache.scrub() == 0  # said once

    assert in_store() == {good.digest}
    violation = Violation.objects.get(run=None)
    assert bad.digest[:12] in violation.text
    assert AuditEvent.objects.filter(act="kernel.corrupt", object_uid=bad.digest).count() == 1
    assert (cache_stats()["corrupt"], cache_stats()["scrubbed"]) == (1, 3)
    again = WarmUp.objects.get(config={"rank": 2})
    assert again.state == JobState.QUEUED


def test_jobs_name_the_new_digest_of_a_kernel_that_is_built_again(
    stage: Stage, stored: Any
) -> None:
    kernel = stored(1)
    Kernel.objects.filter(pk=kernel.pk).update(digest="ab" * 32)  # an earlier build of the same key
    CompileJob.objects.create(
        adaptation_uid="a", run_uid=stage.run.uid, blueprint_slug="proj_lora_64",
        layer={}, capability="cpu", kernel_digest="ab" * 32, state=JobState.DONE,
    )  # fmt: skip

    again = stored(1)

    assert again.pk == kernel.pk
    assert CompileJob.objects.get().kernel_digest == again.digest != "ab" * 32


def test_scrubbing_is_asked_for_by_a_person_and_done_by_a_worker(stage: Stage, stored: Any) -> None:
    kernel = stored(1, scrubbed_at=timezone.now())

    cache.scrub_now(user=stage.operator, via="api")

    kernel.refresh_from_db()
    assert kernel.scrubbed_at is None
    assert OutboxMessage.objects.filter(task="kernels.scrub").exists()
    with pytest.raises(Problem, match="Only"):
        cache.scrub_now(user=stage.viewer, via="api")


def test_a_run_that_registers_has_a_few_likely_kernels_built_when_nobody_waits(
    stage: Stage, settings: Any, tmp_path: Path, kernel_private_key: str
) -> None:
    WarmUp.objects.all().delete()
    key_file = tmp_path / "key"
    key_file.write_text(kernel_private_key)
    settings.ESPER_KERNEL_KEY_FILE, settings.ESPER_WARM_UP_KERNELS = str(key_file), 2
    layers = [make_layer(f"fc{n}").to_wire() for n in range(3)]  # one shape: one set of kernels
    layers += [{**make_layer("big").to_wire(), "parameters": 10**6, "graftable": False}]

    assert cache.plan_warm_up(run_uid=stage.run.uid, layers=layers, capability="cpu") == 2
    assert cache.plan_warm_up(run_uid=stage.run.uid, layers=layers[:1], capability="cpu") == 1
    one = WarmUp.objects.order_by("id").first()
    assert one is not None

    job = CompileJob.objects.create(
        adaptation_uid="a", run_uid="r", blueprint_slug="x", layer={}, capability="cpu"
    )
    assert cache.warm_next() == 0  # a run waits for the worker
    cache.warm(one.pk, worker="w")
    assert not in_store()
    job.delete()

    assert cache.warm_next() == 1
    cache.warm(one.pk, worker="w")
    cache.warm(one.pk, worker="w")  # a repeated message

    one.refresh_from_db()
    assert one.state == JobState.DONE
    assert len(in_store()) == 1
    assert cache_stats()["warmed"] == 1


def test_page_and_status_read_the_same_numbers(stage: Stage, stored: Any) -> None:
    stored(1)
    count(Counter.HOST_HITS, 3)
    count(Counter.HOST_HITS)

    stats = integration_status()["blueprint_cache_stats"]

    assert stats == cache_stats()
    assert stats["host_hits"] == 4
    assert stats["kernels"] == 1
    assert stats["bytes"] > 0


def test_an_evicted_kernel_that_is_built_again_is_there_again(stage: Stage, stored: Any) -> None:
    kernel = stored(1, evicted_at=timezone.now())
    assert cache_stats()["kernels"] == 0

    stored(1)

    kernel.refresh_from_db()
    assert kernel.evicted_at is None
