"""The pages of workers, kernels and their cache, and the questions before an act."""

from __future__ import annotations

import html
import re
from typing import Any

import pytest
from django.urls import reverse

from apps.accounts.actors import SYSTEM
from apps.adaptations.selectors import integration_status
from apps.audit.services import record
from apps.console.pages.workers import WorkerRow, compile_workers, queue
from apps.kernels.models import Kernel
from apps.recipes.models import Launch
from apps.workers.models import CompileJob, Worker

EAGER, COMPILED = "ab" * 32, "ef" * 32


def panel(world: Any, who: str, address: str, name: str) -> str:
    """The text of a panel, without tags."""
    text = world.client(who).get(address, {"panel": name}).content.decode()
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def row_of(name: str) -> WorkerRow:
    return next(row for row in compile_workers() if row.worker.name == name)


def test_a_worker_shows_its_memory_versions_and_the_step_it_is_at(world: Any) -> None:
    text = panel(world, "vera", "/workers", "workers")
    assert "host: 9,120 of 15,800 MiB free" in text
    assert "NVIDIA H100: 61,234 of 81,559 MiB free" in text
    assert "builder network closed by a network namespace" in text
    assert "attempt 2, since" in text
    assert "claimed forecast 40 ms built…" in text
    assert "In quarantine esper: 5 builders were lost in a row" in text
    assert "control@host-a" in panel(world, "vera", "/workers", "others")
    assert "Tamiyo" in panel(world, "vera", "/workers", "others")


def test_only_who_may_manage_workers_gets_buttons(world: Any) -> None:
    address = {"panel": "workers"}
    operators = world.client("olga").get("/workers", address).content.decode()
    assert "/api/v1/workers/compile%40host-a/drain" in operators
    assert "/api/v1/workers/compile%40host-a/quarantine" in operators
    assert "/api/v1/workers/compile%40host-b/release" in operators
    viewers = world.client("vera").get("/workers", address).content.decode()
    assert "/api/v1/workers/" not in viewers
    assert "may drain, quarantine and release workers" in viewers


def test_the_question_says_what_happens_to_the_job(world: Any) -> None:
    row = row_of("compile@host-a")
    assert row.job_drained == "It finishes mlp_gelu_2048 for classifier.2 first."
    assert row.job_refused.endswith("is refused, and the job goes back into the queue.")
    CompileJob.objects.filter(state="running").update(attempt=3)
    assert row_of("compile@host-a").job_refused.endswith("the job fails: it was its last attempt.")


def test_the_question_says_who_else_serves_the_queues(world: Any) -> None:
    alone = row_of("compile@host-a").others_wait
    assert "1 job waits in compile.cpu: nothing is built for it" in alone
    no_recipe = "No recipe can be started on host-a until this worker is released."
    assert f"{no_recipe} 1 launch there keeps running." in alone
    second = Worker.objects.get(name="compile@host-a")
    second.pk, second.name = None, "compile-2@host-a"
    second.save(force_insert=True)
    shared = row_of("compile@host-a").others_wait
    assert shared == "1 job waits in compile.cpu: other workers take it over."
    Worker.objects.filter(name="compile-2@host-a").update(mode="draining")
    assert row_of("compile@host-a").others_wait == alone
    Launch.objects.filter(branch_of__isnull=False).delete()
    Launch.objects.all().delete()
    assert row_of("compile@host-a").others_wait.endswith(no_recipe)


def test_the_queue_says_what_a_job_waits_for_in_the_words_of_the_api(world: Any) -> None:
    text = panel(world, "vera", "/workers", "queue")
    assert "stuck No running worker compiles for cuda.sm90" in text
    assert "1 running, 2 waiting" in text
    assert [(row.job.state, row.ahead) for row in queue().rows] == [
        ("running", 0),
        ("queued", 0),
        ("queued", 0),
    ]
    first = CompileJob.objects.get(state="queued", capability="cpu")
    first.pk, first.uid = None, "job_second"
    first.save(force_insert=True)
    assert "1 job ahead of it" in panel(world, "vera", "/workers", "queue")


def test_a_failed_job_keeps_the_log_of_its_attempts(world: Any) -> None:
    text = panel(world, "vera", "/workers", "jobs")
    assert "the log of 3 attempts" in text
    assert "Fatal Python error" in text


def test_a_kernel_shows_forecast_and_measured_side_by_side(world: Any) -> None:
    text = panel(world, "vera", f"/kernels/{EAGER}", "costs")
    assert "forward, as certified, ms 0.0840 0.0910" in text
    assert "forward pass, ms — 0.0930 0.127" in text
    assert "backward pass, ms — 0.201 0.288" in text
    assert "most memory at once, MiB — 0.113" in text


