"""Take a picture of every page of a busy server, to be looked at by a person.

python -m tests.apps.console.look_at_pages FOLDER [PAGE,…] [VIEW,…] [LANGUAGE]

Pages by the names that it prints; views: light, dark, phone. Without names: all. The language is
what the browser asks for: en (without it) or de.
"""

from __future__ import annotations

import base64
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import django
import httpx
from cryptography.hazmat.primitives.hashes import SHA1
from cryptography.hazmat.primitives.twofactor.totp import TOTP
from playwright.sync_api import Error, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[3]
VIEWS = {"light": (1280, False), "dark": (1280, True), "phone": (390, False)}
HAS_AN_APP = {"light": "rafi", "dark": "carl", "phone": "olga"}
PLAIN = {
    "overview": "/",
    "inbox": "/inbox",
    "inbox-history": "/inbox?state=history",
    "runs": "/runs",
    "switch": "/switch",
    "compare": "/runs/compare?a=R-4&b=R-1",
    "incidents": "/incidents",
    "incidents-resolved": "/incidents?state=resolved",
    "violations": "/violations",
    "blueprints": "/blueprints",
    "blueprint": "/blueprints/mlp_gelu_2048",
    "policy": "/policy",
    "kernels": "/kernels",
    "kernel": f"/kernels/{'ab' * 32}",
    "workers": "/workers",
    "recipes": "/recipes",
    "audit": "/audit?verify=1",
    "me": "/me",
    "identity": "/me/identity",
    "search": "/search?q=conv",
    "duty": "/duty",
    "status": "/status",
    "wall": "/wall",
    "projects": "/projects",
    "people": "/people",
    "report": "/report",
    "accessibility": "/accessibility",
    "api-docs": "/api/docs",
    "problems": "/api/docs/problems",
    "404": "/nowhere",
    "admin": "/admin/",
    "admin-list": "/admin/blueprints/blueprint/",
    "admin-one": "/admin/policies/policyversion/1/change/",
}


def main(folder: Path, wanted: set[str], views: set[str], language: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    with tempfile.TemporaryDirectory() as data:
        environment = {
            **os.environ,
            "DATABASE_URL": f"sqlite:///{data}/db.sqlite3",
            "DJANGO_SETTINGS_MODULE": "esper_web.settings.test",
            "PYTHONPATH": str(ROOT),
            # A provider that does not answer: its button leads to the page of failures.
            "ESPER_OIDC_ISSUER": "http://127.0.0.1:9",
            "ESPER_OIDC_CLIENT_ID": "esper",
            "ESPER_OIDC_CLIENT_SECRET": "secret",
            "ESPER_OIDC_ROLES": "operators=operator",
            "ESPER_OIDC_NAME": "Example",
        }
        script = str(Path(__file__).with_name("serve_world.py"))
        server = subprocess.Popen(
            [sys.executable, script, str(port), "busy"], env=environment, cwd=ROOT
        )
        try:
            _wait_for(f"http://127.0.0.1:{port}/login", server)
            _take_pictures(f"http://127.0.0.1:{port}", folder, wanted, views, language)
        finally:
            server.terminate()
            server.wait(timeout=60)


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            httpx.get(address, timeout=60)
            return
        except httpx.TransportError:
            time.sleep(0.5)
    raise RuntimeError("the web process ended")


def _take_pictures(
    base: str, folder: Path, wanted: set[str], views: set[str], language: str
) -> None:
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "esper_web.settings.test")
    django.setup()
    from tests.apps.cast import PASSWORD  # its models need django.setup()

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        for view, (width, dark) in VIEWS.items():
            if views and view not in views:
                continue
            context = browser.new_context(
                base_url=base,
                viewport={"width": width, "height": 844},
                color_scheme="dark" if dark else "light",
                locale=language,
            )
            page = context.new_page()
            page.goto("/login")
            if not wanted or "login" in wanted:
                page.screenshot(path=folder / f"login-{view}.png")
            if not wanted or "login-failed" in wanted:
                _take_picture(page, "/login/provider", folder / f"login-failed-{view}.png")
                page.goto("/login")
            _sign_in(page, "ada", PASSWORD)
            for name, address in _addresses(page).items():
                if not wanted or name in wanted:
                    _take_picture(page, address, folder / f"{name}-{view}.png")
            if not wanted or "403" in wanted:
                context.clear_cookies()
                page.goto("/login")
                _sign_in(page, "vera", PASSWORD)
                _take_picture(page, "/admin/", folder / f"403-{view}.png")
            if not wanted or "second-factor" in wanted:
                context.clear_cookies()
                page.goto("/login")
                _sign_in(page, HAS_AN_APP[view], PASSWORD)
                _take_second_factor(page, folder, view, HAS_AN_APP[view], PASSWORD)
        browser.close()


