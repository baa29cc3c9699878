"""``./up --smoke``: one adaptation, end to end, through the real processes, with a person in it.

start all on free ports ─► digits demo trains ─► an adaptation waits ─► olga approves it by REST
  ─► its end (kept or rolled back) ─► audit ─► stop all ─► one JSON object as the last line
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import httpx

from esper.contracts import AdaptationState
from esper_web.keyring import read_keyring
from esper_web.smoke_timings import measure_timings
from esper_web.supervise.output import Output
from esper_web.supervise.processes import end_marked, marked_processes
from esper_web.supervisor import STARTING_ERRORS, Esper, Options

DEMO = "digits_cnn"
OPERATOR, AUDITOR = "olga", "ada"
LIMIT_SECONDS = 8 * 60.0
POLL_SECONDS = 1.0
GOOD_ENDS = frozenset({AdaptationState.KEPT, AdaptationState.ROLLED_BACK})
REASON = "smoke run: looked at the evidence, worth a try"

Json = dict[str, Any]


class SmokeFailure(Exception):
    """What should have happened did not; the message is for a person."""


class Person:
    """Somebody who has signed in through the page and speaks to the REST API with the session."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def sign_in(self, username: str, password: str) -> None:
        """As a browser does it.

        Raises:
            SmokeFailure: the password was refused.
        """
        page = await self._client.get("/login")
        page.raise_for_status()
        form = {
            "username": username,
            "password": password,
            "csrfmiddlewaretoken": self._client.cookies["csrftoken"],
        }
        answer = await self._client.post("/login", data=form)
        if "sessionid" not in self._client.cookies:
            raise SmokeFailure(f"{username} could not sign in (status {answer.status_code})")

    async def get(self, path: str, **parameters: str) -> Json:
        """One resource."""
        answer = await self._client.get(f"/api/v1/{path}", params=parameters)
        answer.raise_for_status()
        found: Json = answer.json()
        return found

    async def all(self, path: str, **parameters: str) -> list[Json]:
        """All pages of a list."""
        page = await self.get(path, limit="200", **parameters)
        found = list(page["results"])
        while page["next"]:
            answer = await self._client.get(page["next"])
            answer.raise_for_status()
            page = answer.json()
            found += page["results"]
        return found

    async def lines(self, path: str) -> list[Json]:
        """An NDJSON export."""
        answer = await self._client.get(f"/api/v1/{path}")
        answer.raise_for_status()
        return [json.loads(line) for line in answer.text.splitlines() if line]

    async def act(self, resource: str, act: str, body: Json) -> httpx.Response:
        """An act on a resource as it is now: its ETag goes back as If-Match."""
        shown = await self._client.get(f"/api/v1/{resource}")
        shown.raise_for_status()
        return await self._client.post(
            f"/api/v1/{resource}/{act}",
            json=body,
            headers={
                "If-Match": shown.headers["ETag"],
                "Idempotency-Key": str(uuid.uuid4()),
                "X-CSRFToken": self._client.cookies["csrftoken"],
            },
        )


@dataclass
class Watch:
    """What has been seen of a run, and what a person has decided."""

    operator: Person
    output: Output
    seen: dict[str, str] = field(default_factory=dict)
    approved: set[str] = field(default_factory=set)

    async def until_decided_and_ended(self, run: str) -> list[Json]:
        """Approves what waits; returns when something that was approved has come to a good end."""
        while True:
            adaptations = await self.operator.all("adaptations", run=run)
            for adaptation in adaptations:
                self._say(adaptation)
                if adaptation["state"] == AdaptationState.AWAITING_APPROVAL:
                    await self._approve(adaptation["uid"])
            if any(self._is_done(adaptation) for adaptation in adaptations):
                return adaptations
            await asyncio.sleep(POLL_SECONDS)

    def _is_done(self, adaptation: Json) -> bool:
        return adaptation["uid"] in self.approved and adaptation["state"] in GOOD_ENDS

    def _say(self, adaptation: Json) -> None:
        uid, state = adaptation["uid"], adaptation["state"]
        if self.seen.get(uid) != state:
            self.seen[uid] = state
            what = f"{adaptation['blueprint']} at {adaptation['layer']}"
            self.output.say(f"A-{adaptation['number']} {what}: {state}")

    async def _approve(self, uid: str) -> None:
        answer = await self.operator.act(f"adaptations/{uid}", "approve", {"reason": REASON})
        if answer.is_success:
            self.approved.add(uid)
            return
        problem = answer.json()
        self.output.say(f"not approved: {problem['detail']}")
        if problem["code"] == "evidence-stale":  # looked at the new numbers too
            body = {"reason": REASON, "accept_drift": True}
            if (await self.operator.act(f"adaptations/{uid}", "approve", body)).is_success:
                self.approved.add(uid)


async def find_run(operator: Person) -> str:
    """The demo's run, once its trainer has registered."""
    while not (runs := await operator.all("runs")):
        await asyncio.sleep(POLL_SECONDS)
    return str(runs[0]["uid"])


