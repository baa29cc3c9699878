"""The pages in a real Chromium: acts, live updates, access, and what a stale page allows."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Sequence
from itertools import cycle
from typing import Any, Literal

import pytest
from axe_playwright_python.base import AXE_SCRIPT  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP
from playwright.sync_api import Page, Route, WebSocketRoute, expect

from apps.notifications.web_push import from_text
from tests.apps.cast import PASSWORD
from tests.apps.console.browsing import SignIn, wait_until_live
from tests.apps.notifications.test_web_push import OneBrowser
from tests.browser import TEST_SECONDS, WAIT_MS

pytestmark = [pytest.mark.browser, pytest.mark.timeout(TEST_SECONDS)]

ColorScheme = Literal["light", "dark"]


def pages_of(page: Page) -> list[str]:
    """One of each kind, found by following the pages' own links."""
    page.goto("/inbox?state=history")
    kept = page.locator("a[data-open]").last.get_attribute("href")
    page.goto("/inbox")
    waiting = page.locator("tr:has-text('classifier.2') a[data-open]").get_attribute("href")
    page.goto("/runs")
    run = page.locator("a:text-is('digits-cnn')").get_attribute("href")
    page.goto("/recipes")
    recipe = page.locator("a[data-open]:text-is('Digits')").get_attribute("href")
    launches = [
        page.locator(f"tr:has-text('{state}') a[data-open]:has-text('L-')").get_attribute("href")
        for state in ("Running", "Failed")
    ]
    plain = [
        "/",
        "/inbox",
        "/blueprints",
        "/blueprints/proj_ia3",
        "/incidents",
        "/violations",
        "/switch",
    ]
    compiled = f"/kernels/{'ef' * 32}"
    page.goto(compiled)
    merged = page.locator("#panel-speed_ups a").first.get_attribute("href")
    page.goto("/runs")
    merged_run = page.locator("a:text-is('topics-lm')").get_attribute("href")
    kernels = ["/workers", "/kernels", f"/kernels/{'ab' * 32}", compiled, merged, merged_run]
    (plan,) = page.request.get("/api/v1/plans").json()["results"]
    found = [
        *plain,
        f"/plans/{plan['uid']}",
        "/projects",
        *kernels,
        "/policy",
        "/recipes",
        recipe,
        *launches,
        "/audit?verify=1",
        "/me#new-channel-fold",
        "/search?q=digits",
        "/duty",
        "/status",
        "/wall",
        "/report",
        "/accessibility",
        run,
        kept,
        waiting,
    ]
    return [address for address in found if address]


def wait_until_complete(page: Page) -> None:
    """Connected, and the charts of a run's page are drawn."""
    wait_until_live(page)
    for summary in page.locator("#loss-summary, #heat-summary").all():
        expect(summary).not_to_contain_text("Loading")


Look = tuple[ColorScheme, int]  # colours, and the width of a desktop or of a phone
ONE: tuple[Look, ...] = (("light", 1280), ("dark", 390))
OTHER: tuple[Look, ...] = (("light", 390), ("dark", 1280))


# The page hears of its new size before the next frame. Headless Chromium sometimes draws no more
# frames, and a call of `evaluate` has no limit: the test would hang. Django's admin moves between
# colours, too, for people who want no motion.
SETTLE = """async () => {
    await new Promise((done) => {
        requestAnimationFrame(() => setTimeout(done));
        setTimeout(done, 5000);
    });
    document.getAnimations()
        .filter(one => one instanceof CSSTransition).forEach(one => one.finish());
}"""


def barriers_of(page: Page, looks: Sequence[Look]) -> list[tuple[str, str, int, str, str]]:
    """What axe finds serious in each of the looks."""
    found = []
    page.evaluate(AXE_SCRIPT)
    for colours, width in looks:
        # Without motion: axe would see a button between the colours of two looks.
        page.emulate_media(color_scheme=colours, reduced_motion="reduce")
        page.set_viewport_size({"width": width, "height": 844})
        page.evaluate(SETTLE)
        for barrier in page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]:
            if barrier["impact"] in ("serious", "critical"):
                node = str(barrier["nodes"][0]["target"])
                found.append((page.url, colours, width, barrier["id"], node))
    return found


BESIDE_THE_CONSOLE = (
    "/admin/",
    "/admin/blueprints/blueprint/",
    "/admin/policies/policyversion/1/change/",
    "/api/docs",
)


def width_beyond_the_screen(page: Page) -> int:
    """Pixels by which the page is wider; on a phone it scrolls sideways then."""
    over: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return max(over, 0)