def _take_second_factor(page: Page, folder: Path, view: str, name: str, password: str) -> None:
    """Set an app up with a wrong and the right code, look at it, and sign in again."""

    def take(part: str) -> None:
        page.screenshot(path=folder / f"second-factor-{part}-{view}.png", full_page=True)
        over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        _say(f"second-factor-{part}-{view} {f'{over} px TOO WIDE' if over > 0 else ''}")

    page.goto("/me/second-factor")
    take("offer")
    secret = base64.b32decode(page.locator("ol code").inner_text().replace(" ", ""))
    page.fill("#id_code", "000000")
    page.click("button[value=turn-on]")
    take("wrong")
    totp = TOTP(secret, 6, SHA1(), 30)  # noqa: S303
    page.fill("#id_code", totp.generate(int(time.time())).decode())
    page.click("button[value=turn-on]")
    take("codes")
    page.goto("/me/second-factor")
    take("on")
    _take_picture(page, "/me", folder / f"me-with-app-{view}.png")
    page.context.clear_cookies()
    page.goto("/login")
    page.fill("#id_username", name)
    page.fill("#id_password", password)
    page.click("button[type=submit]")
    page.wait_for_url("**/login/code")
    take("sign-in")


def _sign_in(page: Page, name: str, password: str) -> None:
    page.fill("#id_username", name)
    page.fill("#id_password", password)
    page.click("button[type=submit]")
    page.wait_for_url("**/")


def _addresses(page: Page) -> dict[str, str]:
    """The plain pages, each run, and one decision in each state that there is."""
    runs = page.request.get("/api/v1/runs?limit=200").json()["results"]
    rows = page.request.get("/api/v1/adaptations?limit=200").json()["results"]
    found = dict(PLAIN)
    for run in runs:
        found[f"run-{run['name'][:12]}"] = f"/runs/{run['uid']}"
    for launch in page.request.get("/api/v1/launches").json()["results"]:
        found.setdefault(f"launch-{launch['state']}", f"/launches/{launch['uid']}")
    for plan in page.request.get("/api/v1/plans").json()["results"]:
        found[f"plan-{plan['state']}"] = f"/plans/{plan['uid']}"
    for row in rows:
        name = f"{row['kind']}-{row['state']}"
        if row["state"] == "awaiting_approval":
            escalated = "-escalated" if row["escalated_by"] else ""
            name += f"-{row['risk']}{escalated}"
        found.setdefault(name, f"/adaptations/{row['uid']}")
    return found


def _take_picture(page: Page, address: str, path: Path) -> None:
    try:
        page.goto(address, wait_until="load")
        page.wait_for_timeout(1_200)
        over = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        tall = page.evaluate("document.documentElement.scrollHeight")
        page.screenshot(path=path, full_page=True)
        more = page.locator("#panel-more")
        if more.is_visible():  # of an ended decision it is hidden: nothing more can be done
            more.locator("details.fold").evaluate_all("all => all.forEach(f => { f.open = true; })")
            more.screenshot(path=path.with_stem(f"{path.stem}-more"), timeout=3_000)
        _say(f"{path.stem} {tall} px {f'{over} px TOO WIDE' if over > 0 else ''}")
    except Error as error:
        _say(f"{path.stem} failed: {str(error).splitlines()[0]}")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    given = [*sys.argv[2:5], "", "", ""]
    names, views = (set(filter(None, text.split(","))) for text in given[:2])
    main(Path(sys.argv[1]), names, views, given[2] or "en")
