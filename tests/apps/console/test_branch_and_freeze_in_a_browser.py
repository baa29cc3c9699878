"""Branch from here and a freeze window, as a person sets them: with clicks, in Chromium."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from playwright.sync_api import Page, expect

from tests.apps.console.browsing import SignIn, wait_until_live
from tests.browser import TEST_SECONDS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(TEST_SECONDS)]


def open_run(page: Page, name: str) -> None:
    page.goto("/runs")
    page.locator(f"a:text-is('{name}')").click()
    wait_until_live(page)


@pytest.mark.parametrize("width", [1280, 390])
def test_a_branch_begins_from_the_chosen_state_with_changed_parameters(
    sign_in: SignIn, width: int
) -> None:
    page = sign_in("olga", width=width)
    open_run(page, "topics-lm")
    panel = page.locator("#panel-branches")
    page.select_option("#branch-state", "kept-200.pt")
    panel.locator("[name=schedule]").select_option("linear")
    panel.get_by_role("button", name="Start a branch").click()
    page.wait_for_url("**/launches/*")
    expect(page.locator("main")).to_contain_text("kept-200.pt")
    launch = page.locator("h1").inner_text().split()[0]

    open_run(page, "topics-lm")  # the parent goes on, and its tree shows the child
    expect(page.locator("main")).to_contain_text("Running")
    drawn = panel.locator(f".branches li:has-text('{launch}')")
    expect(drawn).to_contain_text("step 200")
    expect(drawn).to_contain_text("cosine → linear")


def test_a_viewer_reads_why_no_branch_starts(sign_in: SignIn) -> None:
    page = sign_in("vera")
    open_run(page, "topics-lm")
    panel = page.locator("#panel-branches")
    expect(panel.locator(".note")).to_be_visible()
    expect(panel.get_by_role("button", name="Start a branch")).to_have_count(0)


def test_in_a_freeze_no_approval_goes_through_until_it_is_ended(sign_in: SignIn) -> None:
    page = sign_in("carl")
    watching = sign_in("olga", width=390)
    watching.goto("/inbox")
    watching.locator("tr:has-text('classifier.2') a[data-open]").click()
    wait_until_live(watching)
    approve = watching.locator("[data-path=approve]")
    expect(approve).to_be_visible()
    page.goto("/switch")
    wait_until_live(page)
    now = datetime.now()  # noqa: DTZ005 (as the field of the browser on this machine takes it)
    page.select_option("#freeze-project", index=0)
    for field, at in (("from", now - timedelta(minutes=5)), ("until", now + timedelta(hours=2))):
        page.fill(f"#freeze-{field}", at.strftime("%Y-%m-%dT%H:%M"))
    page.fill("#freeze-reason", "the evaluation for the paper")
    page.get_by_role("button", name="Set a freeze").click()

    # Other pages say so without being loaded again, and a decision that is open loses its button.
    expect(watching.locator(".banner.frozen")).to_contain_text("the evaluation for the paper")
    expect(approve).to_have_count(0)
    expect(watching.locator("#panel-head")).to_contain_text("Waiting for a person")
    expect(watching.locator("#decision, main").first).to_contain_text("freeze")

    row = page.locator("#panel-freezes tr:has-text('the evaluation for the paper')")
    expect(row).to_contain_text("In effect")
    row.get_by_role("button", name="End now").click()
    page.locator("dialog[open] button:has-text('End it')").click()
    expect(row).to_contain_text("Ended early")
    expect(watching.locator(".banner.frozen")).to_have_count(0)
    approve.click()
    expect(watching.locator("#panel-head")).not_to_contain_text("Waiting for a person")
