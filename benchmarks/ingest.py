"""Signal values stored per second, through the real processes, while a person approves.

``python -m benchmarks.ingest [--seconds 15] [--layers 20 2000] [--body json binary] [--json FILE]``

A bare client, which is a process of its own, posts full batches of one run as fast as they are
answered; the rest is Esper as ``./up`` starts it, with SQLite and Valkey. A value counts when its
batch was answered as stored, and the rows are counted afterwards. In the same run the same frames
go into Valkey by XADD, one entry each, and into a PostgreSQL that writes to disk by binary COPY. On
a busy machine compare the rows of one run, and the values per second of CPU time.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import multiprocessing
import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import redis

from benchmarks.figures import Budget, Figure, show, write_json
from benchmarks.installation import Installation, installation, machine, postgresql
from benchmarks.waiting import Approver, propose, registration, use_database_of
from esper.contracts import SIGNALS, codec, telemetry_body, wire
from esper.contracts.protocol import MAX_FRAMES

GOAL_VALUES = 5_000_000.0
WARM_UP_SECONDS = 8.0
APPROVAL_BUDGET = Budget("p95", 300.0, "ms")
STREAM = "benchmark:frames"
BODIES = ("binary", "json")
ROOM_BYTES = 150_000  # of a body, for what is not values


@dataclass
class Row:
    """One way of storing frames.

    Attributes:
        values: that were stored.
        seconds: by the clock.
        cpu: seconds of CPU time, by process.
    """

    way: str
    layers: int
    frames: int
    seconds: float
    cpu: dict[str, float] = field(default_factory=dict)
    bytes_on_disk: int = 0

    @property
    def values(self) -> int:
        return self.frames * self.layers * len(SIGNALS)

    @property
    def per_second(self) -> float:
        return self.values / self.seconds

    @property
    def per_cpu_second(self) -> float:
        return self.values / max(sum(self.cpu.values()), 1e-9)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; returns 0 even below the goal, since other load can cause it."""
    options = _parse(arguments)
    rows: list[Row] = []
    with installation() as esper:
        use_database_of(esper)
        approvals = Approver(esper, propose(options.approvals), pause_seconds=0.4)
        approvals.start()
        time.sleep(WARM_UP_SECONDS)  # the compile worker starts its first builder
        for layers in options.layers:
            for body in options.body:
                rows.append(through_esper(esper, layers, body, seconds=options.seconds))
        approvals.finish()
        for layers in options.layers:
            rows.append(by_xadd(esper, layers, seconds=options.seconds / 3))
    with postgresql() as url:
        if url:
            rows += [by_copy(url, layers, seconds=options.seconds / 3) for layers in options.layers]
    print(table(rows, goal=GOAL_VALUES))
    note = f"{len(approvals.refused)} refused; approved while values were stored"
    figure = Figure("approval", APPROVAL_BUDGET, tuple(approvals.answered_ms), note)
    print(show([figure]))
    for refusal in approvals.refused[:3]:
        print(refusal)
    print(machine())
    if options.json:
        figures = [figure, *(_figure(row) for row in rows)]
        write_json(figures, options.json)
    return 0


def _figure(row: Row) -> Figure:
    name = f"ingest_{row.way}_{row.layers}".replace(" ", "_").replace(",", "")
    budget = Budget("p50", None, "values/s")
    return Figure(name, budget, (row.per_second,), f"{row.per_cpu_second:.3g} per CPU second")


def table(rows: Sequence[Row], *, goal: float) -> str:
    """The ways beside one another; ratios are against the first way with as many layers."""
    lines = [
        f"{'way':<22}{'layers':>7}{'M values/s':>12}{'M per CPU s':>13}{'frames/s':>10}"
        f"{'bytes/value':>13}  CPU s by process"
    ]
    for row in rows:
        used = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.cpu.items() if seconds)
        size = row.bytes_on_disk / max(row.values, 1)
        lines.append(
            f"{row.way:<22}{row.layers:>7}{row.per_second / 1e6:>12.2f}"
            f"{row.per_cpu_second / 1e6:>13.2f}{row.frames / row.seconds:>10.0f}"
            f"{f'{size:.2f}' if size else '-':>13}  {used}"
        )
    lines.append(f"goal: more than {goal / 1e6:g} M values/s on two cores")
    return "\n".join(lines)