# Each page is seen in both colours and at both widths, and in half of their products: axe takes its
# time. ./check --all looks at the other half.
@pytest.mark.parametrize(
    "looks", [(ONE, OTHER), pytest.param((OTHER, ONE), marks=pytest.mark.full)]
)
def test_no_page_has_a_serious_barrier_or_scrolls_sideways_on_a_phone(
    sign_in: SignIn, looks: tuple[Sequence[Look], Sequence[Look]]
) -> None:
    page, turns = sign_in("ada"), cycle(looks)
    barriers, wide = [], []
    for address in pages_of(page):
        page.set_viewport_size({"width": 360, "height": 844})
        page.goto(address)
        wait_until_complete(page)
        if over := width_beyond_the_screen(page):
            wide.append((address, over))
        barriers += barriers_of(page, next(turns))
    other = page.context.new_page()  # their own scripts are not ours to complain of
    for address in BESIDE_THE_CONSOLE:
        other.goto(address, wait_until="networkidle")
        if address == "/api/docs":
            other.locator(".opblock").first.wait_for()
        barriers += barriers_of(other, next(turns))
    assert barriers == [], "\n".join(map(str, barriers))
    assert wide == []


def test_a_press_before_the_scripts_have_loaded_is_not_taken(sign_in: SignIn) -> None:
    """Nothing would have been asked for: the browser would have loaded the page again."""
    page = sign_in("olga")
    page.goto("/inbox")
    wait_until_live(page)
    waiting = page.locator("tr:has-text('classifier.2') a[data-open]").get_attribute("href")
    takes = "button => getComputedStyle(button).pointerEvents"
    empty = {"body": "", "content_type": "text/javascript"}
    page.route("**/console/console*.js", lambda route: route.fulfill(**empty))
    page.goto(waiting or "")
    assert page.locator("#act-approve").evaluate(takes) == "none"
    page.unroute_all()
    page.goto(waiting or "")
    wait_until_live(page)
    assert page.locator("#act-approve").evaluate(takes) == "auto"


def test_the_run_page_draws_loss_and_layers_and_says_them_in_words(sign_in: SignIn) -> None:
    page = sign_in("vera")
    page.goto("/runs")
    page.click("a:text-is('digits-cnn')")
    expect(page.locator("#loss-summary")).to_contain_text("at step 299")
    expect(page.locator("#loss-summary")).to_contain_text("2 grafts are marked")
    expect(page.locator("#heat-summary")).to_contain_text("in classifier.2")
    expect(page.locator("#loss-chart canvas")).to_have_count(1)
    page.click("#loss details summary")
    expect(page.locator("#loss-table tbody tr").nth(10)).to_be_visible()


def test_a_spike_does_not_hide_the_rest_of_a_run_with_a_held_out_loss(sign_in: SignIn) -> None:
    page = sign_in("vera")

    def answer(route: Route) -> None:
        steps = [10, 150] if "eval_loss" in route.request.url else list(range(0, 300, 3))
        loss = [400.0 if step == 150 else 2.0 for step in steps]
        body = {"step": steps, "min": loss, "mean": loss, "max": loss, "width": 3, "non_finite": []}
        route.fulfill(json=body)

    page.add_init_script(
        "addEventListener('readystatechange', () => {"
        " const panel = document.getElementById('loss');"
        " if (panel) panel.dataset.heldOut = 'eval_loss'; }, true)"
    )
    page.goto("/runs")
    page.route("**/metrics?*", answer)
    page.click("a:text-is('digits-cnn')")
    expect(page.locator("#loss-summary")).to_contain_text("400")
    assert page.locator("#scale").get_attribute("aria-pressed") == "true"


def test_loss_events_and_layers_share_one_axis_and_one_cursor(sign_in: SignIn) -> None:
    page = sign_in("vera")
    page.goto("/runs")
    page.click("a:text-is('digits-cnn')")
    wait_until_complete(page)
    kept = page.locator("#lane a.event", has=page.locator("svg")).first
    expect(kept).to_have_attribute("aria-label", re.compile(r"^step 100: A-\d+ mlp_gelu_2048"))
    middle = "box => box.getBoundingClientRect().x + box.getBoundingClientRect().width / 2"
    page.locator("#heat-canvas").hover(position={"x": kept.evaluate(middle) - 30, "y": 20})
    lines = page.locator(".cursor-line")
    at = lines.evaluate_all("lines => lines.map(line => line.getBoundingClientRect().x)")
    assert len(at) == 2
    assert abs(at[0] - at[1]) < 1
    legend = page.locator("#loss-chart .u-legend .u-series").first
    step = int(re.sub(r"\D", "", legend.inner_text()))
    tip = page.locator("#heat-tip").inner_text()
    assert abs(step - int(tip.split("step ")[1].split(":")[0].replace(",", ""))) <= 5
    page.select_option("#window", "start")  # the early steps go out of sight, with their events
    expect(page.locator("#lane .event")).to_have_count(2)
    page.select_option("#heat-by", "change")
    expect(page.locator("#heat-summary")).to_contain_text("deviation from the layer's own past")
    page.fill("#heat-filter", "classifier")
    expect(page.locator("#heat-summary")).to_contain_text("3 of 6 layers")
    kept.click()
    expect(page.locator("h1")).to_contain_text("mlp_gelu_2048 into classifier.0")


