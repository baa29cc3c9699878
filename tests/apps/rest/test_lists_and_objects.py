"""Lists in any order, by text and by range, as CSV and NDJSON; single objects; named members."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from apps.accounts.models import User
from apps.adaptations.models import Adaptation
from apps.blueprints.models import Blueprint
from apps.runs.models import Run
from apps.violations.services import record_violation
from esper.contracts import AdaptationState, Role, Severity, ViolationRule
from tests.apps.callers import Caller, Inbox
from tests.apps.cast import make_kernel, make_remedies, make_run

pytestmark = pytest.mark.django_db


@pytest.fixture
def runs(people: dict[Role, User]) -> list[Run]:
    """Five; the steps of two are equal, and one name would be a formula."""
    made = [make_run(people[Role.RESEARCHER], name=name) for name in ("=b", "a", "e", "d", "c")]
    for run, step in zip(made, (30, 10, 20, 20, 50), strict=True):
        Run.objects.filter(pk=run.pk).update(step=step)
    return made


def _walk(caller: Caller, path: str) -> list[dict[str, Any]]:
    """All pages forward, and back from the last one: both ways show the same rows."""
    pages, page = [], caller.get(path).data
    while True:
        pages.append(page["results"])
        if not page["next"]:
            break
        page = caller.get(page["next"]).data
    for expected in reversed(pages[:-1]):
        page = caller.get(page["previous"]).data
        assert page["results"] == expected
    return [row for rows in pages for row in rows]


@pytest.mark.parametrize("order", ["step", "-step", "name", "-created_at", "id"])
def test_every_order_is_stable_over_pages(viewer: Caller, runs: list[Run], order: str) -> None:
    found = _walk(viewer, f"runs?order_by={order}&limit=2")
    column = order.removeprefix("-")
    keys = [(row[{"id": "number"}.get(column, column)], row["number"]) for row in found]
    assert keys == sorted(keys, reverse=order.startswith("-"))
    assert len(found) == 5


def test_an_order_or_a_cursor_that_does_not_fit_is_refused(viewer: Caller, runs: list[Run]) -> None:
    assert viewer.get("runs?order_by=last_loss").code == "invalid"
    cursor = viewer.get("runs?order_by=name&limit=1").data["next"].split("cursor=")[1].split("&")[0]
    for order in ("step", "created_at"):
        assert viewer.get(f"runs?order_by={order}&cursor={cursor}").code == "invalid"


def test_ranges_and_texts_narrow_a_list(viewer: Caller, runs: list[Run]) -> None:
    def names(query: str) -> set[str]:
        return {row["name"] for row in viewer.get(f"runs?{query}").data["results"]}

    assert names("step__gte=20&step__lt=50") == {"=b", "e", "d"}
    assert names("q=RAFI") == {"=b", "a", "c", "d", "e"}
    assert names("q=%3Db") == {"=b"}
    assert names("created_at__gte=2100-01-01T00:00:00Z") == set()
    assert viewer.get("adaptations?confidence__gte=nan").code == "invalid"
    assert viewer.get("adaptations?confidence__gte=0.5").status == 200


def test_a_list_is_exported_whole_with_its_filters(viewer: Caller, runs: list[Run]) -> None:
    lines = viewer.get("runs?limit=1&step__lt=50", Accept="application/x-ndjson").response
    rows = [json.loads(line) for line in b"".join(lines.streaming_content).splitlines()]
    assert [row["name"] for row in rows] == ["d", "e", "a", "=b"]
    table = viewer.get("runs?format=csv&fields=name,step&order_by=step").response
    assert table.headers["Content-Type"] == "text/csv; charset=utf-8"
    found = list(csv.reader(io.StringIO(b"".join(table.streaming_content).decode())))
    assert found[0] == ["name", "step"]
    assert [row[0] for row in found[1:]] == ["a", "e", "d", "'=b", "c"]  # no spreadsheet runs it
    assert viewer.get("runs?format=xml").code == "invalid"
    assert viewer.get("me", Accept="text/csv").code == "not-acceptable"
    for wrong in ("order_by=no", "fields=secret", "limit=0", "cursor=x"):
        assert viewer.get(f"runs?{wrong}", Accept="text/csv").code == "invalid", wrong


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff20"])
def test_no_exported_text_begins_as_a_formula(viewer: Caller, runs: list[Run], first: str) -> None:
    Run.objects.filter(pk=runs[0].pk).update(name=f"{first}1+1")
    table = viewer.get("runs?format=csv&fields=name").response
    text = b"".join(table.streaming_content).decode()
    assert f"'{first}1+1" in [row[0] for row in csv.reader(io.StringIO(text, newline=""))]


def test_named_members_only(viewer: Caller, runs: list[Run]) -> None:
    page = viewer.get("runs?fields=uid,state&limit=1").data
    assert set(page["results"][0]) == {"uid", "state"}
    assert viewer.get(f"runs/{runs[0].uid}?fields=name").data == {"name": "=b"}
    assert viewer.get("runs?fields=secret").code == "invalid"
    assert viewer.get(f"runs/{runs[0].uid}?fields=secret").code == "invalid"


def test_every_collection_has_its_objects(
    operator: Caller, inbox: Inbox, blueprint: Blueprint
) -> None:
    make_kernel()
    make_remedies()
    waiting = inbox.waiting()
    found = record_violation(
        run=inbox.trainer.row(), rule=ViolationRule.SIGNATURE, severity=Severity.CAUTION,
        observed="1", limit="0", text="t", action="a",
    )  # fmt: skip
    operator.get("policies/current")
    for path in (
        f"violations/V-{found.number}", f"adaptations/A-{waiting.number}", "policies/1", "audit/1",
        f"kernels/{'d' * 64}", "remedies/rewind", f"blueprints/{blueprint.slug}",
        f"runs/R-{inbox.trainer.row().number}",
    ):  # fmt: skip
        assert operator.get(path).status == 200, path
    for path in ("violations/V-999", "policies/99", "audit/99999", f"kernels/{'0' * 64}",
                 "remedies/none", "jobs/none", "workers/none", "recipes/none",
                 "tokens/none"):  # fmt: skip
        assert operator.get(path).code == "not-found", path
    page = operator.get("tokens").data["results"][0]
    assert operator.get(f"tokens/{page['uid']}").data == page


def test_the_index_names_what_can_be_read(viewer: Caller) -> None:
    index = viewer.get("/api/v1/").data
    for name, address in index["collections"].items():
        assert viewer.get(address).status in {200, 400}, name
    assert {"runs", "adaptations", "violations", "audit", "me"} <= set(index["collections"])


def test_several_are_rejected_each_by_itself(operator: Caller, inbox: Inbox) -> None:
    waiting = inbox.waiting()
    body = {
        "reason": "the run ends",
        "adaptations": [
            {"uid": waiting.uid, "version": waiting.version},
            {"uid": waiting.uid, "version": waiting.version},
            {"uid": "adp_none", "version": 1},
        ],
    }
    would = operator.post("adaptations/reject?dry_run=true", body).data
    assert (would["rejected"], would["dry_run"]) == (1, True)
    assert Adaptation.objects.get().state == AdaptationState.AWAITING_APPROVAL
    done = operator.post("adaptations/reject", body).data
    assert [one["status"] for one in done["results"]] == [200, 409, 404]
    assert Adaptation.objects.get().decision_reason == "the run ends"
    assert operator.post("adaptations/reject", {**body, "adaptations": []}).code == "invalid"


def test_acts_say_how_many_more_may_be_sent(operator: Caller, inbox: Inbox) -> None:
    first = operator.post(f"{inbox.trainer.path}/pause-adaptation")
    second = operator.post(f"{inbox.trainer.path}/resume-adaptation")
    assert first.header("RateLimit-Limit") == "300"
    left = [int(answer.header("RateLimit-Remaining")) for answer in (first, second)]
    assert left[0] - left[1] == 1
    assert operator.get("runs").header("RateLimit-Limit") == ""
