"""The smoke run: one adaptation through all processes, approved by a person, over HTTP.

start on free ports ─► a demo that needs a graft trains ─► an adaptation waits
  ─► olga approves it by REST ─► it is kept or rolled back
  ─► audit ─► stop ─► one JSON object as the last line
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from esper.contracts import AdaptationState
from hosts.keyring import read_keyring
from hosts.processes import end_marked, marked_processes
from launcher.smoke.person import Person, SmokeFailure
from launcher.smoke.report import AUDITOR, GOOD_ENDS, OPERATOR, audit_gaps, failures, summary
from launcher.smoke.timings import measure_timings
from launcher.supervisor.esper import STARTING_ERRORS, Esper, Options
from launcher.supervisor.output import Output
from launcher.supervisor.plan import DEMOS
from launcher.supervisor.stopping import run_until_signal

LIMIT_SECONDS = 15 * 60.0
POLL_SECONDS = 1.0
REQUEST_SECONDS = 120.0  # a busy machine is slow, and the limit ends the run
REASON = "smoke run: the evidence was checked"

Json = dict[str, Any]


@dataclass
class Watch:
    """The states that were seen, and the adaptations that the operator approved."""

    operator: Person
    output: Output
    seen: dict[str, str] = field(default_factory=dict)
    approved: set[str] = field(default_factory=set)

    async def until_decided_and_ended(self) -> str:
        """Approves what waits; the run of the first approved adaptation with a good end."""
        while True:
            for adaptation in reversed(await self.operator.all("adaptations")):
                self._say(adaptation)
                if adaptation["state"] == AdaptationState.AWAITING_APPROVAL:
                    await self._approve(adaptation["uid"])
                if self._is_done(adaptation):
                    return str(adaptation["run"])
            await asyncio.sleep(POLL_SECONDS)

    def _is_done(self, adaptation: Json) -> bool:
        return adaptation["uid"] in self.approved and adaptation["state"] in GOOD_ENDS

    def _say(self, adaptation: Json) -> None:
        uid, state = adaptation["uid"], adaptation["state"]
        if self.seen.get(uid) != state:
            self.seen[uid] = state
            place = f"{adaptation['layer']} of {adaptation['run_name']}"
            what = f"{adaptation['blueprint']} at {place}"
            self.output.say(f"A-{adaptation['number']} {what}: {state}")

    async def _approve(self, uid: str) -> None:
        path = f"adaptations/{uid}"
        shown = await self.operator.get(path)
        body: Json = {"reason": REASON, "evidence_hash": shown["evidence_hash"]}
        answer = await self.operator.act(path, "approve", body)
        if answer.is_success:
            self.approved.add(uid)
            return
        problem = answer.json()
        self.output.say(f"not approved: {problem['detail']}")
        if problem["code"] == "evidence-stale":  # the new numbers were checked too
            body["accept_drift"] = True
            if (await self.operator.act(path, "approve", body)).is_success:
                self.approved.add(uid)


async def drive(esper: Esper, output: Output) -> tuple[Json, list[str]]:
    """What happens while Esper runs; the report, and the gaps in the audit log."""
    people = read_keyring(esper.site.data_dir)["people"]
    options: Any = {"base_url": esper.site.url, "timeout": REQUEST_SECONDS}
    async with httpx.AsyncClient(**options) as one, httpx.AsyncClient(**options) as other:
        operator, auditor = Person(one), Person(other)
        await operator.sign_in(OPERATOR, people[OPERATOR]["password"])
        await auditor.sign_in(AUDITOR, people[AUDITOR]["password"])
        run = await Watch(operator, output).until_decided_and_ended()
        adaptations = await operator.all("adaptations", run=run)
        details = [await operator.get(f"adaptations/{item['uid']}") for item in adaptations]
        audit = await auditor.lines("audit/export")
        gaps = audit_gaps(details, audit)
        report = {
            "run": run,
            "adaptations": [summary(detail) for detail in details],
            "timings_ms": await measure_timings(operator, esper.site, run, details),
            "audit_verified": (await auditor.get("audit/verify"))["verified"] and not gaps,
        }
        return report, gaps


async def smoke(data_dir: Path, output: Output) -> Json:
    """Starts, drives and stops Esper; the report, with ``failures``.

    Raises:
        SmokeFailure: no approved adaptation ended in time, or a request failed.
    """
    esper = Esper(Options(data_dir=data_dir, port=0, demos=DEMOS[:1], show_people=False), output)
    try:
        async with asyncio.timeout(LIMIT_SECONDS), esper:
            report, gaps = await drive(esper, output)
            output.say("stopping")
    except TimeoutError:
        limit = f"{LIMIT_SECONDS / 60:g} minutes"
        raise SmokeFailure(f"no approved adaptation ended within {limit}") from None
    except httpx.HTTPError as error:
        raise SmokeFailure(f"a request to the REST API failed: {error}") from error
    left = marked_processes(esper.site.mark)
    end_marked(esper.site.mark)
    report["processes_left"] = len(left)
    report["failures"] = failures(report, gaps)
    return report


def main(data_dir: Path | None = None) -> int:
    """Runs it, in a temporary directory unless one is given; the exit status."""
    if data_dir is not None:
        return _run_in(data_dir)
    with tempfile.TemporaryDirectory(prefix="esper-smoke-") as directory:
        return _run_in(Path(directory))


def _run_in(data_dir: Path) -> int:
    began = time.monotonic()
    output = Output(data_dir / "log")
    try:
        report = run_until_signal(lambda: smoke(data_dir, output), output)
    except (SmokeFailure, *STARTING_ERRORS) as error:
        output.plain(f"The smoke run failed: {error}")
        return 1
    finally:
        output.close()
    if report is None:
        output.plain("The smoke run failed: it was stopped")
        return 1
    found = report.pop("failures")
    for failure in found:
        output.plain(f"The smoke run failed: {failure}")
    output.plain(f"The smoke run took {time.monotonic() - began:.0f} s")
    output.plain(json.dumps(report))
    return 1 if found else 0
