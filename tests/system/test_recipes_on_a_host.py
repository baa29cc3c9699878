"""A recipe started, streamed, stopped and resumed through the API, on a real worker."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from hosts.processes import process_identity
from tests.running import launch_esper

from .conftest import TEST_SECONDS, WAIT_MS, Plant, until

pytestmark = [pytest.mark.process, pytest.mark.timeout(TEST_SECONDS)]

# Counts, keeps its count in its checkpoint folder, and obeys SIGTERM.
COUNTER = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1]) / "count"
count = int(place.read_text()) if place.exists() else 0
print("given", sys.argv[2:], flush=True)
print("token", os.environ["ESPER_TOKEN"], flush=True)
print("secrets", sorted(set(os.environ) & {"REDIS_URL", "SECRET_KEY", "DATABASE_URL"}), flush=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while count < 100_000:
    count += 1
    place.write_text(str(count))
    print("count", count, flush=True)
    time.sleep(0.05)
"""
RECIPE = """
name = "Counter"
argv = ["{python}", "counter.py", "{checkpoints}", "{note}"]
resume_argv = ["{python}", "counter.py", "{checkpoints}", "{note}", "resumed"]
grace_seconds = 5
[parameters.note]
type = "text"
default = "none"
"""


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plant]:
    """One for this file; its last test stops it."""
    tmp_path = tmp_path_factory.mktemp("recipes")
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "counter.py").write_text(COUNTER)
    (recipes / "counter.toml").write_text(RECIPE)
    shutil.copy(Path(__file__).parents[2] / "recipes" / "digits_cnn.toml", recipes)
    digits = (recipes / "digits_cnn.toml").read_text()
    root = Path(__file__).parents[2]
    paused = digits.replace('"--seed"', '"--pause", "0.03", "--seed"')  # as system/conftest.py
    (recipes / "digits_cnn.toml").write_text(paused.replace('".."', f'"{root}"'))
    environment = {"ESPER_RECIPES": str(recipes), "ESPER_LAUNCH_LOST_SECONDS": "10"}
    esper = launch_esper(tmp_path / "data", "--no-demo", environment=environment)
    plant = Plant(esper, tmp_path)
    until(lambda: len(recipes_of(plant)) == 2, "the worker registers its recipes")
    yield plant
    esper.stop()


def recipes_of(plant: Plant) -> dict[str, Any]:
    found = plant.call("olga", "GET", "recipes").json()["results"]
    return {recipe["slug"]: recipe for recipe in found}


def start(plant: Plant, slug: str, who: str = "olga", **parameters: Any) -> httpx.Response:
    recipe = recipes_of(plant)[slug]
    body = {
        "host": recipe["host"],
        "recipe": slug,
        "digest": recipe["digest"],
        "parameters": parameters,
    }
    return plant.call(who, "POST", "launches", json=body)


def launch(plant: Plant, uid: str) -> dict[str, Any]:
    found: dict[str, Any] = plant.call("olga", "GET", f"launches/{uid}").json()
    return found


def log_of(plant: Plant, uid: str) -> str:
    text, after = "", 0
    while True:
        page = plant.call("olga", "GET", f"launches/{uid}/log?after={after}").json()
        text, after = text + str(page["text"]), page["end"]
        if not page["more"]:
            return text


def started(plant: Plant, slug: str, **parameters: Any) -> str:
    answer = start(plant, slug, **parameters)
    assert answer.status_code == 202, answer.text
    uid = str(answer.json()["uid"])
    until(lambda: launch(plant, uid)["state"] == "running", "it runs")
    return uid


def launch_pid(plant: Plant, uid: str) -> int:
    return int(plant.rows("SELECT pid FROM recipes_launch WHERE uid=?", uid)[0][0])


def stop(plant: Plant, uid: str, reason: str = "") -> None:
    answer = plant.call("olga", "POST", f"launches/{uid}/stop", json={"reason": reason})
    assert answer.status_code == 202, answer.text
    until(lambda: launch(plant, uid)["state"] == "stopped", "it stops")