# --- through Esper --------------------------------------------------------------------------------


def through_esper(esper: Installation, layers: int, body: str, *, seconds: float) -> Row:
    """Batches of one run, posted by another process for so long."""
    before, size = esper.cpu_seconds(), _bytes_on_disk(esper)
    stored = _frames_stored(esper)
    inside, outside = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    client = context.Process(
        target=_post_batches,
        args=(outside, esper.url, esper.token("trainer"), layers, body, seconds),
    )
    client.start()
    answer: dict[str, float] = inside.recv()
    client.join()
    after = esper.cpu_seconds()
    cpu = {name: round(after[name] - before.get(name, 0.0), 2) for name in after}
    cpu["client"] = round(answer["cpu"], 2)
    frames = int(answer["frames"])
    found = _frames_stored(esper) - stored
    if found < frames:
        raise RuntimeError(f"{frames} frames were answered as stored, {found} are in the database")
    return Row(
        way=f"Esper, {body}",
        layers=layers,
        frames=frames,
        seconds=answer["seconds"],
        cpu=cpu,
        bytes_on_disk=_bytes_on_disk(esper) - size,
    )


def _post_batches(pipe: Any, url: str, token: str, layers: int, body: str, seconds: float) -> None:
    """The bare client: one connection, one request after the other."""
    client = BareClient(url, token, layers, body)
    client.post_once()  # the connection, and what the server reads once for each run
    begun, used, frames = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - begun < seconds:
        frames += client.post_once()
    pipe.send(
        {
            "frames": frames,
            "seconds": time.perf_counter() - begun,
            "cpu": time.process_time() - used,
        }
    )


