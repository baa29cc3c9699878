"""``./up --smoke``: one adaptation, end to end, through the real processes, with a person in it.

start all on free ports ─► the demos train ─► an adaptation waits ─► olga approves it by REST
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
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import httpx

from esper.contracts import AdaptationState
from hosts.keyring import read_keyring
from hosts.processes import end_marked, marked_processes
from launcher.smoke_timings import measure_timings
from launcher.supervise.output import Output
from launcher.supervisor import STARTING_ERRORS, Esper, Options

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

    async def until_decided_and_ended(self) -> str:
        """Approves what waits; the run in which such an adaptation has come to a good end."""
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


def audit_gaps(adaptations: Sequence[Json], audit: Sequence[Json]) -> list[str]:
    """Adaptations whose transitions do not all stand in the audit log, linked, from the first."""
    gaps = []
    for adaptation in adaptations:
        rows = [row for row in audit if row["object_uid"] == adaptation["uid"]]
        moves = [row["data"] for row in rows if "to" in row["data"]]
        if not _is_unbroken(moves) or moves[-1]["to"] != adaptation["state"]:
            trail = " ".join(move["to"] for move in moves) or "nothing"
            gaps.append(f"A-{adaptation['number']} is {adaptation['state']}, its trail is {trail}")
    return gaps


def _is_unbroken(moves: Sequence[Json]) -> bool:
    versions = [move["version"] for move in moves]
    linked = all(after["from"] == before["to"] for before, after in pairwise(moves))
    return versions[:1] == [1] and versions == sorted(set(versions)) and linked


def failures(report: Json, gaps: Sequence[str]) -> list[str]:
    """Why the run does not count as a success; empty when it does."""
    found = [f"not in the audit log: {gap}" for gap in gaps]
    if not any(_shows_the_loop(adaptation) for adaptation in report["adaptations"]):
        found.append("no adaptation was approved by a person, certified, and kept or rolled back")
    if not report["audit_verified"]:
        found.append("the audit log's chain does not verify")
    if report["processes_left"]:
        found.append(f"{report['processes_left']} processes were left")
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
        SmokeFailure: it did not come to a good end in time.
    """
    esper = Esper(Options(data_dir=data_dir, port=0, show_people=False), output)
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
