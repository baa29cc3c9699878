"""Ten times the nominal telemetry of 20 runs, counted: sent = stored + dropped, exactly.

``python -m benchmarks.flood [--seconds 60] [--runs 20] [--times 10] [--json FILE]``

Each run offers frames and metrics to the SDK's own queue, whose sender posts them to Esper as
``./up`` starts it; a person approves meanwhile. Nominal is a run of 20 steps per second: 2 frames
and 20 entries of 4 metrics a second. What the server cannot take in time is dropped by the queues,
oldest first. Afterwards the rows in the database are counted. Returns 1 when the sums differ.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.figures import Budget, Figure, show, write_json
from benchmarks.installation import Installation, installation, machine
from benchmarks.waiting import Approver, propose, registration, use_database_of
from esper.contracts import SIGNALS, HealthFrame, protocol, wire
from esper.sdk.transport.client import Client
from esper.sdk.transport.outgoing import TelemetrySender
from esper.sdk.transport.queues import Pace, TransportQueues
from esper.sdk.transport.registration import Registration

LAYERS = 100
STEPS_PER_SECOND = 20
STEPS_PER_FRAME = 10
METRICS = ("loss", "lr", "step_ms", "grad_norm")
SLICE_SECONDS = 0.05


@dataclass
class Run:
    """One trainer's queue, with what takes from it.

    Attributes:
        owed: steps that it has to offer by now and has not.
    """

    registration: Registration
    queues: TransportQueues
    client: Client
    task: asyncio.Task[None]
    step: int = 0
    owed: float = 0.0


@dataclass(frozen=True)
class Sums:
    """Items of all runs together; the server's are counted in its database.

    Attributes:
        unreported: dropped after the last batch, which the server cannot know.
    """

    offered: int
    stored: int
    dropped: int
    waiting: int
    unreported: int
    rows: int
    reported: int

    @property
    def agree(self) -> bool:
        return (
            self.waiting == 0
            and self.offered == self.stored + self.dropped
            and self.stored == self.rows
            and self.dropped == self.reported + self.unreported
        )

    def __str__(self) -> str:
        return (
            f"offered {self.offered:,} = stored {self.stored:,} + dropped {self.dropped:,} "
            f"(waiting {self.waiting})\n"
            f"rows in the database {self.rows:,}; drops that the server knows {self.reported:,}, "
            f"after the last batch {self.unreported:,}\n"
            f"{'the sums agree' if self.agree else 'THE SUMS DIFFER'}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints sums and figures; returns 1 when an item was lost without being counted."""
    options = _parse(arguments)
    with installation() as esper:
        use_database_of(esper)
        approvals = Approver(esper, propose(options.approvals), pause_seconds=0.5)
        approvals.start()
        memory = esper.resident_mib("web")
        runs, offers_ms = asyncio.run(_flood(esper, options))
        approvals.finish()
        grown = esper.resident_mib("web") - memory
        sums = _sums(esper, runs)
    figures = [
        Figure("approval", Budget("p95", 1000.0, "ms"), tuple(approvals.answered_ms), "meanwhile"),
        Figure("offer", Budget("p99", 5.0, "ms"), tuple(offers_ms), "of one step to its queue"),
    ]
    print(show(figures))
    print(f"{options.runs} runs, {options.times:g} x nominal, {options.seconds:g} s")
    print(sums)
    print(f"web process: {grown:+.0f} MiB; {len(approvals.refused)} approvals refused")
    print(machine())
    if options.json:
        write_json(figures, options.json)
    return 0 if sums.agree else 1


async def _flood(esper: Installation, options: argparse.Namespace) -> tuple[list[Run], list[float]]:
    """Offers for so long, then sends what waits."""
    runs = [await _start(esper, number) for number in range(options.runs)]
    values = np.random.default_rng(0).random((LAYERS, len(SIGNALS)), dtype=np.float32)
    names = tuple(f"layer{index}" for index in range(LAYERS))
    offers_ms: list[float] = []
    begun = last = time.monotonic()
    while last - begun < options.seconds:
        await asyncio.sleep(SLICE_SECONDS)
        now = time.monotonic()
        for run in runs:
            run.owed += (now - last) * STEPS_PER_SECOND * options.times
            while run.owed >= 1.0:
                offers_ms.append(_offer(run, values, names))
                run.owed -= 1.0
            await asyncio.sleep(0)  # the senders share this thread; a trainer's has its own
        last = now
    for run in runs:
        step = run.step
        run.queues.finish = lambda epoch, step=step: protocol.Finish(
            epoch=epoch, state="finished", step=step
        )
    await asyncio.gather(*(run.task for run in runs))
    for run in runs:
        await run.client.close()
    return runs, offers_ms


async def _start(esper: Installation, number: int) -> Run:
    client = Client(esper.url, esper.token("trainer"))
    message = registration(f"flood-{number}", LAYERS)
    answer = await client.post("runs", wire.to_wire(message), key=uuid.uuid4().hex)
    found = Registration.from_wire(answer)
    client.token = found.token
    queues = TransportQueues()
    sender = TelemetrySender(client, found, queues, Pace())
    return Run(found, queues, client, asyncio.create_task(sender.run()))


def _offer(run: Run, values: np.ndarray, names: tuple[str, ...]) -> float:
    """One step of a run; how long it took, in ms."""
    run.step += 1
    started = time.perf_counter()
    queue = run.queues.telemetry
    queue.offer_metrics(run.step, time.time(), dict.fromkeys(METRICS, 0.5))
    if run.step % STEPS_PER_FRAME == 0:
        queue.offer_frame(HealthFrame(run.step, time.time(), names, values, {"loss": 0.5}))
    return (time.perf_counter() - started) * 1e3


def _sums(esper: Installation, runs: Sequence[Run]) -> Sums:
    counts = [run.queues.telemetry.counts() for run in runs]
    uids = [run.registration.run for run in runs]
    places = ", ".join("?" * len(uids))
    chosen = f"(SELECT id FROM runs_run WHERE uid IN ({places}))"  # noqa: S608
    with sqlite3.connect(f"file:{esper.database}?mode=ro", uri=True) as database:

        def number(statement: str) -> int:
            return int(database.execute(statement, uids).fetchone()[0])

        frames = number(f"SELECT count(*) FROM telemetry_frame WHERE run_id IN {chosen}")  # noqa: S608
        metrics = number(f"SELECT count(*) FROM telemetry_metric WHERE run_id IN {chosen}")  # noqa: S608
        reported = number(f"SELECT sum(dropped_items) FROM runs_run WHERE uid IN ({places})")  # noqa: S608
    return Sums(
        **{
            name: sum(count[name] for count in counts)
            for name in ("offered", "stored", "dropped", "waiting")
        },
        unreported=sum(run.queues.telemetry.unreported for run in runs),
        rows=frames + metrics // len(METRICS),
        reported=reported,
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flood")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--times", type=float, default=10.0, help="of the nominal rate")
    parser.add_argument("--approvals", type=int, default=60, help="that a person gives meanwhile")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