def test_a_recipe_is_started_streamed_stopped_and_resumed(plant: Plant) -> None:
    assert start(plant, "counter", "vera").status_code == 403
    hostile = "; touch pwned $(id) `id` {python} 'x"
    uid = started(plant, "counter", note=hostile)
    until(lambda: "count 20" in log_of(plant, uid), "its log is streamed")
    log = log_of(plant, uid)
    assert f"given [{hostile!r}]" in log  # one argument, as it was sent
    assert "token esp_[redacted]" in log
    assert "secrets []" in log

    assert plant.call("vera", "POST", f"launches/{uid}/stop", json={}).status_code == 403
    stop(plant, uid, "enough")
    ended = launch(plant, uid)
    assert (ended["exit_code"], ended["stopped_by"]) == (0, "olga")
    assert "enough" in ended["reason"]
    assert ended["last_lines"][-1].startswith("count")

    again = plant.call("olga", "POST", f"launches/{uid}/resume", json={"reason": ""})
    assert again.status_code == 202, again.text
    until(lambda: "'resumed'" in log_of(plant, uid), "it goes on")
    counts = [int(line[6:]) for line in log_of(plant, uid).splitlines() if line[:6] == "count "]
    assert counts == sorted(set(counts))  # from its checkpoint: nothing is counted twice
    assert launch(plant, uid)["attempt"] == 2
    stop(plant, uid)
    acts = [
        row[0] for row in plant.rows("SELECT act FROM audit_auditevent WHERE object_uid=?", uid)
    ]
    life = ["requested", "starting", "running", "stopping", "stopped"]
    assert acts == [f"launch.{state}" for state in life * 2]


@pytest.mark.browser
def test_the_page_of_a_launch_shows_its_log_as_it_is_written(plant: Plant, page: Page) -> None:
    page.goto(f"{plant.esper.url}/login")
    page.fill("input[name=username]", "olga")
    page.fill("input[name=password]", plant.esper.people["olga"])
    page.click("form button[type=submit]")
    page.wait_for_url("**/")
    recipe = recipes_of(plant)["counter"]["uid"]
    page.goto(f"{plant.esper.url}/recipes/{recipe}")
    page.fill("#p-note", "from the page")
    page.click("#panel-about button[type=submit]")
    page.wait_for_url("**/launches/lau_*", timeout=WAIT_MS)
    uid = page.url.rpartition("/")[2]
    log = page.locator("#launch-log")
    expect(log).to_contain_text("given ['from the page']", timeout=WAIT_MS)
    expect(log).to_contain_text("count 100\n", timeout=WAIT_MS)  # nothing was reloaded
    expect(page.locator("#launch-state")).to_contain_text("Running")
    page.click("#stop-form button")
    page.click("dialog button.danger")
    expect(page.locator("#launch-state")).to_contain_text("Stopped", timeout=WAIT_MS)
    expect(page.locator("#resume-form button")).to_be_enabled()
    expect(log).to_contain_text("--- ended: exit code 0 ---", timeout=WAIT_MS)
    shown = [int(line[6:]) for line in log.inner_text().splitlines() if line[:6] == "count "]
    assert shown == list(range(1, len(shown) + 1))  # no line is missing, none occurs twice
    assert launch(plant, uid)["requested_by"] == "olga"


def test_a_killed_worker_finds_its_trainer_again(plant: Plant) -> None:
    uid = started(plant, "counter")
    pid = launch_pid(plant, uid)
    identity = process_identity(pid)
    old = plant.esper.kill("worker-compile")
    plant.esper.wait_restarted("worker-compile", old)
    behind = launch(plant, uid)["log_end"]
    until(lambda: launch(plant, uid)["log_end"] > behind + 200, "its log goes on")
    assert launch_pid(plant, uid) == pid
    assert process_identity(pid) == identity  # the very same process
    os.kill(pid, signal.SIGKILL)
    until(lambda: launch(plant, uid)["state"] == "failed", "its end is seen")
    assert launch(plant, uid)["exit_signal"] == "SIGKILL"


def test_a_silent_host_makes_a_launch_lost_and_its_return_settles_it(plant: Plant) -> None:
    uid = started(plant, "counter")
    with plant.frozen("worker-compile"):
        until(lambda: launch(plant, uid)["state"] == "lost", "lost, after ten seconds")
        assert "may still run" in launch(plant, uid)["reason"]
    until(lambda: launch(plant, uid)["state"] == "running", "found again")
    stop(plant, uid)


