"""``/metrics``: counts, histograms, and that the board and the alerts name what is there."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from typing import Any

import pytest
import yaml
from django.test import Client
from django.utils import timezone
from prometheus_client.parser import text_string_to_metric_families

from apps.adaptations.models import Adaptation
from apps.workers.models import CompileJob
from hosts.paths import ROOT
from tests.apps.stage import make_stage

pytestmark = pytest.mark.django_db
MONITORING = ROOT / "docker" / "monitoring"


@pytest.fixture
def samples(settings: Any) -> Any:
    """Reads the metrics as Prometheus does: (name, labels) → value."""
    settings.ESPER_METRICS_TOKEN = "metrics-token"

    def scrape() -> dict[tuple[str, str], float]:
        answer = Client().get("/metrics", headers={"Authorization": "Bearer metrics-token"})
        assert answer.status_code == 200
        return {
            (sample.name, ",".join(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.content.decode())
            for sample in family.samples
        }

    return scrape


def test_decisions_pauses_and_builds_are_histograms(samples: Any) -> None:
    stage = make_stage()
    waiting = stage.propose(confidence=0.6)
    now = timezone.now()
    Adaptation.objects.filter(pk=waiting.pk).update(
        decided_by=stage.operator,
        created_at=now - timedelta(seconds=45),
        decided_at=now,
        pause_ms=12.0,
    )
    CompileJob.objects.create(
        adaptation_uid=waiting.uid, run_uid="r", blueprint_slug="b", layer={}, capability="cpu",
        build_ms=300.0,
    )  # fmt: skip
    found = samples()
    assert found["esper_decisions_total", "person"] == 1
    assert found["esper_decision_seconds_bucket", "30"] == 0
    assert found["esper_decision_seconds_bucket", "60"] == 1
    assert found["esper_decision_seconds_sum", ""] == pytest.approx(45.0)
    assert found["esper_pause_seconds_bucket", "0.01"] == 0
    assert found["esper_pause_seconds_bucket", "0.025"] == 1
    assert found["esper_build_seconds_sum", ""] == pytest.approx(0.3)
    assert found["esper_oldest_queued_seconds", ""] >= 0
    assert found["esper_oldest_pending_seconds", ""] >= 40


def test_the_board_and_the_alerts_name_metrics_that_exist(samples: Any) -> None:
    make_stage().propose(confidence=0.6)
    known = {name for name, _ in samples()} | {"esper_process_down", "esper_jobs",
                                               "esper_worker_age_seconds"}  # fmt: skip
    board = json.loads((MONITORING / "grafana.json").read_text())
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    named = {name for text in asked for name in re.findall(r"\besper_[a-z_]+", text)}
    assert len(named) > 15
    assert named - known == set()
    for group in rules["groups"]:
        for rule in group["rules"]:
            assert {"summary", "description"} <= set(rule["annotations"]), rule["alert"]
            assert rule["labels"]["severity"] in {"critical", "warning"}