def test_events_that_lie_together_are_one_cluster_that_opens(sign_in: SignIn) -> None:
    page = sign_in("vera", width=390)
    page.goto("/runs")
    page.click("a:text-is('digits-cnn')")
    wait_until_complete(page)
    page.evaluate(
        """() => {
            const place = document.getElementById("markers");
            const [mark] = JSON.parse(place.textContent);
            const near = [...Array(12).keys()].map(i => ({...mark, id: `x${i}`, step: 200 + i}));
            near[4].tone = "serious";
            place.textContent = JSON.stringify([mark, ...near]);
            const detail = { target: document.getElementById("panel-timeline") };
            document.dispatchEvent(new CustomEvent("htmx:afterSwap", { detail }));
        }"""
    )
    cluster = page.locator("#lane button.event")
    expect(cluster).to_have_text("12")
    expect(cluster).to_have_attribute("data-tone", "serious")
    cluster.click()
    expect(page.locator("#lane-list a")).to_have_count(12)
    expect(page.locator("#lane .event")).not_to_have_count(2)  # zoomed to them


def test_a_browser_does_not_run_hostile_names(sign_in: SignIn) -> None:
    page = sign_in("olga")
    page.goto("/runs?state=finished")
    page.click("tr[data-row] a[data-open]")
    expect(page.locator("#heat-summary")).to_contain_text("⟨U+202E⟩")
    assert "pwned" not in page.title().split("·")[-1]
    assert page.evaluate("document.title") != "pwned"
    assert page.locator("img").count() == 0


def test_a_stale_page_blocks_approving_and_nothing_else(sign_in: SignIn) -> None:
    silent: list[bool] = []

    def relay(browser: WebSocketRoute) -> None:
        server = browser.connect_to_server()
        server.on_message(lambda message: None if silent else browser.send(message))

    page = sign_in("oscar")
    page.route_web_socket("**/ws/v1/stream", relay)
    page.clock.install()
    page.goto("/inbox")
    page.locator("tr:has-text('classifier.2') a[data-open]").click()
    wait_until_live(page)
    silent.append(True)  # a ping between two looks would make the page live again
    page.clock.fast_forward(26_000)  # no message for longer than two pings
    expect(page.locator("#stale-banner")).to_contain_text("Approving is blocked")
    approve, reject = page.locator("[data-path=approve]"), page.locator("[data-path=reject]")
    expect(approve).to_have_attribute("aria-disabled", "true")
    assert reject.get_attribute("aria-disabled") is None
    expect(page.locator("[data-stale-note]")).to_contain_text(
        "blocked until the connection is back"
    )


def test_a_decision_that_expires_loses_its_buttons_in_an_open_tab(sign_in: SignIn) -> None:
    page = sign_in("oscar")
    page.clock.install()
    page.goto("/inbox")
    page.locator("tr:has-text('classifier.2') a[data-open]").click()
    wait_until_live(page)
    approve = page.locator("[data-path=approve]")
    expect(approve).to_be_enabled()
    page.route("**/*panel=*", lambda route: route.fulfill(status=204))  # its clock has not moved
    page.clock.fast_forward(20 * 60_000)
    expect(page.locator("[data-expires]").first).to_have_text("0:00")
    assert page.locator("#acts button:not(:disabled)").count() == 0


def test_messages_cover_no_control_and_move_none(sign_in: SignIn) -> None:
    page = sign_in("oscar", width=390)
    page.goto("/inbox")
    page.locator("tr:has-text('classifier.2') a[data-open]").click()
    wait_until_live(page)
    reject = page.locator("[data-path=reject]")
    reject.scroll_into_view_if_needed()
    before = reject.bounding_box()
    reject.click()  # without a reason
    expect(page.locator("#acts-error")).to_contain_text("Give a reason")
    assert reject.bounding_box() == before
    page.click("[data-path=claim]")
    expect(page.locator(".toast")).to_contain_text("Claimed")
    expect(page.locator("[data-path=release]")).to_be_visible()
    for control in ("[data-path=reject]", "[data-path=approve]", "#switch-menu > summary", "h1"):
        page.locator(control).scroll_into_view_if_needed()
        assert page.locator(control).evaluate(
            """control => {
                const { x, y, width, height } = control.getBoundingClientRect();
                const top = document.elementFromPoint(x + width / 2, y + height / 2);
                return !top?.closest(".toasts");
            }"""
        ), control
    page.click("[data-path=release]")
    expect(page.locator("[data-path=claim]")).to_be_visible()


