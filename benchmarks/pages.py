"""Server time and queries of each page and list, with a long history: 1×, 10× and 100×.

``python -m benchmarks.pages [--quick] [--postgresql] [--profile PAGE] [--json FILE]``

100× is 5,000 runs with 100,000 adaptations; one live run has 2,000 layers. A request goes through
all of Django without a network; the time is what the server needs to answer it, the CPU time is
what a busy machine does not change. Rows are written straight into a temporary database.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import io
import os
import pstats
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.figures import Budget, Figure, write_json
from benchmarks.installation import machine, postgresql

SIZES = {1: (50, 1_000), 10: (500, 10_000), 100: (5_000, 100_000)}
HUGE_LAYERS = 2_000
LIST_BUDGET_MS = 100.0
RUN_BUDGET_MS = 150.0


@dataclass(frozen=True)
class Page:
    """A page or a list; ``path`` may name ``{run}``, ``{huge}``, ``{other}``, ``{adaptation}``."""

    name: str
    path: str
    budget_ms: float = LIST_BUDGET_MS


PAGES = (
    Page("overview", "/"),
    Page("inbox", "/inbox"),
    Page("runs", "/runs"),
    Page("run", "/runs/{run}", RUN_BUDGET_MS),
    Page("run, 2,000 layers", "/runs/{huge}", RUN_BUDGET_MS),
    Page("compare", "/runs/compare?a={run}&b={other}", RUN_BUDGET_MS),
    Page("adaptation", "/adaptations/{adaptation}", RUN_BUDGET_MS),
    Page("incidents", "/incidents"),
    Page("findings", "/violations"),
    Page("audit", "/audit"),
    Page("policy", "/policy"),
    Page("blueprints", "/blueprints"),
    Page("kernels", "/kernels"),
    Page("workers", "/workers"),
    Page("status", "/status"),
    Page("wall", "/wall"),
    Page("report", "/report"),
    Page("search", "/search?q=train-1"),
    Page("bar", "/bar"),
    Page("API runs", "/api/v1/runs"),
    Page("API runs, by name", "/api/v1/runs?name=train-7"),
    Page("API run, 2,000 layers", "/api/v1/runs/{huge}", RUN_BUDGET_MS),
    Page("API heat map, 2,000", "/api/v1/runs/{huge}/heatmap?signal=health", RUN_BUDGET_MS),
    Page("API losses", "/api/v1/runs/{huge}/metrics?name=loss", RUN_BUDGET_MS),
    Page("API snapshot", "/api/v1/runs/{run}/snapshot", RUN_BUDGET_MS),
    Page("API adaptations", "/api/v1/adaptations"),
    Page("API adaptations, waiting", "/api/v1/adaptations?state=awaiting_approval"),
    Page("API adaptations, of a run", "/api/v1/adaptations?run={run}"),
    Page("API adaptations, by time", "/api/v1/adaptations?order_by=-changed_at"),
    Page("API violations", "/api/v1/violations"),
    Page("API audit", "/api/v1/audit"),
    Page("API audit, of a run", "/api/v1/audit?run={run}"),
    Page("API experience", "/api/v1/experience"),
    Page("API events", "/api/v1/events?topic=inbox"),
    Page("metrics", "/metrics"),
)


@dataclass(frozen=True)
class Measured:
    """One page at one size."""

    ms: tuple[float, ...]
    cpu_ms: float
    queries: int
    kib: float
    status: int

    @property
    def p50(self) -> float:
        return float(np.percentile(self.ms, 50))

    @property
    def p95(self) -> float:
        return float(np.percentile(self.ms, 95))


Growth = dict[int, dict[str, Measured]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0 even over a budget, since other load can cause it."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="esper-pages-") as name:
        os.environ["ESPER_DATA_DIR"] = name
        os.environ["REDIS_URL"] = "redis://127.0.0.1:1/0"
        os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.local")
        if not options.postgresql:
            found = measure_growth(options)
        else:
            with postgresql() as url:
                if url is None:
                    raise SystemExit("there is no PostgreSQL here")
                os.environ["DATABASE_URL"] = url
                found = measure_growth(options)
    print(table(found))
    print(f"{'PostgreSQL' if options.postgresql else 'SQLite'}; {machine()}")
    if options.json:
        write_json(figures(found, options.sizes), options.json)
    return 0


def measure_growth(options: argparse.Namespace) -> Growth:
    """Every page at every size, in one database that grows."""
    import django
    from django.db import connection

    django.setup()
    from django.conf import settings
    from django.core.management import call_command

    from apps.accounts.models import User
    from apps.runs.models import Run

    settings.ALLOWED_HOSTS = ["*"]
    call_command("migrate", verbosity=0)
    call_command("sync_blueprints", verbosity=0, stdout=io.StringIO())
    if not User.objects.filter(username="rafi").exists():
        call_command("create_demo_people", verbosity=0, stdout=io.StringIO())
    from benchmarks.history import History, Size

    history = History(User.objects.get(username="rafi"))
    history.grow_to(Size(20, 100))
    huge = Run.objects.filter(name="huge").first() or history.add_huge_run(HUGE_LAYERS)
    found: Growth = {}
    for factor in options.sizes:
        history.grow_to(Size(*SIZES[factor]))
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")
        found[factor] = measure_pages(huge.uid, options)
    connection.close()
    return found


def measure_pages(huge: str, options: argparse.Namespace) -> dict[str, Measured]:
    from django.test import Client

    from apps.accounts.models import User
    from apps.adaptations.models import Adaptation
    from apps.runs.models import Run
    from esper.contracts import AdaptationState

    gc.collect()
    gc.freeze()  # torch and the history's rows, which no web process holds
    client = Client()
    client.force_login(User.objects.get(username="ada"))
    live = list(Run.objects.filter(state="running").exclude(uid=huge).order_by("-id")[:2])
    waiting = Adaptation.objects.filter(state=AdaptationState.AWAITING_APPROVAL, run=live[0])
    names = {
        "run": live[0].uid,
        "other": live[1].uid,
        "huge": huge,
        "adaptation": waiting.latest("id").uid,
    }
    found = {}
    for page in PAGES:
        if options.only and page.name not in options.only:
            continue
        path = page.path.format(**names)
        found[page.name] = _measure(client, path, repeats=3 if options.quick else 7)
        if options.profile == page.name:
            _profile(client, path)
    return found


def _measure(client: Any, path: str, *, repeats: int) -> Measured:
    client.get(path)  # what a process computes once
    queries, answer = _queries(client, path)
    samples, used = [], time.process_time()
    for _ in range(repeats):
        started = time.perf_counter()
        client.get(path)
        samples.append((time.perf_counter() - started) * 1e3)
    cpu_ms = (time.process_time() - used) / repeats * 1e3
    content = answer.getvalue() if answer.streaming else answer.content
    size = len(content) / 1024
    return Measured(tuple(samples), cpu_ms, len(queries), size, answer.status_code)


def _queries(client: Any, path: str) -> tuple[list[tuple[float, str]], Any]:
    """(milliseconds, statement) of each query of one request, and its answer."""
    from django.db import connection

    seen: list[tuple[float, str]] = []

    def count(execute: Any, sql: str, *rest: Any) -> Any:
        started = time.perf_counter()
        try:
            return execute(sql, *rest)
        finally:
            seen.append(((time.perf_counter() - started) * 1e3, sql))

    with connection.execute_wrapper(count):
        return seen, client.get(path)


def _profile(client: Any, path: str) -> None:
    for ms, sql in sorted(_queries(client, path)[0], reverse=True)[:6]:
        print(f"{ms:8.1f} ms  {sql[:700]}\n")
    profile = cProfile.Profile()
    profile.runcall(client.get, path)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


def table(found: Growth) -> str:
    """The largest size in full, the others as growth."""
    sizes = sorted(found)
    largest = sizes[-1]
    growth = "".join(f"{f'{size}x':>8}" for size in sizes[:-1])
    lines = [
        f"{'page':<27}{'ms p50':>8}{'p95':>8}{'CPU ms':>8}{'queries':>9}{'KiB':>7}  "
        f"{'budget':<16}p50 at{growth}   queries at 1x"
    ]
    for page in PAGES:
        at = found[largest].get(page.name)
        if at is None:
            continue
        mark = (
            "ok"
            if at.p50 <= page.budget_ms
            else ("cpu ok" if at.cpu_ms <= page.budget_ms else "OVER")
        )
        if at.status != 200:
            mark = f"HTTP {at.status}"
        smaller = "".join(f"{found[size][page.name].p50:>8.1f}" for size in sizes[:-1])
        lines.append(
            f"{page.name:<27}{at.p50:>8.1f}{at.p95:>8.1f}{at.cpu_ms:>8.1f}{at.queries:>9}"
            f"{at.kib:>7.0f}  {f'<= {page.budget_ms:g} ms {mark}':<16}      {smaller}"
            f"{found[sizes[0]][page.name].queries:>12}"
        )
    runs, adaptations = SIZES[largest]
    lines.append(f"{largest}x: {runs:,} runs, {adaptations:,} adaptations; server time")
    return "\n".join(lines)


def _mark(at: Measured, page: Page) -> str:
    if at.status != 200:
        return f"HTTP {at.status}"
    if at.p50 <= page.budget_ms:
        return "ok"
    return "cpu ok" if at.cpu_ms <= page.budget_ms else "OVER"


def figures(found: Growth, sizes: Sequence[int]) -> list[Figure]:
    largest = found[max(sizes)]
    budgets = {page.name: page.budget_ms for page in PAGES}
    return [
        Figure(
            f"page_{name}",
            Budget("p50", budgets[name], "ms"),
            measured.ms,
            f"{measured.queries} queries, {measured.cpu_ms:.1f} ms CPU",
        )
        for name, measured in largest.items()
    ]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--sizes", type=int, nargs="+", choices=sorted(SIZES), default=list(SIZES))
    parser.add_argument("--postgresql", action="store_true", help="a temporary one, not SQLite")
    parser.add_argument("--only", nargs="+", help="names of pages")
    parser.add_argument("--profile", help="also print queries and functions of this page")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