class BareClient:
    """A trainer's telemetry without a trainer: the same values again and again, full batches."""

    def __init__(self, url: str, token: str, layers: int, body: str) -> None:
        parts = urlsplit(url)
        self._http = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=60.0)
        self._token = token
        message = registration(f"ingest-{layers}-{body}", layers)
        answer = self._post("runs", codec.encode(wire.to_wire(message)), key=f"{layers}{body}")
        self._run, self._token = answer["uid"], answer["token"]
        self._epoch = answer["epoch"]
        self._body = body
        self._seq = 0
        size = layers * len(SIGNALS) * 4
        most = telemetry_body.MAX_BYTES if body == "binary" else codec.MAX_BYTES * 3 // 4
        self._frames = max(1, min(MAX_FRAMES, (most - ROOM_BYTES) // size))
        rng = np.random.default_rng(layers)
        values = rng.random((layers, len(SIGNALS)), dtype=np.float32).astype("<f4").tobytes()
        self._values = [values] * self._frames
        self._texts = [base64.b64encode(values).decode()] * self._frames

    def post_once(self) -> int:
        """Frames that the server has stored."""
        first, self._seq = self._seq + 1, self._seq + self._frames
        frames: list[dict[str, Any]] = [
            {"step": 10 * (first + index), "wall_time": 1.7e9, "loss": 0.5}
            for index in range(self._frames)
        ]
        members = {
            "epoch": self._epoch,
            "seq_from": first,
            "seq_to": self._seq,
            "frames": frames,
            "metrics": [],
            "findings": [],
            "dropped": 0,
        }
        if self._body == "binary":
            content = telemetry_body.encode_body(members, self._values)
        else:
            for frame, text in zip(frames, self._texts, strict=True):
                frame["values"] = text
            content = codec.encode(members)
        path = f"runs/{self._run}/telemetry"
        kind = telemetry_body.MEDIA_TYPE if self._body == "binary" else "application/json"
        answer = self._post(path, content, kind=kind)
        time.sleep(answer["slow_down_ms"] / 1000)
        return int(answer["stored"])

    def _post(
        self, path: str, content: bytes, *, kind: str = "application/json", key: str = ""
    ) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        if key:
            headers["Idempotency-Key"] = key
        self._http.request("POST", f"/api/v1/{path}", body=content, headers=headers)
        response = self._http.getresponse()
        text = response.read()
        if response.status >= 300:
            raise RuntimeError(f"{path}: {response.status} {text[:300]!r}")
        answer: dict[str, Any] = codec.decode(text)
        return answer


def _frames_stored(esper: Installation) -> int:
    newest = "SELECT coalesce(max(id), 0) FROM telemetry_frame"
    with sqlite3.connect(f"file:{esper.database}?mode=ro", uri=True) as database:
        return int(database.execute(newest).fetchone()[0])


def _bytes_on_disk(esper: Installation) -> int:
    return sum(
        path.stat().st_size for path in esper.data_dir.glob("esper.sqlite3*") if path.exists()
    )


# --- raw stores -----------------------------------------------------------------------------------


def by_xadd(esper: Installation, layers: int, *, seconds: float) -> Row:
    """One entry for each frame into Esper's own Valkey, in pipelines; nothing reads them."""
    store = redis.Redis.from_url(esper.redis_url)
    values = _frame(layers)
    at_once = max(1, min(MAX_FRAMES, 2_000_000 // len(values)))
    used, server, frames = time.process_time(), esper.cpu_seconds()["valkey"], 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        pipeline = store.pipeline(transaction=False)
        for _ in range(at_once):
            entry: Any = {"run": "r", "step": frames, "values": values}
            pipeline.xadd(STREAM, entry, maxlen=max(100, 50_000_000 // len(values)))
        pipeline.execute()
        frames += at_once
    row = Row("raw Valkey XADD", layers, frames, time.perf_counter() - begun)
    row.cpu = {
        "valkey": esper.cpu_seconds()["valkey"] - server,
        "client": time.process_time() - used,
    }
    store.delete(STREAM)
    return row


def by_copy(url: str, layers: int, *, seconds: float) -> Row:
    """Binary COPY of the same columns as a stored frame has, one transaction for each batch."""
    import psycopg

    values = _frame(layers)
    at_once = max(1, min(MAX_FRAMES, 2_000_000 // len(values)))
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS frame")
        connection.execute(
            "CREATE TABLE frame (id bigserial PRIMARY KEY, run_id bigint, epoch int, step bigint,"
            " wall_time float8, values bytea, loss float8)"
        )
        connection.execute("CREATE INDEX ON frame (run_id, step)")
        # already incompressible numbers: PostgreSQL must not try
        connection.execute("ALTER TABLE frame ALTER values SET STORAGE EXTERNAL")
        used, frames, begun = time.process_time(), 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            statement = (
                "COPY frame (run_id, epoch, step, wall_time, values, loss)"
                " FROM STDIN WITH (FORMAT BINARY)"
            )
            with connection.cursor() as cursor, cursor.copy(statement) as copy:
                copy.set_types(["int8", "int4", "int8", "float8", "bytea", "float8"])
                for index in range(at_once):
                    copy.write_row((1, 1, frames + index, 1.7e9, values, 0.5))
            frames += at_once
        row = Row("raw PostgreSQL COPY", layers, frames, time.perf_counter() - begun)
        row.cpu = {"client": time.process_time() - used}
        size = connection.execute("SELECT pg_total_relation_size('frame')").fetchone()
        row.bytes_on_disk = int(size[0]) if size else 0
    return row


def _frame(layers: int) -> bytes:
    rng = np.random.default_rng(layers)
    return rng.random((layers, len(SIGNALS)), dtype=np.float32).astype("<f4").tobytes()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ingest")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each row through Esper")
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 2000])
    parser.add_argument("--body", nargs="+", choices=BODIES, default=list(BODIES))
    parser.add_argument("--approvals", type=int, default=60, help="that a person gives meanwhile")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
