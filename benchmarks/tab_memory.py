"""The memory of a tab with a run page that stays open for eight hours at ten steps a second.

``python -m benchmarks.tab_memory [--steps 288000] [--timers 20] [--layers 100]``

A real Chromium shows the page of a live run of a real Esper. The steps come in a hundred parts, as
fast as both take them: telemetry through the API, and for each step a message of progress through
the page's socket (the server itself would send four a second at most). The page's timers run
``--timers`` times as fast. After every tenth part garbage is collected and the heap, the nodes and
the listeners are counted. Returns 1 where they are not flat from the second measurement to the
last.

It then opens a run with ``--heat-layers`` layers and says after how long its heat map is drawn.
"""

from __future__ import annotations

import argparse
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.installation import Installation, installation, machine
from benchmarks.waiting import registration
from esper.contracts import SIGNALS, codec, protocol, wire

PARTS = 100
FRAMES_OF_PART = 3
MOMENTS = 5
BATCH = 400  # steps that are sent at once
HEAP_GROWTH, NODE_GROWTH = 0.10, 0.05
SMALL_MIB = 2.0  # less than this is no growth: uPlot and the engine keep a little
HEAT_BUDGET_MS = 1000.0
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ("--no-sandbox", "--disable-gpu", "--js-flags=--expose-gc")
# Keeps the page's socket, and lets its timers run faster.
INSTRUMENT = """(() => {
  const every = window.setInterval;
  window.setInterval = (work, pause, ...rest) => every(work, pause / %(timers)d, ...rest);
  window.sockets = [];
  const Real = window.WebSocket;
  window.WebSocket = class extends Real {
    constructor(...given) { super(...given); window.sockets.push(this); }
  };
})()"""
FEED = """([topic, first, count]) => {
  const socket = window.sockets.at(-1);
  for (let step = first; step < first + count; step += 1) {
    const data = JSON.stringify({ topic, type: "run.progress", data: { step, loss: 1 / step } });
    socket.onmessage(new MessageEvent("message", { data }));
  }
}"""
DRAWN = """() => {
  const canvas = document.getElementById("heat-canvas");
  if (!canvas?.width) return false;
  const seen = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return seen.some((value, index) => index % 4 === 3 && value > 0);
}"""

FETCHED = """() => performance.getEntriesByType("resource")
  .filter(({ name }) => name.includes("/heatmap?"))[0].duration"""


@dataclass(frozen=True)
class Measured:
    """The tab after ``steps``, garbage collected."""

    steps: int
    heap_mib: float
    nodes: int
    listeners: int

    def __str__(self) -> str:
        return f"{self.steps:>9,}  {self.heap_mib:>8.2f}  {self.nodes:>7,}  {self.listeners:>9,}"


