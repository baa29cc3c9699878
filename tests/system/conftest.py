"""A real Esper with a real trainer, and a client that proposes adaptations as Tamiyo does."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running import RunningEsper, launch_esper
from tests.tls import TRUSTS_NOBODY

ROOT = Path(__file__).parents[2]
WAIT_SECONDS = 300.0  # generous: a busy machine is no fault of the code
WAIT_MS = WAIT_SECONDS * 1000
TEST_SECONDS = 1500  # of a whole test, for pytest
# Everything quick, so that a whole life fits into seconds.
QUICK = {
    "cooldown_layer_steps": 0,
    "cooldown_refused_seconds": 0,
    "cooldown_run_steps": 0,
    "max_adaptations_per_day": 1000,
    "max_in_flight_per_run": 4,
    "maturity_steps": 5,
    "probation_steps": 40,
    "probation_timeout_seconds": 600,
    "dispatch_timeout_seconds": 300,
    "error_budget_ratio": 1000.0,
    "max_plan_changes": 1,
}


@dataclass
class Plant:
    """A running Esper with one digits trainer; ``stop`` and ``start`` unplug either of them."""

    esper: RunningEsper
    folder: Path
    trainer: subprocess.Popen[bytes] | None = None
    proposals: int = 0
    uids: list[str] = field(default_factory=list)
    rules: dict[str, Any] = field(default_factory=dict)
    run_name: str = "digits"
    port: str = ""

    def __post_init__(self) -> None:
        self.port = self.esper.url.rsplit(":", 1)[1]

    # --- the trainer

    def start_trainer(self) -> None:
        environment = os.environ | {
            "ESPER_SERVER": self.esper.url,
            "ESPER_TOKEN": self.esper.keyring["tokens"]["trainer"],
            "ESPER_STATE_DIR": str(self.folder / "journals"),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        with (self.folder / "trainer.log").open("ab") as log:
            self.trainer = subprocess.Popen(
                [
                    *(sys.executable, "examples/digits_cnn.py", "--steps", "1000000"),
                    *("--checkpoint", str(self.folder / "digits.pt"), "--run", self.run_name),
                    *("--pause", "0.03"),  # leaves the processor to what is tested
                ],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def begin_run(self) -> None:
        """A new trainer, and its run."""
        before = self.runs()
        self.run_name = f"digits {before}"  # a trainer of the same name goes on with its run
        self.start_trainer()
        until(lambda: self.runs() > before and self.step() > 5, "the trainer reports its steps")

    def kill_trainer(self) -> None:
        assert self.trainer is not None
        self.trainer.send_signal(signal.SIGKILL)
        self.trainer.wait(WAIT_SECONDS)

    @contextmanager
    def frozen(self, child: str) -> Iterator[None]:
        """A process of the server stands still, but not inside of a transaction: it would hold
        SQLite's lock, and the others could not write that it is silent."""
        pid = self.esper.pid(child)
        until(lambda: self._freeze(pid), f"{child} stands still outside of a transaction")
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def _freeze(self, pid: int) -> bool:
        os.kill(pid, signal.SIGSTOP)
        path = self.esper.data_dir / "esper.sqlite3"
        try:
            with closing(sqlite3.connect(path, timeout=5, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
            return False
        return True

    def trainer_lives(self) -> bool:
        return self.trainer is not None and self.trainer.poll() is None

    # --- the server

    def start_again(self) -> None:
        """After it was stopped, at the same address."""
        self.esper = launch_esper(self.esper.data_dir, "--no-demo", "--port", self.port)

    # --- what the server knows

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        """Read the database itself: it is the truth, whatever the web process says."""
        path = self.esper.data_dir / "esper.sqlite3"
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=600)) as database:
            return database.execute(query, values).fetchall()

    @property
    def run(self) -> str:
        return str(self.rows("SELECT uid FROM runs_run ORDER BY id DESC LIMIT 1")[0][0])

    def step(self) -> int:
        return int(self.rows("SELECT step FROM runs_run ORDER BY id DESC LIMIT 1")[0][0])

    def runs(self) -> int:
        return int(self.rows("SELECT count(*) FROM runs_run")[0][0])

    def state(self, uid: str) -> str:
        return str(self.rows("SELECT state FROM adaptations_adaptation WHERE uid=?", uid)[0][0])

    def reason(self, uid: str) -> str:
        """Why it ended."""
        found = self.rows("SELECT end_reason FROM adaptations_adaptation WHERE uid=?", uid)
        return str(found[0][0])

    def story(self, uid: str) -> str:
        """Its states, and what is known of its compile jobs and of the workers."""
        jobs = self.rows(
            "SELECT state, attempt, error, waits_for, log FROM workers_compilejob "
            "WHERE adaptation_uid=?",
            uid,
        )
        workers = self.rows("SELECT name, state, mode, mode_reason, crashes FROM workers_worker")
        told = (self.states_in_audit(uid), self.reason(uid), jobs, workers, self.esper.tail())
        return "\n".join(map(str, told))

    def ended(self, uid: str) -> bool:
        return bool(
            self.rows(
                "SELECT 1 FROM adaptations_adaptation WHERE uid=? AND ended_at IS NOT NULL", uid
            )
        )

    def wait_grafted(self, uid: str) -> None:
        until(lambda: self.state(uid) == "probation" or self.ended(uid), "grafted")
        assert self.state(uid) == "probation", self.story(uid)

    def states_in_audit(self, uid: str) -> list[str]:
        return [
            row[0].removeprefix("adaptation.")
            for row in self.rows(
                "SELECT act FROM audit_auditevent WHERE object_uid=? AND act LIKE 'adaptation.%' "
                "ORDER BY id",
                uid,
            )
        ]

    # --- what people and Tamiyo do

    def call(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        tokens, people = self.esper.keyring["tokens"], self.esper.keyring["people"]
        secret = tokens[who] if who in tokens else people[who]["token"]
        headers = {
            "Authorization": f"Bearer {secret}",
            "Idempotency-Key": str(uuid.uuid4()),
            **options.pop("headers", {}),
        }
        url = f"{self.esper.url}/api/v1/{path}"
        options |= {"headers": headers, "timeout": 600, "verify": TRUSTS_NOBODY}
        return httpx.request(method, url, **options)

    def make_quick(self) -> None:
        """Whatever a test has changed."""
        if changes := {k: v for k, v in QUICK.items() if self.rules.get(k) != v}:
            self.publish(changes)

    def publish(self, changes: dict[str, Any]) -> None:
        """Thresholds that allow more than before need a second person."""
        self.rules |= changes
        body = {"changes": changes, "reason": "tests"}
        draft = self.call("carl", "POST", "policies", json=body)
        assert draft.status_code == 201
        path = f"policies/{draft.json()['version']}/approve"
        assert self.call("ada", "POST", path, json={}).status_code == 200

    def propose(self, layer: str, blueprint: str = "mon_act_stats") -> str:
        """The uid of a new adaptation, once the real Tamiyo has none under way on this layer."""

        def is_proposed() -> bool:
            self.reject_others()
            answer = self.post_proposal(layer, blueprint)
            if answer.status_code == 409 and self.others_in_flight(answer):
                return False
            assert answer.status_code == 201, answer.text
            self.uids.append(answer.json()["uid"])
            return True

        until(is_proposed, f"no other adaptation of {layer} is under way")
        return self.uids[-1]

    def post_proposal(self, layer: str, blueprint: str) -> httpx.Response:
        self.proposals += 1
        [(loss,)] = self.rows("SELECT last_loss FROM runs_run WHERE uid=?", self.run)
        body = {
            "epoch": self.rows("SELECT epoch FROM runs_run ORDER BY id DESC LIMIT 1")[0][0],
            "step": self.step(),
            "layer": layer,
            "adaptation_type": "add_diagnostic",
            "confidence": 0.95,
            "urgency": 0.1,
            "reasons": [],
            "blueprint": blueprint,
            "config": {},
            "risk": "none",
            "forecast": {"parameters": 0, "flops": 0, "memory_mib": 0.01, "latency_ms": 0.01},
            "checks": [],
            "why_not": [],
            "asks": [],
            "evidence": {"loss": loss, "grad_norm": 1.0, "weight_norm": 1.0},
            "policy": "test",
        }
        key = {"Idempotency-Key": f"test:{self.proposals}:{layer}"}
        path = f"runs/{self.run}/adaptations"
        return self.call("tamiyo", "POST", path, json=body, headers=key)

    def others_in_flight(self, refusal: httpx.Response) -> bool:
        """Whether a proposal was refused only because others are under way, none of them ours."""
        if self.uids and not all(self.ended(uid) for uid in self.uids):
            return False
        rules = {check["rule"] for check in refusal.json()["checks"] if not check["passed"]}
        return rules == {"one_in_flight"}

    def reject_others(self) -> None:
        """The real Tamiyo looks at this run, too, and what it proposes may wait for a person."""
        waiting = (
            "SELECT uid, version FROM adaptations_adaptation WHERE policy != 'test' "
            "AND state = 'awaiting_approval'"
        )
        for uid, version in self.rows(waiting):
            headers = {"If-Match": f'"{version}"'}
            self.call(
                "ada", "POST", f"adaptations/{uid}/reject", json={"reason": "test"}, headers=headers
            )


def until(what: Callable[[], Any], why: str) -> None:
    """Waits for a condition; the limit is there only so that a broken test ends."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            if what():
                return
        except (httpx.HTTPError, IndexError, sqlite3.OperationalError):
            pass  # the process that was asked has just been killed
        time.sleep(0.1)
    raise AssertionError(f"not within {WAIT_SECONDS:g} s: {why}")


@pytest.fixture(scope="session")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """One Esper for the session: to start one takes longer than most that is tested with it."""
    folder = tmp_path_factory.mktemp("plant")
    plant = Plant(launch_esper(folder / "data", "--no-demo"), folder)
    yield plant
    plant.esper.end()


@pytest.fixture
def quick(installation: Plant, tmp_path: Path) -> Iterator[Plant]:
    """The Esper of the session with quick rules; a test that starts a trainer has a new run."""
    installation.folder, installation.trainer, installation.uids = tmp_path, None, []
    if installation.esper.process.poll() is not None:  # a test has failed while it was stopped
        installation.start_again()
    installation.make_quick()
    yield installation
    if installation.trainer is not None:
        installation.kill_trainer()


@pytest.fixture
def plant(quick: Plant) -> Plant:
    """With a new trainer, so that no test finds the grafts of another one."""
    quick.begin_run()
    return quick