IN_SIGHT = """part => {
    const { top, bottom } = part.getBoundingClientRect();
    const bar = document.querySelector(".actionbar").getBoundingClientRect();
    return top >= 0 && bottom <= (part.closest(".actionbar") ? innerHeight : bar.top);
}"""


def test_a_decision_on_a_phone_is_asked_on_the_first_screen_and_ends_on_the_third(
    sign_in: SignIn,
) -> None:
    page = sign_in("ada", width=390)
    page.set_viewport_size({"width": 390, "height": 844})
    answer = page.request.get("/api/v1/adaptations?state=awaiting_approval")
    waiting = answer.json()["results"]
    assert waiting
    for row in waiting:
        page.goto(f"/adaptations/{row['uid']}")
        wait_until_live(page)
        question = ["#title-head", ".decision-head .countdown", "#panel-forecast"]
        first = [*question, "#panel-why li >> nth=0", "[data-path=reject]", "[data-path=approve]"]
        assert [part for part in first if not page.locator(part).evaluate(IN_SIGHT)] == []
        assert page.evaluate("document.documentElement.scrollHeight") <= 3 * 844
        expect(page.locator("#reason")).to_be_hidden()
        page.click("[data-path=reject]")  # asks for the reason
        expect(page.locator("#reason")).to_be_focused()
        page.click("#acts-unfold")
        expect(page.locator("#reason")).to_be_hidden()


def test_rows_open_by_keyboard(sign_in: SignIn) -> None:
    page = sign_in("vera")
    page.goto("/inbox")
    wait_until_live(page)
    page.keyboard.press("j")
    page.keyboard.press("o")
    page.wait_for_url("**/adaptations/*")
    wait_until_live(page)
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()


def test_chosen_rows_are_rejected_together_and_each_failure_is_named(sign_in: SignIn) -> None:
    page = sign_in("olga")
    page.goto("/inbox")
    wait_until_live(page)
    boxes = page.locator("[data-pick]")
    number = boxes.count()
    bar = page.locator("#bulk-reject")
    expect(bar).to_be_hidden()
    boxes.nth(number - 1).check()
    expect(bar).to_contain_text("Reject 1")
    page.evaluate("document.querySelector('#panel-list').dispatchEvent(new Event('refresh'))")
    page.wait_for_timeout(300)
    expect(boxes.nth(number - 1)).to_be_checked()  # a refreshed list keeps the choice
    failed = '{"rejected": 0, "results": [{"uid": "adp_x", "status": 409, "state": null,'
    failed += ' "problem": {"detail": "Somebody was first."}}]}'
    page.route(
        "**/api/v1/adaptations/reject",
        lambda route: route.fulfill(status=200, body=failed, content_type="application/json"),
        times=1,
    )
    bar.locator("button").click()
    expect(bar.locator("[role=alert]")).to_have_text("Say why you reject them.")
    page.fill("#bulk-reason", "none of these now")
    bar.locator("button").click()
    expect(bar.locator("[role=alert]")).to_contain_text("0 of 1 rejected. adp_x: Somebody was")


def test_a_decision_is_found_read_and_approved_by_keyboard_alone(sign_in: SignIn) -> None:
    page = sign_in("olga")
    wait_until_live(page)
    sent: list[str] = []

    def note(route: Route) -> None:  # the small world of these tests stays as it is
        sent.append(route.request.post_data_json["evidence_hash"])
        route.fulfill(status=200, body="{}", content_type="application/json")

    page.route("**/approve", note)
    for key in ("g", "i"):
        page.keyboard.press(key)
    page.wait_for_url("**/inbox")
    wait_until_live(page)
    for key in ("j", "o"):
        page.keyboard.press(key)
    page.wait_for_url("**/adaptations/*")
    wait_until_live(page)
    approve = page.locator("#acts button[data-path=approve]")
    for _ in range(150):
        page.keyboard.press("Tab")
        if approve.evaluate("button => button === document.activeElement"):
            break
    expect(approve).to_be_focused()
    expect(approve).to_be_in_viewport()  # the focus is hidden by nothing
    page.keyboard.press("Enter")
    reason = "This graft is of high risk: say why you approve it."
    if approve.get_attribute("data-needs-reason"):
        expect(page.locator("#acts [role=alert]")).to_contain_text(reason)
        page.keyboard.type("seen")  # the cursor is in the field already
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    expect(page.locator("#toasts")).to_contain_text("Approved.")
    assert [len(shown) for shown in sent] == [64]


