"""A backup is restored while a trainer trains on, which has a graft that the backup lacks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import another_python

from .conftest import TEST_SECONDS, Plant, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(TEST_SECONDS)]


def esper(plant: Plant, *words: str) -> str:
    environment = {**os.environ, "ESPER_DATA_DIR": str(plant.esper.data_dir)}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    answer = another_python.esper(*words, environment=environment)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_a_trainer_goes_on_with_a_restored_server_and_its_unknown_graft_can_be_undone(
    plant: Plant, tmp_path: Path
) -> None:
    file = tmp_path / "esper.backup"
    esper(plant, "backup", str(file))  # while it runs
    uid = plant.propose("squeeze")
    until(lambda: plant.state(uid) == "kept", "a graft that the backup lacks is kept")
    plant.esper.stop()
    shown = esper(plant, "restore", str(file))
    assert "The audit log is intact" in shown
    plant.start_again()

    until(lambda: plant.state(uid) == "kept", "the trainer reports it, and it is recovered")
    assert "recovered" in plant.states_in_audit(uid)
    violations = plant.call("ada", "GET", f"violations?run={plant.run}").json()["results"]
    assert [v for v in violations if v["adaptation_uid"] == uid and "does not know" in v["text"]]
    [(version,)] = plant.rows("SELECT version FROM adaptations_adaptation WHERE uid=?", uid)
    answer = plant.call(
        "ada",
        "POST",
        f"adaptations/{uid}/rollback",
        json={"reason": "nobody knows who approved it"},
        headers={"If-Match": f'"{version}"'},
    )
    assert answer.status_code == 200, answer.text
    until(lambda: plant.state(uid) == "reverted", "the trainer takes it out")
    before = plant.step()
    until(lambda: plant.step() > before, "the run reports")
    again = plant.propose("conv2")
    until(lambda: plant.ended(again), "adaptation goes on")
    assert plant.state(again) in {"kept", "rolled_back"}
    assert plant.trainer_lives()
    assert plant.call("ada", "GET", "audit/verify").json()["verified"]