@dataclass
class Trainer:
    """Speaks for one run."""

    http: httpx.Client
    uid: str
    epoch: int
    layers: int
    seq: int = 0

    def send(self, first: int, count: int, frames: int) -> None:
        """Losses of ``count`` steps, and some health frames among the last of them."""
        while count > BATCH:
            self.send(first, BATCH, 0)
            first, count = first + BATCH, count - BATCH
        now = time.time()
        generator = np.random.default_rng(first)
        metrics = [
            {"step": step, "wall_time": now, "values": {"loss": 1.0 / step}}
            for step in range(first, first + count)
        ]
        values = generator.random((self.layers, len(SIGNALS)), dtype=np.float32)
        steps = np.linspace(first, first + count - 1, frames, dtype=int)
        made = [
            protocol.Frame(step=int(step), wall_time=now, values=values.tobytes()) for step in steps
        ]
        body: dict[str, Any] = {
            "epoch": self.epoch,
            "seq_from": self.seq + 1,
            "seq_to": self.seq + count + frames,
            "frames": [wire.to_wire(frame) for frame in made],
            "metrics": metrics,
            "findings": [],
            "dropped": 0,
        }
        self.seq = body["seq_to"]
        headers = {"Content-Type": "application/json"}
        content = codec.encode(body)
        while (answer := self.http.post("telemetry", content=content, headers=headers)).is_error:
            if answer.status_code != 429:  # the server asks a trainer to wait
                answer.raise_for_status()
            time.sleep(float(answer.headers.get("Retry-After", 1)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tab's memory at fixed points; returns 1 where it grows."""
    options = _parse(arguments)
    with installation() as esper, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        found, seconds, fetched = _fill(esper, browser, options)
        drawn_ms, fetched_ms = _draw(esper, browser, options.heat_layers)
        browser.close()
    print("    steps  heap MiB    nodes  listeners")
    print(*found, sep="\n")
    grows = growth(found)
    print(
        f"{options.steps:,} messages of progress in {seconds:.0f} s, {fetched:,} requests of the "
        f"page: {'GROWS: ' + ', '.join(grows) if grows else 'flat'}"
    )
    late = drawn_ms > HEAT_BUDGET_MS
    print(
        f"heat map of {options.heat_layers:,} layers: drawn {drawn_ms:.0f} ms after its panel was "
        f"there, {'OVER' if late else 'within'} {HEAT_BUDGET_MS:.0f} ms; {fetched_ms:.0f} ms of it "
        "for the server's answer"
    )
    print(machine())
    return 1 if grows else 0


def growth(found: Sequence[Measured]) -> list[str]:
    """What grew from the second measurement to the last; the first one is still warming up."""
    first, last = found[1], found[-1]
    grown = []
    if last.heap_mib > first.heap_mib * (1 + HEAP_GROWTH) + SMALL_MIB:
        grown.append(f"heap {first.heap_mib:.1f} to {last.heap_mib:.1f} MiB")
    for name in ("nodes", "listeners"):
        before, after = getattr(first, name), getattr(last, name)
        if after > before * (1 + NODE_GROWTH) + 20:
            grown.append(f"{name} {before:,} to {after:,}")
    return grown


def _fill(
    esper: Installation, browser: Browser, options: argparse.Namespace
) -> tuple[list[Measured], float, int]:
    trainer = _register(esper, "eight-hours", options.layers)
    part = options.steps // PARTS
    trainer.send(1, part, FRAMES_OF_PART)
    page = _open(esper, browser, trainer.uid, options.timers)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    found, started = [], time.perf_counter()
    for number in range(1, PARTS + 1):
        first = 1 + number * part
        trainer.send(first, part, FRAMES_OF_PART)
        page.evaluate(FEED, [f"run:{trainer.uid}", first, part])
        if number % 10 == 0 or number == 1:
            found.append(_measure(page, number * part))
            print(found[-1], flush=True)
    seconds = time.perf_counter() - started
    page.context.close()
    return found, seconds, len(requests)


def _draw(esper: Installation, browser: Browser, layers: int) -> tuple[float, float]:
    """ms from the heat map's canvas being in the page to its first drawn pixel, and how many of
    them the server's answer took; the median of three."""
    trainer = _register(esper, "many-layers", layers)
    for step in range(1, 61):
        trainer.send(step, 1, 1)
    page = _open(esper, browser, trainer.uid, timers=1)
    taken: list[tuple[float, float]] = []
    for _ in range(3):
        page.goto(f"{esper.url}/runs/{trainer.uid}", wait_until="commit")
        page.wait_for_selector("#heat-canvas", state="attached", timeout=60_000)
        started = time.perf_counter()
        page.wait_for_function(DRAWN, timeout=60_000)
        taken.append(((time.perf_counter() - started) * 1e3, float(page.evaluate(FETCHED))))
    page.context.close()
    return sorted(taken)[1]


def _measure(page: Page, steps: int) -> Measured:
    """The lowest of some moments: between them, an answer of the server may be in the heap."""
    found = []
    for _ in range(MOMENTS):
        page.wait_for_timeout(300)
        found.append(_measure_once(page, steps))
    return min(found, key=lambda one: one.heap_mib)


def _measure_once(page: Page, steps: int) -> Measured:
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    for _ in range(3):
        session.send("HeapProfiler.collectGarbage")
    metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    session.detach()
    heap, nodes = metrics["JSHeapUsedSize"] / 2**20, int(metrics["Nodes"])
    return Measured(steps, heap, nodes, int(metrics["JSEventListeners"]))


def _open(esper: Installation, browser: Browser, run: str, timers: int) -> Page:
    """The run's page, with its charts drawn and its socket open."""
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.set_default_timeout(120_000)
    page.goto(f"{esper.url}/login")
    page.fill("#id_username", "olga")
    page.fill("#id_password", esper.password("olga"))
    page.click("button[type=submit]")
    page.wait_for_url("**/")
    page.add_init_script(INSTRUMENT % {"timers": timers})
    page.goto(f"{esper.url}/runs/{run}")
    page.wait_for_selector("body[data-link=live]")
    page.wait_for_function(DRAWN)
    return page


def _register(esper: Installation, name: str, layers: int) -> Trainer:
    headers = {"Content-Type": "application/json", "Idempotency-Key": uuid.uuid4().hex}
    answer = httpx.post(
        f"{esper.url}/api/v1/runs",
        content=codec.encode(wire.to_wire(registration(name, layers))),
        headers=headers | {"Authorization": f"Bearer {esper.token('trainer')}"},
        timeout=120,
    )
    answer.raise_for_status()
    made: dict[str, Any] = answer.json()
    http = httpx.Client(
        base_url=f"{esper.url}/api/v1/runs/{made['uid']}/",
        headers={"Authorization": f"Bearer {made['token']}"},
        timeout=120,
    )
    return Trainer(http, made["uid"], made["epoch"], layers)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whether a run page's memory stays flat.")
    parser.add_argument("--steps", type=int, default=288_000, help="eight hours at ten a second")
    parser.add_argument("--timers", type=int, default=20, help="so many times as fast")
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--heat-layers", type=int, default=2_000)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
