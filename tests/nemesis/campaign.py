"""One campaign: start everything, attack it for a while, stop, and check the history."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.nemesis.bad_network import FAIR
from tests.nemesis.checker import ENDS, violations
from tests.nemesis.fake_trainer import CALM_FILE
from tests.nemesis.faults import Nemesis
from tests.nemesis.history import History, read_history
from tests.nemesis.installation import Installation, add_trainers, start_installation
from tests.nemesis.people import NO_MORE, QUICK, People
from tests.nemesis.soak import Sampler, Samples

SAMPLE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a campaign does; times in seconds.

    Attributes:
        seconds, adaptations: the attack lasts so long, and until so many were proposed.
        pause: between two faults, on average.
        proposal_pause: between two proposals of one proposer, on average.
        proposers: so many propose at once: on a busy machine an answer takes seconds.
        patience: how long the end of all adaptations is waited for.
        mild: nothing is killed or filled up, and no trainer crashes, so that growth can be seen.
    """

    seed: int
    seconds: float
    adaptations: int = 0
    fake: int = 3
    real: int = 1
    pause: float = 1.0
    proposal_pause: float = 0.5
    proposers: int = 1
    patience: float = 60.0
    mild: bool = False


@dataclass
class Result:
    """What a campaign has found.

    Attributes:
        seconds: how long the attack took.
        settled: seconds from its end until every adaptation had an end; None: not in time.
    """

    plan: Plan
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0
    settled: float | None = None
    faults: Counter[str] = field(default_factory=Counter)
    network: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    commands: int = 0
    applied: int = 0
    restarts: int = 0
    samples: Samples = field(default_factory=Samples)


def run_campaign(folder: Path, plan: Plan, small_disk: Path | None = None) -> Result:
    """The result; ``folder`` keeps the logs, ledgers and journals."""
    result = Result(plan)
    installation = start_installation(folder, seed=plan.seed)
    try:
        people = People(installation, plan.seed, plan.proposal_pause, proposers=plan.proposers)
        people.publish(QUICK)
        add_trainers(installation, fake=plan.fake, real=plan.real, harsh=not plan.mild)
        _wait_for_runs(installation, plan)
        people.begin()
        nemesis = Nemesis(installation, people, plan.seed, small_disk, mild=plan.mild)
        sampler = Sampler(installation, SAMPLE_SECONDS)
        sampler.start()
        begin = time.monotonic()
        nemesis.attack(until=lambda: _lasted(installation, plan, begin), pause=plan.pause)
        result.seconds = time.monotonic() - begin
        sampler.stop()
        result.samples = sampler.samples
        _calm(installation, people)
        _settle(installation, plan, result)
        result.faults, result.network = nemesis.done, installation.network.done
        result.answers, result.errors = people.answers, people.errors
        result.restarts = installation.restarts
    finally:
        installation.stop()
    return result


def _lasted(installation: Installation, plan: Plan, begin: float) -> bool:
    if time.monotonic() < begin + plan.seconds:
        return False
    [(proposed,)] = installation.rows("SELECT count(*) FROM adaptations_adaptation")
    return bool(proposed >= plan.adaptations)


def _wait_for_runs(installation: Installation, plan: Plan) -> None:
    deadline = time.monotonic() + 300
    wanted = plan.fake + plan.real
    while time.monotonic() < deadline:
        query = "SELECT count(*) FROM runs_run WHERE state = 'running' AND step > 5"
        if installation.rows(query)[0][0] >= wanted:
            return
        time.sleep(0.3)
    raise AssertionError("the trainers did not begin")


def _calm(installation: Installation, people: People) -> None:
    """No more faults and no more proposals; what was frozen goes on."""
    (installation.folder / CALM_FILE).touch()
    installation.network.weather = FAIR
    for pid in installation.pids().values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    people.end()
    people.switch(on=True)
    people.publish(NO_MORE)


def _settle(installation: Installation, plan: Plan, result: Result) -> None:
    """Wait until all have an end and the histories agree."""
    begin = time.monotonic()
    while True:
        with installation.database() as database:
            history = read_history(database, installation.folder)
        found = violations(history)
        waited = time.monotonic() - begin
        ended = all(row.state in ENDS for row in history.adaptations)
        if ended and result.settled is None:
            result.settled = waited
        if not found or waited > plan.patience:
            break
        time.sleep(1.0)
    result.violations = found
    _count(history, result)


def _count(history: History, result: Result) -> None:
    result.ends.update(row.state for row in history.adaptations)
    result.kinds.update("remedy" if row.remedy else "graft" for row in history.adaptations)
    result.commands = len(history.commands)
    for lines in history.ledgers.values():
        result.applied += sum(line["event"] == "applied" for line in lines)
        result.crashes.update(line["moment"] for line in lines if line["event"] == "crash")
