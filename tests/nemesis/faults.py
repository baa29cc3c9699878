"""What the nemesis does to an installation. Each fault ends by itself and says what it did."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psycopg
import redis

from tests.nemesis.bad_network import POOR, STORM
from tests.nemesis.installation import Installation
from tests.nemesis.people import People

LONGEST_FREEZE_SECONDS = 4.0


class Nemesis:
    """Draws faults from a seed and commits them one after the other.

    Args:
        mild: no process is killed or restarted.
        small_disk: the data directory's own file system, which may be filled; None: there is none.
    """

    def __init__(
        self,
        installation: Installation,
        people: People,
        seed: int,
        small_disk: Path | None = None,
        *,
        mild: bool = False,
    ) -> None:
        self._installation, self._people = installation, people
        self._random = random.Random(seed)
        self._small_disk = small_disk
        self.done: Counter[str] = Counter()
        self.faults: dict[Callable[[], None], int] = {
            self.kill: 8,
            self.freeze: 4,
            self.flush_valkey: 1,
            self.end_connections: 2,
            self.restart_postgres: 1,
            self.storm: 2,
            self.cut_connections: 2,
            self.switch_off: 1,
        }
        if mild:
            del self.faults[self.kill], self.faults[self.restart_postgres]
        elif small_disk is not None:
            self.faults[self.fill_disk] = 1

    def attack(self, *, until: Callable[[], bool], pause: float) -> None:
        """Faults with pauses of ``pause`` seconds on average; each kind at least once."""
        self._installation.network.weather = POOR
        # Each kind once, in a drawn order; then by weight.
        first = list(self.faults)
        self._random.shuffle(first)
        while first or not until():
            drawn = self._random.choices(list(self.faults), list(self.faults.values()))[0]
            self.commit(first.pop() if first else drawn)
            time.sleep(pause * self._random.uniform(0.5, 1.5))

    def commit(self, fault: Callable[[], None]) -> None:
        """One fault; that its victim is gone already is no failure."""
        with suppress(ProcessLookupError, psycopg.Error, redis.RedisError):
            fault()

    def _victim(self) -> tuple[str, int]:
        pids = self._installation.pids()
        name = self._random.choice(sorted(pids))
        return name, pids[name]

    def _note(self, what: str) -> None:
        self.done[what] += 1

    def kill(self) -> None:
        name, pid = self._victim()
        os.kill(pid, signal.SIGKILL)
        self._note(f"kill -9 {_kind(name)}")

    def freeze(self) -> None:
        name, pid = self._victim()
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(self._random.uniform(0.3, LONGEST_FREEZE_SECONDS))
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._note(f"freeze {_kind(name)}")

    def flush_valkey(self) -> None:
        with redis.Redis.from_url(self._installation.esper.redis_url) as client:
            client.flushall()
        self._note("flush Valkey")

    def end_connections(self) -> None:
        share = self._random.random()
        with self._installation.database() as database:
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> "
                "pg_backend_pid() AND backend_type = 'client backend' AND random() < %s",
                (share,),
            )
        self._note("end database connections")

    def restart_postgres(self) -> None:
        self._installation.cluster.restart()
        self._note("restart PostgreSQL")

    def storm(self) -> None:
        self._installation.network.weather = STORM
        time.sleep(self._random.uniform(0.5, 3.0))
        self._installation.network.weather = POOR
        self._note("storm on the network")

    def cut_connections(self) -> None:
        self._installation.network.cut_all()
        self._note("cut the trainers' connections")

    def switch_off(self) -> None:
        """The kill switch, which must stop every dispatch at once."""
        self._people.switch(on=False)
        time.sleep(self._random.uniform(0.2, 1.5))
        self._people.switch(on=True)
        self._note("kill switch")

    def fill_disk(self) -> None:
        assert self._small_disk is not None
        ballast = self._small_disk / "ballast"
        try:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))
            time.sleep(self._random.uniform(0.5, 3.0))
        finally:
            ballast.unlink(missing_ok=True)
        self._note("full disk")


def _kind(name: str) -> str:
    """Trainers are counted together."""
    return f"a {name.partition('-')[0]} trainer" if name.startswith(("fake-", "real-")) else name
