"""The policy's page: drafts with their back-test, and the scopes; the run's page names its own."""

from __future__ import annotations

import html
import re
from typing import Any

from apps.policies.services import approve_policy, current_policy, publish_policy
from tests.apps.cast import make_person


def words(client: Any, address: str) -> str:
    text = re.sub(r"<[^>]+>", " ", client.get(address).content.decode())
    return re.sub(r"\s+", " ", html.unescape(text))


def test_a_draft_shows_its_back_test_and_asks_another_person(world: Any) -> None:
    carl = world.people["carl"]
    draft = publish_policy(changes={"confidence_auto": 0.6}, reason="bolder", user=carl, via="")
    own, others = (words(world.client(who), "/policy") for who in ("carl", "ada"))
    for page in (own, others):
        assert f"Draft v{draft.version}, for all runs" in page
        assert "confidence auto 0.8 → 0.6 allows more" in page
        assert f"On the {draft.backtest['cases']} newest grafts" in page
    assert "Another curator or admin has to agree." in own
    assert f"Agree, put v{draft.version} in force" in others
    assert "Agree, put" not in own
    assert "Agree, put" not in words(world.client("vera"), "/policy")


def test_the_history_says_who_changed_what_and_why(world: Any) -> None:
    """Numbers as people write them, not 0.0033333333333333335."""
    carl, ada = world.people["carl"], world.people["ada"]
    draft = publish_policy(
        changes={"confidence_auto": 0.6, "min_gain_ratio": 0.01 / 3},
        reason="bolder",
        user=carl,
        via="",
    )
    approve_policy(version=draft, user=ada, via="", reason="the back-test looks right")
    page = words(world.client("vera"), "/policy")
    history = page[page.index("Versions") :]
    assert f"v{draft.version} all runs, in force" in history
    assert "carl bolder confidence auto 0.8 → 0.6" in history
    assert "0.00333" in history
    assert not re.search(r"\d\.\d{7}", page)


def test_the_pages_say_which_policy_holds_for_a_run(world: Any) -> None:
    run = world.runs["digits-cnn"]
    own = publish_policy(
        changes={"max_memory_mib": 64.0}, reason="small", user=make_person("cleo", "admin"),
        via="", scope="run", run=run,
    )  # fmt: skip
    assert current_policy(run) == own
    page = words(world.client("vera"), "/policy")
    assert f"run {run.uid} v{own.version} max memory mib 64 " in page
    page = words(world.client("vera"), f"/runs/{run.uid}")
    assert f"Decisions under policy v{own.version} for run {run.uid} · error budget" in page