def test_a_recipe_is_started_from_its_page_and_stopped_from_its_launch(sign_in: SignIn) -> None:
    page, vera = sign_in("olga"), sign_in("vera")
    page.goto("/recipes")
    address = page.locator("a[data-open]:text-is('Digits')").get_attribute("href")
    assert address
    vera.goto(address)
    expect(vera.locator("#panel-about")).to_contain_text("Only admins or operators may start")
    page.goto(address)
    page.fill("#p-steps", "50")
    page.click("text=Start on host-a")
    assert page.evaluate("document.querySelector('#p-steps').validity.rangeUnderflow")
    page.fill("#p-steps", "500")
    page.select_option("#p-schedule", "linear")
    page.click("text=Start on host-a")
    page.wait_for_url("**/launches/lau_*")
    expect(page.locator("#launch-state")).to_contain_text("Requested")
    expect(page.locator("#panel-head")).to_contain_text("schedule=linear")
    vera.goto(page.url)
    wait_until_live(vera)
    assert vera.locator("#stop-form").count() == 0
    page.fill("#stop-reason", "a mistake")
    page.click("#stop-form button")
    page.click("dialog button.danger")
    expect(vera.locator("#launch-state")).to_contain_text("Stopped")  # pushed, not reloaded
    expect(vera.locator("#panel-head")).to_contain_text("a mistake")


def test_the_kill_switch_is_seen_by_everybody_at_once(sign_in: SignIn) -> None:
    olga, vera = sign_in("olga"), sign_in("vera")
    wait_until_live(vera)
    olga.click("#switch-menu summary")
    olga.click("text=Kill all adaptation")
    expect(vera.locator("#switch-menu .pill")).to_contain_text("KILLED")
    expect(olga.locator("#switch-menu .pill")).to_contain_text("KILLED")
    expect(olga.locator("#switch-menu[open]")).to_have_count(0)
    olga.click("#switch-menu summary")
    olga.click("text=Switch adaptation on")
    expect(vera.locator("#switch-menu .pill")).not_to_contain_text("KILLED")


# As if the last row had come since the page was opened, of which the list hears now.
LOSE_A_ROW = """() => {
  [...document.querySelectorAll("[data-row]")].at(-1).remove();
  const panel = document.querySelector("[data-show-held]").closest("[data-panel]");
  const type = panel.dataset.events.split(" ")[0];
  document.dispatchEvent(new CustomEvent("esper:event", { detail: { type } }));
}"""


def test_held_rows_are_shown_when_the_pointer_leaves_the_list(sign_in: SignIn) -> None:
    vera = sign_in("vera")
    vera.goto("/inbox")
    wait_until_live(vera)
    rows = vera.locator("[data-row]")
    count = rows.count()
    rows.first.hover()
    vera.evaluate(LOSE_A_ROW)
    expect(vera.locator("[data-show-held]")).to_contain_text("1 new")
    expect(rows).to_have_count(count - 1)
    vera.mouse.move(5, 5)
    expect(rows).to_have_count(count)


# A notice comes up under the pointer, and the list hears of one more event.
COVER_AND_REFRESH = """() => {
  const cover = document.body.appendChild(document.createElement("div"));
  cover.id = "cover";
  cover.style = "position: fixed; inset: 0; z-index: 9999";
  const panel = document.querySelector("[data-show-held]").closest("[data-panel]");
  panel.addEventListener("htmx:afterRequest", () => { cover.dataset.refreshed = "yes"; });
  const type = panel.dataset.events.split(" ")[0];
  const tell = () => document.dispatchEvent(new CustomEvent("esper:event", { detail: { type } }));
  setTimeout(tell, 500);  // behind the browser's own look at what is under the pointer
}"""


def test_rows_do_not_move_under_the_pointer(sign_in: SignIn) -> None:
    vera, oscar = sign_in("vera"), sign_in("oscar")
    vera.goto("/inbox")
    wait_until_live(vera)
    row = vera.locator("tr:has-text('features.3')")
    row.hover()
    oscar.goto("/inbox")
    oscar.locator("tr:has-text('features.3') a[data-open]").click()
    oscar.fill("#reason", "not on the first layers")
    oscar.click("[data-path=reject]")
    expect(oscar.locator("#panel-head")).to_contain_text("oscar rejected it")
    show = vera.locator("[data-show-held]")
    expect(show).to_contain_text("1 decided")
    assert row.count() == 1  # still there, marked as decided
    expect(vera.locator("#inbox-count")).to_contain_text("1")
    vera.evaluate(COVER_AND_REFRESH)
    expect(vera.locator("#cover[data-refreshed]")).to_have_count(1)
    vera.evaluate("document.getElementById('cover').remove()")
    expect(show).to_be_visible()
    show.click()
    expect(row).to_have_count(0)


