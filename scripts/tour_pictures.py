"""Take the pictures of ``docs/tour.md`` from an Esper that runs: see ``scripts.tour``.

python -m scripts.tour_pictures DATA_DIRECTORY
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

from hosts.keyring import read_keyring
from hosts.runtime import read_runtime
from scripts.tour import PICTURES, STOPS, Stop

DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
SETTLE_MS = 1_500  # charts draw themselves
QUALITY = 70


def take(data_directory: Path) -> None:
    """Raises ``KeyError`` where a picture needs an object that the installation does not have."""
    url = str(read_runtime(data_directory)["url"])
    ada = read_keyring(data_directory)["people"]["ada"]
    objects = _objects(url, ada["token"])
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for look in sorted({(stop.phone, stop.dark) for stop in STOPS}):
            stops = [stop for stop in STOPS if (stop.phone, stop.dark) == look]
            _take_stops(_page(browser, url, *look), ada["password"], stops, objects)
        browser.close()


def _objects(url: str, token: str) -> dict[str, str]:
    """The newest object of each kind that the addresses name."""
    with httpx.Client(
        base_url=f"{url}/api/v1/", headers={"Authorization": f"Bearer {token}"}, timeout=60.0
    ) as api:

        def rows(path: str) -> list[dict[str, Any]]:
            answer = api.get(path)
            answer.raise_for_status()
            return list(answer.json()["results"])

        adaptations = rows("adaptations?limit=200")
        waiting = [row for row in adaptations if row["state"] == "awaiting_approval"]
        kept = [row for row in adaptations if row["state"] in ("kept", "probation")]
        runs = rows("runs?limit=50")
        found = {
            "waiting": [row["uid"] for row in waiting],
            "kept": [row["uid"] for row in kept],
            "run": [row["run"] for row in kept],
            "other": [row["uid"] for row in runs if not kept or row["uid"] != kept[0]["run"]],
            "recipe": [row["uid"] for row in rows("recipes")],
            "kernel": [row["digest"] for row in rows("kernels")],
        }
    return {name: uids[0] for name, uids in found.items() if uids}


def _page(browser: Browser, url: str, phone: bool, dark: bool) -> Page:
    page = browser.new_page(
        base_url=url,
        viewport=PHONE if phone else DESKTOP,  # type: ignore[arg-type]  # a TypedDict
        color_scheme="dark" if dark else "light",
    )
    page.set_default_timeout(60_000)
    return page


def _take_stops(page: Page, password: str, stops: Iterable[Stop], objects: dict[str, str]) -> None:
    page.goto("/login")
    if any(stop.page == "sign-in" for stop in stops):
        _shoot(page, next(stop for stop in stops if stop.page == "sign-in"))
    page.fill("#id_username", "ada")
    page.fill("#id_password", password)
    page.click("button[type=submit]")
    page.wait_for_url("**/")
    for stop in stops:
        if stop.page != "sign-in":
            page.goto(stop.address.format(**objects))
            _shoot(page, stop)


def _shoot(page: Page, stop: Stop) -> None:
    page.wait_for_timeout(SETTLE_MS)
    page.screenshot(path=stop.picture, type="jpeg", quality=QUALITY)
    print(stop.picture)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    take(Path(sys.argv[1]))
