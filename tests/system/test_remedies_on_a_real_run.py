"""A real run is made sick; its remedy is approved through the API, judged, and taken back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, TEST_SECONDS, Plant, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(TEST_SECONDS)]

# A loss that is not a number from step 60 until the file ``well`` exists.
SICK_SCRIPT = """
import pathlib, time, torch, esper
torch.manual_seed(0); torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
rule = torch.randn(8, 1)
held_out = torch.randn(64, 8)
well = pathlib.Path("well")
def evaluate():
    return torch.nn.functional.mse_loss(model(held_out), held_out @ rule).item()
def checkpoint():
    torch.save(model.state_dict(), "model.pt")
    return "model.pt"
options = {"mode": "supervised", "verbose": False, "evaluate": evaluate, "checkpoint": checkpoint}
with esper.attach(model, optimizer, run="sick", **options) as session:
    for step in range(10**9):
        x = torch.randn(64, 8)
        loss = torch.nn.functional.mse_loss(model(x), x @ rule)
        if step >= 60 and not well.exists():
            loss = loss * float("nan")
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        session.step(loss)
        time.sleep(0.005)
"""


@pytest.fixture
def sick(quick: Plant, tmp_path: Path) -> Plant:
    before = quick.runs()
    (tmp_path / "sick.py").write_text(SICK_SCRIPT)
    environment = os.environ | {
        "ESPER_SERVER": quick.esper.url,
        "ESPER_TOKEN": quick.esper.keyring["tokens"]["trainer"],
        "ESPER_STATE_DIR": str(tmp_path / "journals"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with (tmp_path / "trainer.log").open("ab") as log:
        quick.trainer = subprocess.Popen(
            [sys.executable, "sick.py"], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    until(lambda: quick.runs() > before, "the run begins")
    return quick


def answer(plant: Plant, uid: str, act: str, **body: Any) -> None:
    """As a person who loads it again when it has moved on meanwhile."""

    def done() -> bool:
        shown = plant.call("olga", "GET", f"adaptations/{uid}")
        if act == "approve":
            body["evidence_hash"] = shown.json()["evidence_hash"]
        headers = {"If-Match": shown.headers["ETag"]}
        answer = plant.call("olga", "POST", f"adaptations/{uid}/{act}", json=body, headers=headers)
        assert answer.status_code in (200, 412), answer.text
        return answer.status_code == 200

    until(done, f"{act} is taken")


def ask(plant: Plant, remedy: str, **config: Any) -> str:
    body = {"remedy": remedy, "config": config}
    asked = plant.call("olga", "POST", f"runs/{plant.run}/ask-for-remedy", json=body)
    assert asked.status_code == 201, asked.text
    return str(asked.json()["uid"])


def shown_when(plant: Plant, uid: str, *states: str) -> dict[str, Any]:
    until(state_is(plant, uid, *states), f"{uid} is {states}")
    shown: dict[str, Any] = plant.call("olga", "GET", f"adaptations/{uid}").json()
    return shown


def state_is(plant: Plant, uid: str, *states: str) -> Callable[[], bool]:
    return lambda: plant.state(uid) in states


def test_a_sick_run_is_rewound_after_an_approval_and_a_change_is_taken_back(sick: Plant) -> None:
    waiting = (
        "SELECT a.uid FROM adaptations_adaptation a JOIN runs_run r ON r.id = a.run_id "
        "WHERE a.state = 'awaiting_approval' AND r.uid = ?"
    )
    until(lambda: sick.rows(waiting, sick.run), "the trainer has proposed a remedy")
    uid = str(sick.rows(waiting, sick.run)[0][0])
    shown = sick.call("olga", "GET", f"adaptations/{uid}").json()
    assert (shown["kind"], shown["remedy"], shown["finding"]) == ("remedy", "rewind", "non_finite")
    assert shown["title"].startswith("Rewind to step ")
    assert shown["found"]["since_step"] >= 0
    (sick.folder / "well").touch()
    answer(sick, uid, "approve")
    until(state_is(sick, uid, "kept"), "the finding is over and stays away")
    assert sick.states_in_audit(uid) == [
        *("proposed", "awaiting_approval", "approved", "dispatched", "accepted", "probation"),
        "kept",
    ]

    # A person changes the rate by hand, and takes it back to the bit.
    body = {"remedy": "set_lr", "config": {"factor": 0.5}, "reason": "to see"}
    asked = sick.call("olga", "POST", f"runs/{sick.run}/ask-for-remedy", json=body)
    assert asked.status_code == 201, asked.text
    by_hand = asked.json()["uid"]
    until(state_is(sick, by_hand, "probation", "kept"), "applied")
    answer(sick, by_hand, "rollback", reason="seen")
    until(state_is(sick, by_hand, "rolled_back", "reverted"), "taken back")
    detail = sick.call("olga", "GET", f"adaptations/{by_hand}").json()
    assert detail["undo_exact"] in (True, None)  # None: it was kept before the request arrived
    assert detail["undo_exact"] or detail["state"] == "reverted"

    # People measure, save, and set a rate by its value.
    measured = shown_when(sick, ask(sick, "evaluate_now"), "kept")
    assert 0 <= measured["details"]["held_out_loss"] < 100
    saved = shown_when(sick, ask(sick, "checkpoint_now"), "kept")
    assert saved["details"]["checkpoint"] == "model.pt"
    assert (sick.folder / "model.pt").exists()
    held = ask(sick, "hold_lr", value=3e-3)
    assert shown_when(sick, held, "probation", "kept")["details"]["value"] == 3e-3

    # What does not fit ends with the trainer's sentence.
    body = {"remedy": "adopt"}
    refused = sick.call("olga", "POST", f"runs/{sick.run}/ask-for-remedy", json=body).json()["uid"]
    until(state_is(sick, refused, "not_applied"), "refused")
    reason = sick.call("olga", "GET", f"adaptations/{refused}").json()["end_reason"]
    assert "the optimizers hold every trainable tensor" in reason
    assert sick.call("ada", "GET", "audit/verify").json()["verified"]