def test_the_buttons_stay_locked_until_the_new_state_is_on_the_page(sign_in: SignIn) -> None:
    """The state and the buttons are asked for first: the other panels wait until they are here."""
    page = sign_in("olga")
    page.goto("/inbox")
    page.locator("tr:has-text('classifier.2') a[data-open]").click()
    wait_until_live(page)
    page.route("**/approve", lambda route: route.fulfill(status=200, json={}))
    held: list[Route] = []
    page.route("**/*panel=*", lambda route: held.append(route))  # a slow server
    page.click("[data-path=approve]")
    expect(page.locator("#toasts")).to_contain_text("Approved.")
    buttons = page.locator("#acts button:not([data-unfold])")
    expect(page.locator("#act-approve")).to_have_text("Approved.")
    assert not any(buttons.nth(at).is_enabled() for at in range(buttons.count()))
    assert {one.request.url.rpartition("=")[2] for one in held} <= {"head", "acts"}
    page.unroute("**/*panel=*")
    for one in held:
        one.continue_()
    expect(page.locator("#act-approve")).to_be_enabled()  # this server has approved nothing
    expect(page.locator("#act-approve")).to_have_text(re.compile("^Approve "))


def test_two_operators_race_and_the_loser_is_told_who_won(sign_in: SignIn) -> None:
    """Last in this file: it uses up the decision that the tests above look at."""
    olga, oscar = sign_in("olga"), sign_in("oscar")
    olga.goto("/inbox")
    address = olga.locator("tr:has-text('classifier.2') a[data-open]").get_attribute("href")
    assert address
    # Oscar's page must not refresh before he presses the button, or there is no race.
    oscar.route("**/*panel=*", lambda route: route.fulfill(status=204))
    for page in (olga, oscar):
        page.goto(address)
        wait_until_live(page)
    olga.click("[data-path=reject]")
    expect(olga.locator("#acts-error")).to_contain_text("Give a reason for the rejection")
    oscar.fill("#reason", "the loss still falls")
    olga.click("[data-path=approve]")
    expect(olga.locator("#panel-head")).to_contain_text("olga approved it")
    oscar.click("[data-path=reject]")
    expect(oscar.locator("#acts-error")).to_contain_text("olga")
    oscar.unroute("**/*panel=*")
    assert oscar.input_value("#reason") == "the loss still falls"
    expect(oscar.locator("#panel-head")).to_contain_text("olga approved it")


def test_a_worker_is_drained_and_released_after_a_question(sign_in: SignIn) -> None:
    page = sign_in("oscar")
    page.goto("/workers")
    row = page.locator("#panel-workers tr:has-text('compile@host-a')")
    row.locator("summary").click()
    row.locator("button:text-is('Drain')").click()
    expect(row.locator("[role=alert]")).to_contain_text("Give a reason")
    row.locator("input[name=reason]").fill("a new driver")
    row.locator("button:text-is('Drain')").click()
    question = page.get_by_role("dialog", name="Drain compile@host-a?")
    expect(question).to_contain_text("It finishes mlp_gelu_2048 for classifier.2 first.")
    expect(question).to_contain_text("nothing is built for it until this one is released")
    question.locator("button:text-is('Keep it as it is')").click()
    expect(row).not_to_contain_text("Draining")
    row.locator("button:text-is('Drain')").click()
    page.locator("dialog button:text-is('Drain it')").click()
    expect(row).to_contain_text("Draining")
    expect(row).to_contain_text("oscar: a new driver")
    row.locator("button:has-text('Release')").click()
    page.locator("dialog button:text-is('Release it')").click()
    expect(row).not_to_contain_text("Draining")


def test_a_kernel_is_pinned_unpinned_and_evicted_on_its_page(sign_in: SignIn) -> None:
    page = sign_in("oscar")
    page.goto(f"/kernels/{'ef' * 32}")
    kept = page.locator("#panel-kept")
    expect(kept).to_contain_text("pinned by olga")
    assert kept.locator("button:text-is('Evict')").count() == 0
    kept.locator("button:text-is('Unpin')").click()
    expect(kept).to_contain_text("not pinned")
    kept.locator("button:text-is('Pin')").click()
    expect(kept).to_contain_text("pinned by oscar")
    kept.locator("button:text-is('Unpin')").click()
    kept.locator("button:text-is('Evict')").click()
    question = page.get_by_role("dialog", name="Evict the kernel of proj_lora_64?")
    expect(question).to_contain_text("builds it again (about 42 ms)")
    question.locator("button:text-is('Evict it')").click()
    expect(kept).to_contain_text("Not in the cache")
    expect(kept.locator("button")).to_have_count(0)