def test_a_changed_file_is_not_started(plant: Plant) -> None:
    seen = recipes_of(plant)["counter"]
    path = plant.folder / "recipes" / "counter.toml"
    path.write_text(path.read_text().replace("counter.py", "other.py"))
    until(lambda: recipes_of(plant)["counter"]["digest"] != seen["digest"], "seen as changed")
    body = {"host": seen["host"], "recipe": "counter", "digest": seen["digest"], "parameters": {}}
    refused = plant.call("olga", "POST", "launches", json=body)
    assert (refused.status_code, refused.json()["code"]) == (409, "recipe-changed")


def test_a_real_run_is_branched_from_a_checkpoint_that_a_person_asked_for(plant: Plant) -> None:
    uid = started(plant, "digits_cnn", steps=100_000)
    run = launch(plant, uid)["run_uid"]
    until(lambda: step_of(plant, run) > 20, "it trains")
    body = {"remedy": "checkpoint_now", "layer": "", "config": {}, "reason": ""}
    asked = plant.call("olga", "POST", f"runs/{run}/ask-for-remedy", json=body)
    assert asked.status_code < 300, asked.text

    def kept() -> list[dict[str, Any]]:
        found = plant.call("olga", "GET", f"runs/{run}/branches").json()
        return [one for one in found["states"] if one["name"].startswith("kept-")]

    until(lambda: bool(kept()), "its host has seen the checkpoint")
    [state] = kept()
    assert plant.call("vera", "POST", f"runs/{run}/branches", json={}).status_code == 403
    wanted = {"state": state["name"], "parameters": {"lr": 0.001}, "reason": "slower"}
    answer = plant.call("olga", "POST", f"runs/{run}/branches", json=wanted)
    assert answer.status_code == 202, answer.text
    branch = answer.json()
    until(lambda: step_of(plant, branch["run_uid"]) > state["step"], "the branch goes on")
    read = plant.call("olga", "GET", f"runs/{branch['run_uid']}/branches").json()
    assert [one["run"] for one in read["tree"]] == [run, branch["run_uid"]]
    assert read["tree"][1]["branch_step"] == state["step"]
    assert read["tree"][1]["changed"] == {"lr": [0.005, 0.001]}
    assert len(launch(plant, branch["uid"])["branch_digest"]) == 64
    losses = plant.rows(
        "SELECT MIN(m.step) FROM telemetry_metric m JOIN runs_run r ON r.id=m.run_id "
        "WHERE r.uid=? AND m.name='loss'",
        branch["run_uid"],
    )
    assert losses[0][0] >= state["step"]  # nothing of it is trained again
    for one in (uid, branch["uid"]):
        stop(plant, one)


def test_esper_s_own_example_trains_under_its_launch_and_resumes_its_run(plant: Plant) -> None:
    uid = started(plant, "digits_cnn", steps=100_000)
    run = launch(plant, uid)["run_uid"]
    until(lambda: step_of(plant, run) > 250, "it trains past its first checkpoint")
    [(owner,)] = plant.rows(
        "SELECT u.username FROM runs_run r JOIN accounts_user u ON u.id=r.owner_id WHERE r.uid=?",
        run,
    )
    assert owner == "olga"
    stop(plant, uid)
    assert plant.rows("SELECT state FROM runs_run WHERE uid=?", run) == [("finished",)]
    before = step_of(plant, run)
    plant.call("olga", "POST", f"launches/{uid}/resume", json={"reason": ""})
    until(lambda: step_of(plant, run) > before + 50, "the same run goes on")
    assert plant.rows("SELECT epoch, state FROM runs_run WHERE uid=?", run) == [(2, "running")]
    assert plant.esper.stop() == 0
    assert plant.esper.processes() == []  # Ctrl-C ends what a recipe has started, too


def step_of(plant: Plant, run: str) -> int:
    found = plant.rows("SELECT step FROM runs_run WHERE uid=?", run)
    return int(found[0][0]) if found else 0