def audit_gaps(adaptations: Sequence[Json], audit: Sequence[Json]) -> list[str]:
    """Transitions that do not stand in the audit log: versions 1…n of each adaptation, linked."""
    gaps = []
    for adaptation in adaptations:
        rows = [row for row in audit if row["object"] == adaptation["uid"] and "to" in row["data"]]
        versions = [row["data"]["version"] for row in rows]
        states = [row["data"]["to"] for row in rows]
        linked = all(
            row["data"]["from"] == came for row, came in zip(rows[1:], states, strict=False)
        )
        if not rows or states[-1] != adaptation["state"] or not linked:
            gaps.append(
                f"A-{adaptation['number']}: {states} does not lead to {adaptation['state']}"
            )
        elif versions != sorted(set(versions)) or versions[-1] - versions[0] != len(versions) - 1:
            gaps.append(f"A-{adaptation['number']}: versions {versions} have gaps")
    return gaps


def failures(report: Json, gaps: Sequence[str]) -> list[str]:
    """Why the run does not count as a success; empty when it does."""
    found = [f"not in the audit log: {gap}" for gap in gaps]
    if not any(_shows_the_loop(adaptation) for adaptation in report["adaptations"]):
        found.append("no adaptation was approved by a person, certified, and kept or rolled back")
    if not report["audit_verified"]:
        found.append("the audit log's chain does not verify")
    if report["processes_left"]:
        found.append(f"{report['processes_left']} processes were left")
    missing = [name for name, value in report["timings_ms"].items() if value is None]
    if missing:
        found.append(f"no timing of {', '.join(missing)}")
    return found


def _shows_the_loop(adaptation: Json) -> bool:
    certificate = adaptation["certificate"] or {}
    return (
        adaptation["decided_by"] == OPERATOR
        and adaptation["state"] in GOOD_ENDS
        and adaptation["graft_step"] is not None
        and bool(certificate.get("passed"))
    )


def summary(detail: Json) -> Json:
    """One adaptation as the last line shows it."""
    return {
        "id": detail["uid"],
        "layer": detail["layer"],
        "blueprint": detail["blueprint"],
        "confidence": detail["confidence"],
        "decided_by": detail["decided_by"] or ("rule" if detail["decided_rule"] else None),
        "state": detail["state"],
        "graft_step": detail["graft_step"],
        "pause_ms": detail["pause_ms"],
        "certificate": detail["certificate"],
        "reward": detail["reward"],
    }


async def drive(esper: Esper, output: Output) -> tuple[Json, list[str]]:
    """Everything that happens while Esper runs; the report, and gaps in the audit log."""
    people = read_keyring(esper.site.data_dir)["people"]
    options: Any = {"base_url": esper.site.url, "timeout": 20.0}
    async with httpx.AsyncClient(**options) as one, httpx.AsyncClient(**options) as other:
        operator, auditor = Person(one), Person(other)
        await operator.sign_in(OPERATOR, people[OPERATOR]["password"])
        await auditor.sign_in(AUDITOR, people[AUDITOR]["password"])
        run = await find_run(operator)
        output.say(f"watching {run}")
        await Watch(operator, output).until_decided_and_ended(run)
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
        SmokeFailure: it did not come to a good end in time.
    """
    esper = Esper(Options(data_dir=data_dir, port=0, demos=(DEMO,), show_people=False), output)
    try:
        async with asyncio.timeout(LIMIT_SECONDS), esper:
            report, gaps = await drive(esper, output)
    except TimeoutError:
        raise SmokeFailure(f"not done after {LIMIT_SECONDS / 60:g} minutes") from None
    except httpx.HTTPError as error:
        raise SmokeFailure(f"the REST API: {error}") from error
    left = marked_processes(esper.site.mark)
    end_marked(esper.site.mark)
    report["processes_left"] = len(left)
    report["failures"] = failures(report, gaps)
    return report


def main() -> int:
    """Runs it in a temporary directory; the exit status."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="esper-smoke-") as directory:
        output = Output(Path(directory) / "log")
        try:
            report = asyncio.run(_interruptible(Path(directory), output))
        except (SmokeFailure, *STARTING_ERRORS) as error:
            output.plain(f"The smoke run failed: {error}")
            return 1
        finally:
            output.close()
    found = report.pop("failures")
    for failure in found:
        print(f"The smoke run failed: {failure}", flush=True)
    print(f"The smoke run took {time.monotonic() - began:.0f} s", flush=True)
    print(json.dumps(report), flush=True)
    return 1 if found else 0


async def _interruptible(directory: Path, output: Output) -> Json:
    task = asyncio.create_task(smoke(directory, output))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    with suppress(asyncio.CancelledError):
        return await task
    _stopped()


def _stopped() -> NoReturn:
    raise SmokeFailure("it was stopped")


if __name__ == "__main__":
    sys.exit(main())