def test_ctrl_k_finds_a_run_and_opens_it_without_a_mouse(sign_in: SignIn) -> None:
    page = sign_in("vera")
    page.goto("/audit")
    wait_until_live(page)
    page.keyboard.press("Control+k")
    hits = page.locator("#palette-hits [role=option]")
    expect(page.locator("#palette-q")).to_be_focused()
    page.keyboard.type("digits")
    expect(hits.first).to_contain_text("digits-cnn")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    expect(hits.first).to_have_attribute("aria-selected", "true")
    assert [row for row in barriers_of(page, ONE) if row[3] != "color-contrast"] == []
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/run_*")
    page.keyboard.press("Control+k")
    page.keyboard.press("Escape")
    expect(page.locator("#palette")).not_to_be_visible()


def test_a_dangerous_act_asks_for_the_password_and_is_then_done(sign_in: SignIn) -> None:
    page = sign_in("olga")
    page.goto("/me")
    wait_until_live(page)
    old = '{"code": "password-needed", "detail": "This needs your password again."}'
    page.route(
        "**/api/v1/tokens",
        lambda route: route.fulfill(status=403, body=old, content_type="application/problem+json"),
        times=1,
    )
    page.fill("#token-name", "nightly")
    page.check("#new-token input[value=read]")
    page.click("#new-token button[type=submit]")
    page.fill("#step-up-password", "wrong")
    page.click("dialog button:text-is('Go on')")
    expect(page.locator("dialog [role=alert]")).to_have_text("The password is wrong.")
    page.fill("#step-up-password", PASSWORD)
    page.keyboard.press("Enter")
    expect(page.locator("#new-token .secret")).to_contain_text("esp_")
    expect(page.locator("#token-name")).to_have_value("nightly")


def test_an_app_is_set_up_and_asked_for_without_a_barrier(sign_in: SignIn) -> None:
    """Its pages work without a script, and the dialog before a dangerous act asks for a code."""
    page = sign_in("rafi")
    page.goto("/me/second-factor")
    barriers = barriers_of(page, (*ONE, *OTHER))
    secret = base64.b32decode(page.locator("ol code").inner_text().replace(" ", ""))
    totp = TOTP(secret, 6, SHA1(), 30)  # noqa: S303
    page.fill("#id_code", totp.generate(int(time.time())).decode())
    page.click("button[value=turn-on]")
    codes = page.locator(".recovery-codes code").all_inner_texts()
    assert len(codes) == 10
    barriers += barriers_of(page, (*ONE, *OTHER))
    page.click("text=I have kept them")
    page.wait_for_url("**/")
    page.goto("/me/second-factor")
    barriers += barriers_of(page, (*ONE, *OTHER))
    page.goto("/me")
    wait_until_live(page)
    page.route(
        "**/api/v1/tokens",
        lambda route: route.fulfill(
            status=403,
            body='{"code": "password-needed", "detail": "This needs your password again."}',
            content_type="application/problem+json",
        ),
        times=1,
    )
    page.fill("#token-name", "nightly")
    page.check("#new-token input[value=read]")
    page.click("#new-token button[type=submit]")
    page.fill("#step-up-password", PASSWORD)
    page.fill("#step-up-code", "000000")
    page.click("dialog button:text-is('Go on')")
    expect(page.locator("dialog [role=alert]")).to_have_text("The code is wrong.")
    page.fill("#step-up-code", codes[0])
    page.keyboard.press("Enter")
    expect(page.locator("#new-token .secret")).to_contain_text("esp_")
    page.context.clear_cookies()
    page.goto("/login?next=/runs")
    page.fill("#id_username", "rafi")
    page.fill("#id_password", PASSWORD)
    page.click("button[type=submit]")
    page.wait_for_url("**/login/code")
    barriers += barriers_of(page, (*ONE, *OTHER))
    page.fill("#id_code", codes[1])
    page.click("button[type=submit]")
    page.wait_for_url("**/runs")
    admin = sign_in("ada")
    admin.goto("/people")
    wait_until_live(admin)
    admin.click("summary:text-is('Lost the phone')")
    barriers += barriers_of(admin, (*ONE, *OTHER))
    assert barriers == [], "\n".join(map(str, barriers))