def test_tier_0_is_never_called_compiled(world: Any) -> None:
    assert "Tier 0, validated" in panel(world, "vera", f"/kernels/{EAGER}", "about")
    assert "1, compiled for this device" in panel(world, "vera", f"/kernels/{COMPILED}", "about")
    Kernel.objects.filter(tier=1).delete()
    assert "compiled" not in panel(world, "vera", "/kernels", "kernels")


def test_both_kernels_show_the_result_of_the_compiled_kernel(world: Any) -> None:
    text = panel(world, "vera", f"/kernels/{EAGER}", "speed_ups")
    assert "Kept eager" in text
    assert "compiled 0.94×, kept eager 1.02× 0.94×" in text
    assert "1.27× 1.31× this one" in panel(world, "vera", f"/kernels/{COMPILED}", "speed_ups")
    assert "compiled 1.31×, swapped in" in panel(world, "vera", "/kernels", "kernels")
    assert "topics-lm" in panel(world, "vera", f"/kernels/{COMPILED}", "users")


def test_the_page_says_why_a_kernel_cannot_be_evicted(world: Any) -> None:
    assert "unpin it before" in panel(world, "olga", f"/kernels/{COMPILED}", "kept")
    Kernel.objects.filter(digest=COMPILED).update(pinned_by="")
    free = world.client("olga").get(f"/kernels/{COMPILED}", {"panel": "kept"}).content.decode()
    assert "builds it again (about 42 ms)" in free
    world.adaptations["waiting"].kernel = Kernel.objects.get(digest=COMPILED)
    world.adaptations["waiting"].save()
    assert "It is in use" in panel(world, "olga", f"/kernels/{COMPILED}", "kept")
    viewers = world.client("vera").get(f"/kernels/{COMPILED}", {"panel": "kept"}).content.decode()
    assert "/api/v1/kernels/" not in viewers


def test_the_cache_panel_has_the_numbers_of_the_integration_status(world: Any) -> None:
    text = panel(world, "vera", "/kernels", "cache")
    stats = integration_status()["blueprint_cache_stats"]
    assert f"Kernels {stats['kernels']} {stats['pinned']} pinned" in text
    assert f"{stats['hits']} hits, {stats['misses']} miss" in text
    assert f"{stats['scrubbed']} checks, {stats['corrupt']} corrupt, 2 not checked yet" in text
    assert "Scrub now" not in text
    assert "Scrub now" in panel(world, "olga", "/kernels", "cache")


def test_the_cache_panel_lists_corrupt_kernels_and_links_those_that_still_exist(
    world: Any,
) -> None:
    for digest in (EAGER, "00" * 32):
        record(
            actor=SYSTEM,
            act="kernel.corrupt",
            object_kind="kernel",
            object_uid=digest,
            reason="the digest is another one",
            data={"blueprint": "mlp_gelu_2048"},
        )
    text = world.client("vera").get("/kernels", {"panel": "cache"}).content.decode()
    assert text.count("mlp_gelu_2048: the digest is another one") == 2
    assert f"/kernels/{EAGER}" in text
    assert f"/kernels/{'00' * 32}" not in text


def test_a_merged_graft_offers_no_rollback_and_says_why(world: Any) -> None:
    address = reverse("console:adaptation", args=[world.adaptations["merged"].uid])
    acts = world.client("olga").get(address, {"panel": "acts"}).content.decode()
    assert 'data-path="rollback"' not in acts
    assert "cannot be taken out of them any more" in acts
    assert "kept for good" in panel(world, "vera", address, "head")
    kept = reverse("console:adaptation", args=[world.adaptations["kept"].uid])
    plain = world.client("olga").get(kept, {"panel": "acts"}).content.decode()
    assert 'data-path="rollback"' in plain


@pytest.mark.parametrize(
    ("name", "words"),
    [("merged", "compiled 1.31×, swapped in"), ("kept", "compiled 0.94×, kept eager")],
)
def test_an_adaptation_page_shows_the_result_of_its_compiled_kernel(
    world: Any, name: str, words: str
) -> None:
    adaptation = world.adaptations[name]
    address = reverse("console:adaptation", args=[adaptation.uid])
    assert words in panel(world, "vera", address, "progress")
    assert words in panel(world, "vera", address, "outcome")
    run = reverse("console:run", args=[adaptation.run.uid])
    assert words in panel(world, "vera", run, "timeline")


def test_a_merge_is_shown_in_the_timeline_and_in_the_progress(world: Any) -> None:
    merged = world.adaptations["merged"]
    run = reverse("console:run", args=[merged.run.uid])
    assert "60 Kernel of" in panel(world, "vera", run, "timeline")
    assert f"Merge classifier.0 ( A-{merged.number} )" in panel(world, "vera", run, "timeline")
    address = reverse("console:adaptation", args=[merged.uid])
    assert "Merge at step 90, by the training script" in panel(world, "vera", address, "progress")
