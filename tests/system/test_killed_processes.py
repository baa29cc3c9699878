"""Kill any one process while adaptations live: the others go on, and nothing is lost or doubled."""

from __future__ import annotations

import re
import time

import pytest

from .conftest import TEST_SECONDS, Plant, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(TEST_SECONDS)]

# Each child with the adaptation that is under way when it is killed.
KILLED = {
    "web": ("conv1", "mon_act_stats"),
    "worker-control": ("conv2", "mon_act_stats"),
    "worker-compile": ("conv3", "mon_act_stats"),
    "tamiyo": ("squeeze", "mon_act_stats"),
    "valkey": ("head", "mon_act_stats"),
    "beat": ("conv1", "clamp_grad_norm"),
}
ENDS = {"kept", "rolled_back"}


def check_nothing_is_lost_or_doubled(plant: Plant) -> None:
    applied = plant.rows(
        "SELECT adaptation_uid, count(*) FROM runs_command WHERE kind='graft' AND state='applied' "
        "GROUP BY adaptation_uid HAVING count(*) > 1"
    )
    assert applied == []
    for uid in plant.uids:
        states = plant.states_in_audit(uid)
        assert states.count("probation") == 1 + states.count("in_doubt"), states
    assert plant.call("ada", "GET", "audit/verify").json()["verified"]


def trained_to(plant: Plant) -> int:
    """The last step that the trainer has printed, whether a server hears of it or not."""
    printed = re.findall(r"^step (\d+)", (plant.folder / "trainer.log").read_text(), re.MULTILINE)
    return max(map(int, printed), default=0)


def test_any_child_may_be_killed_while_an_adaptation_lives(plant: Plant) -> None:
    for index, (child, (layer, blueprint)) in enumerate(KILLED.items()):
        uid = plant.propose(layer, blueprint)
        time.sleep(0.05 * index)  # another moment of its life each time
        before = plant.step()
        old = plant.esper.kill(child)
        plant.esper.wait_restarted(child, old)
        until(lambda uid=uid: plant.ended(uid), f"{uid} ended although {child} was killed")
        assert plant.state(uid) in ENDS, f"{child} was killed\n{plant.story(uid)}"
        until(lambda before=before: plant.step() > before, "the run reports again")
        assert plant.trainer_lives()
    check_nothing_is_lost_or_doubled(plant)


def test_a_killed_trainer_comes_back_and_its_graft_is_settled(plant: Plant) -> None:
    until(lambda: (plant.folder / "digits.pt").exists(), "a first checkpoint")
    uid = plant.propose("squeeze")
    plant.wait_grafted(uid)
    plant.kill_trainer()
    plant.start_trainer()
    until(lambda: plant.ended(uid), "settled from what the restarted trainer reports")
    assert plant.state(uid) in ENDS, plant.story(uid)
    states = plant.states_in_audit(uid)
    assert "in_doubt" in states
    [(epoch,)] = plant.rows("SELECT epoch FROM runs_run WHERE uid=?", plant.run)
    assert epoch == 2
    again = plant.propose("conv2")
    until(lambda: plant.ended(again), "adaptation goes on in the new epoch")


def test_the_trainer_trains_on_without_a_server_and_nothing_is_missing(
    plant: Plant,
) -> None:
    uid = plant.propose("conv3")
    plant.wait_grafted(uid)
    plant.esper.stop()
    last_reported = plant.step()
    until(lambda: trained_to(plant) > last_reported + 100, "the trainer trains on by itself")
    assert plant.trainer_lives()
    plant.start_again()
    until(lambda: plant.step() > last_reported + 100, "the trainer reports again")
    until(lambda: plant.ended(uid), "the adaptation has an end")
    assert plant.state(uid) in ENDS, plant.story(uid)
    [(stored, dropped)] = plant.rows(
        "SELECT (SELECT count(DISTINCT step) FROM telemetry_metric WHERE name='loss' "
        "AND run_id=runs_run.id AND step BETWEEN ? AND ?), dropped_items FROM runs_run "
        "WHERE uid=?",
        *(last_reported, last_reported + 100, plant.run),
    )
    assert (stored, dropped) == (101, 0)
