"""Workers are killed, frozen and starved at random points; then the database is compared with what
the trainer holds. The seed is fixed, so that a failure is tried again at the same points."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from hosts.keyring import kernel_key_path
from hosts.processes import MARK
from launcher.supervisor.plan import compile_worker_command
from tests.running import launch_esper

from .conftest import QUICK, ROOT, TEST_SECONDS, Plant, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(TEST_SECONDS)]

SEED = 4
# Short leases: what takes half a minute in production takes seconds here.
HASTE = {
    "ESPER_COMPILE_LEASE_SECONDS": "4",
    "ESPER_COMPILE_HEARTBEAT_SECONDS": "1",
    "ESPER_WORKER_HEARTBEAT_SECONDS": "1",
    "ESPER_WORKER_CRASHES_MAX": "1000",
}
FIRST, SECOND = "first@here", "second@here"
# What a worker logs whose job was given to another one.
REFUSED = ("nobody needs the result", "has lost its lease")
LAYERS = ("conv1", "conv2", "conv3", "squeeze", "head")
# reverted: kept, and gone with the hard undo of an older graft
NAMED_ENDS = {
    "kept",
    "rolled_back",
    "reverted",
    "compile_failed",
    "dispatch_expired",
    "not_applied",
}


@dataclass
class Workers:
    """Compile workers of our own, each a process group: main, pool process, builder children."""

    plant: Plant
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    started: dict[str, str] = field(default_factory=dict)

    def start(self, name: str, queues: str = "compile.cpu") -> None:
        capabilities = [queue.removeprefix("compile.") for queue in queues.split(",")]
        environment = os.environ | {
            **HASTE,
            "DJANGO_SETTINGS_MODULE": "esper_web.settings.local",
            "ESPER_DATA_DIR": str(self.plant.esper.data_dir),
            "ESPER_HOST_NAME": name.split("@")[1],
            "ESPER_WORKER_NAME": name,
            "ESPER_WORKER_CAPABILITIES": ",".join(capabilities),
            "ESPER_KERNEL_KEY_FILE": str(kernel_key_path(self.plant.esper.data_dir)),
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
            MARK: self.plant.esper.mark,
        }
        environment.pop("DATABASE_URL", None)
        self.started[name] = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S.%f}"
        with (self.plant.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*compile_worker_command(queues), "-n", name],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self, name: str) -> None:
        until(
            lambda: self.plant.rows(
                "SELECT 1 FROM workers_worker WHERE name=? AND state='idle' AND devices!='[]' "
                "AND queues!='[]' AND started_at>?",  # not that of the test before
                *(name, self.started[name]),
            ),
            f"{name} is idle and has reported its devices",
        )

    def family(self, name: str) -> list[int]:
        """The worker and all below it, parents first."""
        found = [self.running[name].pid]
        for pid in found:
            with suppress(FileNotFoundError):
                text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
                found += [int(child) for child in text.split()]
        return found

    def builders(self, name: str) -> list[int]:
        return [pid for pid in self.family(name) if _is_builder(pid)]

    def signal(self, pids: list[int], number: signal.Signals) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def describe(self) -> str:
        """For the report of a test that fails: what the database and the workers say."""
        lines = []
        for table in ("workers_compilejob", "workers_worker", "kernels_warmup"):
            lines += [table, *map(str, self.plant.rows(f"SELECT * FROM {table}"))]  # noqa: S608
        lines += [f"{uid}: {self.plant.states_in_audit(uid)}" for uid in self.plant.uids]
        for name in self.running:
            lines += [name, (self.plant.folder / f"{name}.log").read_text()[-4000:]]
        return "\n".join(lines)

    def end(self) -> None:
        for name, process in self.running.items():
            family = self.family(name)
            self.signal(family, signal.SIGCONT)
            self.signal(family, signal.SIGKILL)
            process.wait(300)


def _is_builder(pid: int) -> bool:
    with suppress(OSError):
        return b"esper.compilation.child" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """An Esper for this file whose own worker only stages; two others build."""
    folder = tmp_path_factory.mktemp("pool")
    environment = HASTE | {"ESPER_WORKER_CAPABILITIES": "none"}
    plant = Plant(launch_esper(folder / "data", "--no-demo", environment=environment), folder)
    plant.publish(QUICK | {"probation_steps": 10, "max_in_flight_per_run": 20})
    yield plant
    plant.esper.end()


@pytest.fixture
def workers(hasty: Plant, tmp_path: Path) -> Iterator[Workers]:
    """Two of their own names for each test, and a new run."""
    plant = hasty
    plant.folder, plant.trainer, plant.uids = tmp_path, None, []
    workers = Workers(plant)
    try:
        yield workers
    finally:
        sys.stdout.write(workers.describe())  # which pytest shows where the test failed
        workers.end()
        if plant.trainer is not None:
            plant.kill_trainer()


def job_of(plant: Plant, uid: str) -> dict[str, Any]:
    names = ("state", "attempt", "lease_owner", "error", "log", "capability")
    [row] = plant.rows(
        f"SELECT {', '.join(names)} FROM workers_compilejob WHERE adaptation_uid=?",  # noqa: S608
        uid,
    )
    return dict(zip(names, row, strict=True))


# --- random attacks -------------------------------------------------------------------------------


def kill_worker(workers: Workers, name: str, chance: random.Random) -> None:
    workers.signal(workers.family(name)[:2], signal.SIGKILL)
    workers.running[name].wait(300)
    workers.start(name)


def kill_pool_process(workers: Workers, name: str, chance: random.Random) -> None:
    workers.signal(workers.family(name)[1:2], signal.SIGKILL)


def kill_builders(workers: Workers, name: str, chance: random.Random) -> None:
    workers.signal(workers.builders(name), signal.SIGKILL)


def freeze(workers: Workers, name: str, chance: random.Random) -> None:
    """Longer than the lease, then on: the zombie finds that it was replaced."""
    family = workers.family(name)
    workers.signal(family, signal.SIGSTOP)
    time.sleep(chance.uniform(5.0, 7.0))
    workers.signal(family, signal.SIGCONT)


def starve(workers: Workers, name: str, chance: random.Random) -> None:
    """A twentieth of the processor for some seconds."""
    family = workers.family(name)
    ends = time.monotonic() + chance.uniform(3.0, 5.0)
    while time.monotonic() < ends:
        workers.signal(family, signal.SIGSTOP)
        time.sleep(0.19)
        workers.signal(family, signal.SIGCONT)
        time.sleep(0.01)


ATTACKS: list[Callable[[Workers, str, random.Random], None]] = [
    kill_builders,
    freeze,
    kill_pool_process,
    starve,
    kill_worker,
]


# Each attack once, at another layer. ./check --all goes on with each of them once more, on layers
# that carry the grafts of the first round.
@pytest.mark.parametrize(
    "blueprints",
    [
        ("mon_act_stats",),
        pytest.param(("mon_act_stats", "clamp_grad_norm"), marks=pytest.mark.full),
    ],
)
def test_no_job_is_lost_or_done_twice_whatever_happens_to_the_workers(
    workers: Workers, blueprints: tuple[str, ...]
) -> None:
    plant, chance = workers.plant, random.Random(SEED)
    workers.start(FIRST)
    workers.start(SECOND)
    plant.begin_run()
    workers.wait_ready(FIRST)
    workers.wait_ready(SECOND)
    layers = [(layer, blueprint) for blueprint in blueprints for layer in LAYERS]
    for index, (layer, blueprint) in enumerate(layers):
        if index >= len(LAYERS):  # the earlier graft of this layer must be settled
            earlier = plant.uids[index - len(LAYERS)]
            until(lambda uid=earlier: plant.ended(uid), f"{earlier} has an end")
        attack = ATTACKS[index % len(ATTACKS)]
        victim = chance.choice([FIRST, SECOND])
        before = chance.random() < 0.5  # the doorbell finds it so, or it happens in the middle
        if not before:
            plant.propose(layer, blueprint)
            time.sleep(chance.uniform(0.0, 0.08))
            attack(workers, victim, chance)
        else:
            workers.signal(workers.builders(victim), signal.SIGSTOP)
            plant.propose(layer, blueprint)
            attack(workers, victim, chance)
            workers.signal(workers.builders(victim), signal.SIGCONT)
    for uid in plant.uids:
        until(lambda uid=uid: plant.ended(uid), f"{uid} has an end: {plant.state(uid)}")
    check_the_database(plant)
    check_what_the_trainer_holds(plant)


def check_the_database(plant: Plant) -> None:
    for uid in plant.uids:
        job, states = job_of(plant, uid), plant.states_in_audit(uid)
        assert plant.state(uid) in NAMED_ENDS, (plant.reason(uid), states, job)
        assert job["state"] in {"done", "failed"}, job
        assert 1 <= job["attempt"] <= 3
        assert states.count("compiling") == job["attempt"], states
        assert states.count("compiled") == (job["state"] == "done"), states
        assert states.count("dispatched") <= 1
    # The result that counts is by the worker that held the lease; nobody else's was taken.
    foreign = plant.rows(
        "SELECT j.uid FROM workers_compilejob j "
        "JOIN kernels_kernel k ON k.digest = j.kernel_digest "
        "WHERE j.state='done' AND NOT j.cached AND k.built_by != j.lease_owner"
    )
    assert foreign == []
    doubled = plant.rows(
        "SELECT adaptation_uid FROM runs_command WHERE kind='graft' GROUP BY adaptation_uid "
        "HAVING count(*) > 1"
    )
    assert doubled == []
    assert plant.call("ada", "GET", "audit/verify").json()["verified"]


def check_what_the_trainer_holds(plant: Plant) -> None:
    """The grafts of a checkpoint that was written after the last adaptation had ended."""
    checkpoint, settled = plant.folder / "digits.pt", plant.step()
    saved: dict[str, Any] = {}

    def is_later() -> bool:
        saved.update(torch.load(checkpoint, weights_only=True))
        return int(saved["step"]) > settled

    until(lambda: checkpoint.exists() and is_later(), "a checkpoint after the end")
    held = {entry["adaptation"] for entry in saved["session"]["applied"]}
    kept = {uid for uid in plant.uids if plant.state(uid) == "kept"}
    assert held & set(plant.uids) == kept


# --- one zombie, step by step ---------------------------------------------------------------------


def test_a_frozen_worker_that_wakes_up_is_refused_and_the_other_has_done_it(
    workers: Workers,
) -> None:
    plant = workers.plant
    workers.start(FIRST)
    plant.begin_run()
    workers.wait_ready(FIRST)
    workers.signal(workers.builders(FIRST), signal.SIGSTOP)  # so that it is in the middle of it
    uid = plant.propose("head", "proj_ia3")  # which no other test of this file has built
    until(lambda: job_of(plant, uid)["lease_owner"] == FIRST, "it has the job")
    zombie = workers.family(FIRST)
    workers.signal(zombie, signal.SIGSTOP)

    workers.start(SECOND)
    until(lambda: job_of(plant, uid)["lease_owner"] == SECOND, "the other takes it over")
    until(lambda: job_of(plant, uid)["state"] == "done", "and does it")
    workers.signal(zombie, signal.SIGCONT)
    until(lambda: plant.ended(uid), "the adaptation has an end")
    log = plant.folder / f"{FIRST}.log"
    until(lambda: any(words in log.read_text() for words in REFUSED), "the woken worker gave up")

    job = job_of(plant, uid)
    assert (job["state"], job["attempt"], job["lease_owner"]) == ("done", 2, SECOND)
    assert f"worker {FIRST} was lost" in job["log"]
    built_by = (
        "SELECT k.built_by FROM kernels_kernel k "
        "JOIN workers_compilejob j ON j.kernel_digest = k.digest"
    )
    assert plant.rows(f"{built_by} WHERE j.adaptation_uid=?", uid) == [(SECOND,)]


# --- two capabilities -----------------------------------------------------------------------------

LAYER = {
    "kind": "Linear",
    "in_shape": [8, 64],
    "out_shape": [8, 64],
    "dtype": "float32",
    "parameters": 64 * 65,
    "graftable": True,
    "features_in": 64,
    "features_out": 64,
}


def test_one_run_over_two_devices_gets_each_kernel_from_a_worker_that_claims_it(
    workers: Workers,
) -> None:
    plant = workers.plant
    workers.start(FIRST, "compile.cpu")
    workers.start(SECOND, "compile.cpu.avx2,compile.cpu.amx")
    workers.wait_ready(FIRST)
    workers.wait_ready(SECOND)
    # Two names for one processor stand for two devices: what is shown is who builds for which.
    body = {
        "name": "two-devices",
        "mode": "automatic",
        "host": "elsewhere",
        "capability": "cpu",
        "capabilities": {"cpu": "cpu", "cpu:0": "cpu.avx2"},
        "model_parameters": 1_000_000,
        "layers": [{**LAYER, "name": "a"}, {**LAYER, "name": "b", "device": "cpu:0"}],
    }
    run = plant.call("trainer", "POST", "runs", json=body)
    assert run.status_code == 201, run.text
    report_a_step(plant, run.json())

    uids = {layer: plant.propose(layer) for layer in ("a", "b")}

    for uid in uids.values():
        until(lambda uid=uid: job_of(plant, uid)["state"] == "done", "both are built")
    built = plant.rows(
        "SELECT j.layer->>'name', k.capability, k.built_by FROM workers_compilejob j "
        "JOIN kernels_kernel k ON k.digest = j.kernel_digest WHERE j.adaptation_uid IN (?, ?) "
        "ORDER BY 1",
        *uids.values(),
    )
    assert built == [("a", "cpu", FIRST), ("b", "cpu.avx2", SECOND)]
    answer = plant.call("vera", "GET", "workers?kind=compile").json()["results"]
    claimed = {row["name"]: row["capabilities"] for row in answer}
    assert claimed[SECOND] == ["cpu.avx2", "cpu.amx"]


def report_a_step(plant: Plant, run: dict[str, Any]) -> None:
    """As a trainer does: enough for the gates that ask whether the run is old enough."""
    metric = {"step": 50, "wall_time": time.time(), "values": {"loss": 1.0}}
    batch = {
        "epoch": run["epoch"],
        "seq_from": 1,
        "seq_to": 1,
        "frames": [],
        "metrics": [metric],
        "findings": [],
        "dropped": 0,
    }
    answer = httpx.post(
        f"{plant.esper.url}/api/v1/runs/{run['uid']}/telemetry",
        json=batch,
        headers={"Authorization": f"Bearer {run['token']}"},
        timeout=600,
    )
    assert answer.status_code < 300, answer.text