FAKE_NOTIFICATIONS = """
window.told = [];
window.Notification = class {
  constructor(title, options) { window.told.push([title, options.body, options.data.address]); }
  static permission = "granted";
  static async requestPermission() { return "granted"; }
};
Object.defineProperty(navigator, "serviceWorker", { value: undefined });
"""
TELL = """async (hidden) => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  const { tellSystem } = await import(document.querySelector("script[src*='console/console']").src
    .replace(/console\\.[^/]*$/, "notify.js"));
  await tellSystem({ title: "A-1 waits", body: "x", address: "/adaptations/a", tag: "a" });
  return window.told;
}"""


def test_the_system_is_told_of_decisions_only_where_the_account_wants_it(sign_in: SignIn) -> None:
    page = sign_in("carl")
    page.add_init_script(FAKE_NOTIFICATIONS)
    page.goto("/me")
    wait_until_live(page)
    assert page.evaluate(TELL, True) == []
    page.check("[data-notify]")
    page.click("#settings-form button[type=submit]")
    page.wait_for_url("**/me?saved=1*")
    wait_until_live(page)
    assert page.evaluate(TELL, False) == []  # the page itself is looked at
    assert page.evaluate(TELL, True) == [["A-1 waits", "x", "/adaptations/a"]]


# Chromium has no push service here: what it would answer. The rest is the browser's own.
FAKE_PUSH_SERVICE = """(() => {
  let made = null;
  PushManager.prototype.subscribe = async function (options) {
    window.asked = options;
    const keys = { p256dh: "%s", auth: "AAECAwQFBgcICQoLDA0ODw" };
    const endpoint = "https://push.example.org/send/abc";
    made = { endpoint, toJSON: () => ({ endpoint, keys }), unsubscribe: async () => true };
    return made;
  };
  PushManager.prototype.getSubscription = async () => made;
})()"""
REGISTER = """async () => {
  const { WORKER } = await import(document.querySelector("script[src*='console/console']").src
    .replace(/console\\.[^/]*$/, "notify.js"));
  const worker = await navigator.serviceWorker.register(WORKER);
  // A worker that is still activating may lose what is pushed to it.
  const activated = () => worker.active?.state === "activated";
  while (!activated()) await new Promise((resolve) => setTimeout(resolve, 20));
}"""
SHOWN = """async () => (await Promise.all(
  (await navigator.serviceWorker.getRegistrations()).map((one) => one.getNotifications())
)).flat().map(({ title, body, tag, data }) => ({ title, body, tag, address: data.address }))"""


def _push_to_worker(page: Page, told: dict[str, str]) -> None:
    """What a push service would bring, through the browser's own door for it."""
    session = page.context.new_cdp_session(page)
    seen: list[dict[str, Any]] = []
    session.on("ServiceWorker.workerRegistrationUpdated", lambda event: seen.append(event))
    session.send("ServiceWorker.enable")
    while not any(event["registrations"] for event in seen):
        page.wait_for_timeout(20)
    (registration,) = next(event["registrations"] for event in seen if event["registrations"])
    session.send(
        "ServiceWorker.deliverPushMessage",
        {
            "origin": page.evaluate("location.origin"),
            "registrationId": registration["registrationId"],
            "data": json.dumps(told),
        },
    )


def test_a_pushed_event_is_shown_by_the_service_worker(sign_in: SignIn) -> None:
    page = sign_in("carl")
    page.context.grant_permissions(["notifications"])
    page.evaluate(REGISTER)
    told = {"title": "An adaptation waits for a decision", "body": "A-1", "tag": "adp_1"}
    shown: list[dict[str, str]] = []
    for waited_ms in range(0, WAIT_MS, 100):
        if waited_ms % 5_000 == 0:  # a busy browser drops a push; one of the same tag replaces it
            _push_to_worker(page, told | {"address": "/adaptations/adp_1"})
        if shown := page.evaluate(SHOWN):
            break
        page.wait_for_timeout(100)
    assert shown == [told | {"address": "/adaptations/adp_1"}]


def test_a_person_adds_this_browser_and_sees_which_one_it_is(sign_in: SignIn) -> None:
    page = sign_in("olga")
    page.context.grant_permissions(["notifications"])
    page.add_init_script(FAKE_PUSH_SERVICE % OneBrowser().keys["p256dh"])
    page.goto("/me")
    wait_until_live(page)
    page.click("#new-channel-fold summary")
    page.select_option("#channel-kind", "push")
    page.click("#new-channel button[type=submit]")
    row = page.get_by_role("region", name="Browser push: push.example.org")
    expect(row).to_contain_text("adaptation.awaiting_approval")
    expect(row.get_by_text("(this browser)")).to_be_visible()
    asked = page.evaluate("window.asked")
    assert asked["userVisibleOnly"]
    assert len(from_text(asked["applicationServerKey"])) == 65
    row.get_by_role("button", name="Remove").click()
    expect(row).to_have_count(0)
