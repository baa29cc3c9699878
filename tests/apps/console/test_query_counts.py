"""Pages cost the same number of queries however many rows they show."""

from __future__ import annotations

from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from apps.adaptations.models import Adaptation
from apps.kernels.models import Kernel, SpeedUp
from apps.runs.models import Run
from apps.violations.models import Violation
from apps.workers.models import CompileJob, JobStepDone, Worker
from esper.contracts import AdaptationState


def count_queries(client: Any, address: str) -> int:
    client.get(address)  # session and content types are read once
    with CaptureQueriesContext(
        connection,
    ) as captured:
        assert client.get(address).status_code == 200
    return len(captured)


def grow(world: Any) -> None:
    """Ten more runs, each with an adaptation that waits and a violation; ten more of the pool."""
    grow_pool()
    model, adaptation = world.runs["digits-cnn"], world.adaptations["waiting"]
    for number in range(10):
        run = Run.objects.get(pk=model.pk)
        run.pk, run.uid, run.name = None, f"run_{number}", f"more-{number}"
        run.save(force_insert=True)
        copy = Adaptation.objects.get(pk=adaptation.pk)
        copy.pk, copy.uid, copy.idempotency_key, copy.run = None, f"adp_{number}", str(number), run
        copy.save(force_insert=True)
        other = Adaptation.objects.get(pk=world.adaptations["kept"].pk)
        other.pk, other.uid, other.idempotency_key = None, f"adp_k{number}", f"k{number}"
        other.state = AdaptationState.REVERTED
        other.save(force_insert=True)
        violation = Violation.objects.get(run=world.runs["topics-lm"])
        violation.pk, violation.uid, violation.run = None, f"vio_{number}", run
        violation.save(force_insert=True)


def grow_pool() -> None:
    """Ten more workers at a job, jobs with steps, kernels, and compiled kernels of one."""
    worker = Worker.objects.get(name="compile@host-a")
    job = CompileJob.objects.get(state="running")
    kernel = Kernel.objects.get(tier=1)
    trial = SpeedUp.objects.get(state="kept_eager")
    for number in range(10):
        worker.pk, worker.name, worker.host = None, f"compile@more-{number}", f"more-{number}"
        worker.save(force_insert=True)
        for kind in ("running", "queued", "done"):
            job.pk, job.uid, job.state = None, f"job_{kind}_{number}", kind
            job.lease_owner, job.kernel_digest = worker.name, "ab" * 32
            job.save(force_insert=True)
            JobStepDone.objects.create(job=job, attempt=2, step="claimed", at=job.queued_at)
        kernel.pk, kernel.digest, kernel.key_hash = None, f"{number}", f"{number}"
        kernel.save(force_insert=True)
        trial.pk, trial.adaptation_uid, trial.kernel = None, f"adp_k{number}", kernel
        trial.save(force_insert=True)


@pytest.mark.parametrize(
    ("address", "most"),
    [
        ("/", 19),
        ("/inbox", 11),
        ("/inbox?state=history", 11),
        ("/runs", 11),
        ("/violations", 8),
        ("/kernels", 18),
        (f"/kernels/{'ab' * 32}", 19),
        ("/workers", 19),
        ("/recipes", 10),
        ("/blueprints", 7),
        ("/blueprints/mlp_gelu_2048", 10),
        ("run", 26),
    ],
)
def test_a_page_costs_the_same_with_ten_times_the_rows(world: Any, address: str, most: int) -> None:
    client = world.client("olga")
    if address == "run":
        address = f"/runs/{world.runs['digits-cnn'].uid}"
    before = count_queries(client, address)
    grow(world)
    assert count_queries(client, address) == before
    assert before <= most
