"""What people ask for, what a host makes of it, and what time does to a launch."""

from __future__ import annotations

import json
import os
from contextlib import redirect_stdout
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click import ClickException
from django.utils import timezone

from apps.accounts.actors import SYSTEM
from apps.accounts.models import ApiToken, User
from apps.audit.models import AuditEvent
from apps.notifications.models import FeedEvent, OutboxMessage
from apps.recipes import hosting, services
from apps.recipes.hostlog import LogWriter, log_end, read_log, segments, tail_offset
from apps.recipes.launch_monitor import EXIT_FILE, PROCESS_FILE
from apps.recipes.lifecycle import NEXT, StaleLaunchError, transition
from apps.recipes.models import Launch, LogChunk, Recipe
from apps.recipes.selectors import log_page
from apps.rest.problems import Problem
from apps.runs.models import Run
from esper.contracts import LAUNCH_ENDED, LaunchState, RunState, TokenScope
from launcher.command import cli
from tests.apps.callers import Caller, registration
from tests.apps.cast import make_person, token_of
from tests.apps.recipes.rows import make_launch, make_recipe, make_worker, write_recipe

pytestmark = pytest.mark.django_db
S = LaunchState


@pytest.fixture
def olga() -> User:
    return make_person("olga")


@pytest.fixture
def caller(olga: User) -> Caller:
    return Caller(token_of(olga, TokenScope.ACT))


@pytest.fixture
def host(settings: Any, tmp_path: Path) -> str:
    """This process plays the worker of a host with one recipe."""
    settings.ESPER_HOST_NAME = "host-r"
    settings.ESPER_RECIPES = tmp_path / "recipes"
    settings.ESPER_LAUNCH_DIR = tmp_path / "launches"
    write_recipe(settings.ESPER_RECIPES)
    make_worker()
    hosting.register_recipes()
    return "host-r"


def request_of(recipe: Recipe, /, **changes: Any) -> dict[str, Any]:
    body = {"host": recipe.host, "recipe": recipe.slug, "digest": recipe.digest}
    return {**body, "parameters": {"steps": 7}, **changes}


def test_a_request_carries_slug_and_checked_parameters_only(caller: Caller) -> None:
    recipe = make_recipe()
    answer = caller.post("launches", request_of(recipe))
    assert answer.status == 202, answer.data
    assert answer.data["parameters"] == {"steps": 7}
    [message] = OutboxMessage.objects.all()
    assert (message.task, message.queue) == ("recipes.start", "host.host-r")
    assert message.args == [answer.data["uid"]]
    assert caller.post("launches", request_of(recipe, argv=["sh"])).status == 400
    assert caller.get("recipes").data["results"][0]["argv"] == recipe.argv


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"digest": "00" * 32}, 409, "recipe-changed"),
        ({"recipe": "other"}, 404, "not-found"),
        ({"recipe": "../counter"}, 404, "not-found"),
        ({"host": "elsewhere"}, 404, "not-found"),
        ({"parameters": {"stepz": 1}}, 422, "invalid"),
        ({"parameters": {"steps": 1e9}}, 422, "invalid"),
        ({"parameters": {"steps": {"$gt": 0}}}, 422, "invalid"),
    ],
)
def test_anything_else_is_refused_and_nothing_is_written(
    caller: Caller, changes: dict[str, Any], status: int, code: str
) -> None:
    answer = caller.post("launches", request_of(make_recipe(), **changes))
    assert (answer.status, answer.code) == (status, code)
    assert not Launch.objects.exists()
    assert not AuditEvent.objects.filter(act__startswith="launch.").exists()


def test_nothing_is_started_on_a_host_that_is_away_or_full(
    caller: Caller, olga: User, settings: Any
) -> None:
    recipe = make_recipe()
    make_worker(state="offline")
    assert caller.post("launches", request_of(recipe)).code == "host-away"
    make_worker()
    settings.ESPER_LAUNCH_LIMIT = 1
    make_launch(olga, state=S.LOST)  # it may still run there
    assert caller.post("launches", request_of(make_recipe())).code == "host-full"


def test_a_broken_or_vanished_file_is_shown_and_cannot_be_started(
    host: str, caller: Caller, settings: Any
) -> None:
    seen = Recipe.objects.get(slug="counter")
    write_recipe(settings.ESPER_RECIPES, "argv = []")
    assert hosting.register_recipes() == 1
    assert caller.post("launches", request_of(seen)).code == "recipe-unusable"
    assert "list of" in caller.get("recipes").data["results"][0]["problem"]
    (settings.ESPER_RECIPES / "counter.toml").unlink()
    assert hosting.register_recipes() == 1
    assert hosting.register_recipes() == 0
    assert caller.post("launches", request_of(seen)).code == "not-found"


def test_the_host_starts_from_its_file_or_not_at_all(host: str, olga: User, settings: Any) -> None:
    settings.ESPER_SERVER = "http://127.0.0.1:1"
    recipe = Recipe.objects.get(slug="counter")
    path = settings.ESPER_RECIPES / "counter.toml"
    launch = make_launch(olga, recipe=recipe)
    path.write_text(path.read_text() + "\n# changed after the operator looked\n")
    hosting.start(launch)
    launch.refresh_from_db()
    assert launch.state == S.FAILED
    assert "has changed" in launch.reason
    assert not (settings.ESPER_LAUNCH_DIR / launch.uid).exists()


def test_a_launch_that_is_moved_twice_moves_once(olga: User) -> None:
    launch = make_launch(olga, state=S.RUNNING)
    other = Launch.objects.get(pk=launch.pk)
    services.stop_launch(launch=launch, user=olga, via="test", reason="first")
    with pytest.raises(StaleLaunchError, match="is stopping already by olga"):
        transition(other, S.FINISHED, actor=SYSTEM)
    with pytest.raises(Problem, match="is stopping already"):
        services.stop_launch(launch=launch, user=olga, via="test", reason="again")
    assert AuditEvent.objects.filter(act="launch.stopping").count() == 1


def test_what_was_not_started_yet_is_stopped_at_once_and_never_starts(
    host: str, olga: User
) -> None:
    launch = make_launch(olga, recipe=Recipe.objects.get(slug="counter"))
    stale = Launch.objects.get(pk=launch.pk)
    services.stop_launch(launch=launch, user=olga, via="test", reason="")
    hosting.start(stale)  # the task message comes late
    launch.refresh_from_db()
    assert launch.state == S.STOPPED
    assert not hosting.launch_folder(launch).exists()


def test_every_state_has_a_next_step_or_is_an_end() -> None:
    assert set(NEXT) == set(LaunchState)
    reached = {state for states in NEXT.values() for state in states}
    assert reached == set(LaunchState)
    for state in LaunchState:
        assert NEXT[state] or state in LAUNCH_ENDED
    assert all(NEXT[state] <= {S.REQUESTED} for state in LAUNCH_ENDED)


def test_silence_loses_a_launch_and_nobody_taking_it_fails_it(olga: User, settings: Any) -> None:
    recipe, now = make_recipe(), timezone.now()
    late = now - timedelta(seconds=settings.ESPER_LAUNCH_LOST_SECONDS + 1)
    silent = make_launch(olga, recipe=recipe, state=S.RUNNING, seen_at=late)
    reporting = make_launch(olga, recipe=recipe, state=S.RUNNING)
    unseen = make_launch(olga, recipe=recipe, seen_at=None, requested_at=late)
    assert services.sweep() == 2
    states = {
        launch: Launch.objects.get(pk=launch.pk).state for launch in (silent, reporting, unseen)
    }
    assert states == {silent: S.LOST, reporting: S.RUNNING, unseen: S.FAILED}
    assert services.sweep() == 0


def exit_note(**changes: Any) -> str:
    note = {"attempt": 1, "code": 0, "signal": "", "asked": False, "killed": False, "error": ""}
    return json.dumps({**note, "last_lines": ["bye"], **changes})


@pytest.mark.parametrize(
    ("state", "note", "end", "words"),
    [
        (S.RUNNING, {}, S.FINISHED, "exit code 0"),
        (S.RUNNING, {"code": 3}, S.FAILED, "exit code 3"),
        (S.RUNNING, {"code": None, "signal": "SIGSEGV"}, S.FAILED, "killed by SIGSEGV"),
        (S.STOPPING, {"code": 1, "asked": True}, S.STOPPED, "exit code 1"),
        (S.STOPPING, {"signal": "SIGKILL", "killed": True}, S.STOPPED, "grace period"),
        (S.RUNNING, {"asked": True}, S.STOPPED, "with this host's Esper"),
        (S.STARTING, {"code": None, "error": "no such program"}, S.FAILED, "no such program"),
        (S.LOST, {}, S.FINISHED, "exit code 0"),
    ],
)
def test_an_end_is_settled_by_what_the_host_wrote_down(
    host: str, olga: User, state: LaunchState, note: dict[str, Any], end: LaunchState, words: str
) -> None:
    launch = make_launch(olga, recipe=Recipe.objects.get(slug="counter"), state=state)
    run = Run.objects.create(uid=launch.run_uid, name="c", owner=olga, state=RunState.RUNNING)
    token_of(olga, TokenScope.RUNS_CREATE, run_uid=launch.run_uid)
    folder = hosting.launch_folder(launch)
    folder.mkdir(parents=True)
    (folder / EXIT_FILE).write_text(exit_note(**note))
    hosting.look_at(launch)
    launch.refresh_from_db()
    run.refresh_from_db()
    assert (launch.state, launch.last_lines) == (end, ["bye"])
    assert words in launch.reason
    assert run.state == (RunState.FAILED if end is S.FAILED else RunState.FINISHED)
    assert not ApiToken.objects.filter(run_uid=launch.run_uid, revoked_at=None).exists()


def test_the_end_of_an_earlier_attempt_is_not_the_end_of_this_one(host: str, olga: User) -> None:
    recipe = Recipe.objects.get(slug="counter")
    launch = make_launch(olga, recipe=recipe, state=S.STARTING, attempt=2)
    folder = hosting.launch_folder(launch)
    folder.mkdir(parents=True)
    (folder / EXIT_FILE).write_text(exit_note(attempt=1))
    hosting.look_at(launch)
    assert Launch.objects.get(pk=launch.pk).state == S.STARTING


def test_a_process_of_the_same_number_that_is_another_one_is_left_alone(
    host: str, olga: User
) -> None:
    launch = make_launch(olga, recipe=Recipe.objects.get(slug="counter"), state=S.RUNNING)
    folder = hosting.launch_folder(launch)
    folder.mkdir(parents=True)
    note = {"attempt": 1, "monitor_pid": os.getpid(), "trainer_pid": os.getpid()}
    old = {"monitor_identity": "another-boot:1", "trainer_identity": "another-boot:2"}
    (folder / PROCESS_FILE).write_text(json.dumps({**note, **old}))
    hosting.look_at(launch)  # had it taken us for its trainer, we would be gone
    launch.refresh_from_db()
    assert launch.state == S.FAILED
    assert "from outside" in launch.reason


def test_a_monitor_that_ends_while_it_is_looked_at_was_not_killed(
    host: str, olga: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = make_launch(olga, recipe=Recipe.objects.get(slug="counter"), state=S.RUNNING)
    folder = hosting.launch_folder(launch)
    folder.mkdir(parents=True)
    note = {"attempt": 1, "monitor_pid": os.getpid(), "trainer_pid": os.getpid()}
    (folder / PROCESS_FILE).write_text(
        json.dumps({**note, "monitor_identity": "boot:1", "trainer_identity": "boot:2"})
    )

    def ends(_: int) -> str:
        (folder / EXIT_FILE).write_text(exit_note())
        return ""

    monkeypatch.setattr(hosting, "process_identity", ends)
    hosting.look_at(launch)
    launch.refresh_from_db()
    assert (launch.state, launch.reason) == (S.FINISHED, "exit code 0")


def test_a_launch_s_token_registers_its_run_and_no_other(olga: User) -> None:
    launch = make_launch(olga, state=S.RUNNING)
    trainer = Caller(token_of(olga, TokenScope.RUNS_CREATE, run_uid=launch.run_uid))
    first = trainer.post("runs", registration(name="a"))
    assert (first.status, first.data["uid"], first.data["epoch"]) == (201, launch.run_uid, 1)
    again = trainer.post("runs", registration(name="b"))  # another name makes no other run
    assert (again.data["uid"], again.data["epoch"]) == (launch.run_uid, 2)
    Run.objects.update(state=RunState.FAILED, ended_at=timezone.now())
    resumed = trainer.post("runs", registration(name="b"))
    assert (resumed.data["uid"], resumed.data["epoch"]) == (launch.run_uid, 3)
    assert Run.objects.get().ended_at is None
    assert trainer.get("runs").status == 403
    Run.objects.create(name="taken", owner=olga, state=RunState.RUNNING)
    assert trainer.post("runs", registration(name="taken")).code == "run-name-taken"


def test_a_resumed_launch_is_the_next_attempt_with_a_clean_slate(olga: User) -> None:
    launch = make_launch(olga, state=S.FAILED, exit_code=1, last_lines=["x"], stopped_by="olga")
    run_uid = launch.run_uid
    services.resume_launch(launch=launch, user=olga, via="test", reason="")
    launch.refresh_from_db()
    assert (launch.state, launch.attempt, launch.run_uid) == (S.REQUESTED, 2, run_uid)
    assert (launch.exit_code, launch.last_lines, launch.seen_at) == (None, [], None)
    Recipe.objects.update(digest="aa" * 32)
    Launch.objects.update(state=S.STOPPED)
    launch.refresh_from_db()
    with pytest.raises(Problem, match="has changed since you were shown it"):
        services.resume_launch(launch=launch, user=olga, via="test", reason="")


@pytest.mark.parametrize("state", [S.FINISHED, S.LOST, S.RUNNING, S.REQUESTED])
def test_only_what_stopped_or_failed_is_resumed(olga: User, state: LaunchState) -> None:
    with pytest.raises(Problem, match="Only a stopped or failed launch"):
        services.resume_launch(
            launch=make_launch(olga, state=state), user=olga, via="test", reason=""
        )


# --- log ----------------------------------------------------------------------------------------


def test_a_log_rotates_and_its_offsets_stay_true(tmp_path: Path) -> None:
    for attempt in range(2):
        writer = LogWriter(tmp_path, segment_bytes=1000)
        for number in range(200):
            writer.line(f"attempt {attempt} line {number}")
        writer.close()
    assert len(segments(tmp_path)) <= 5
    end = log_end(tmp_path)
    offset, data = read_log(tmp_path, 0, limit=10_000)
    assert offset == segments(tmp_path)[0][0] > 0  # the beginning is gone, and that is said
    while offset + len(data) < end:
        offset, data = read_log(tmp_path, offset + len(data), limit=100)
        assert data.startswith(b"attempt ")
        assert data.endswith(b"\n")
    assert data.splitlines()[-1] == b"attempt 1 line 199"
    tail = tail_offset(tmp_path, 500)
    assert end - 500 <= tail <= end
    assert read_log(tmp_path, tail, limit=500)[1].startswith(b"attempt ")


def test_secrets_and_control_characters_never_reach_the_log(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path)
    writer.line("token esp_abcdefgh12345678 password=hunter22 \x1b[31mred")
    writer.line("x" * 100_000)
    writer.close()
    text = read_log(tmp_path, 0, limit=100_000)[1].decode()
    assert "abcdefgh" not in text
    assert "hunter22" not in text
    assert "\x1b" not in text
    assert len(text) < 5_000


def test_the_server_keeps_the_end_of_a_log_and_serves_it_by_offset(
    host: str, olga: User, caller: Caller
) -> None:
    launch = make_launch(olga, recipe=Recipe.objects.get(slug="counter"), state=S.RUNNING)
    folder = hosting.launch_folder(launch)
    folder.mkdir(parents=True)
    writer = LogWriter(folder)
    for number in range(20_000):
        writer.line(f"step {number:05d} and some more words to fill the line")
    writer.close()
    hosting.send_log(launch)
    kept = sum(LogChunk.objects.filter(launch=launch).values_list("length", flat=True))
    assert kept <= hosting.LOG_KEPT_BYTES + hosting.LOG_CHUNK_BYTES
    text, after, more = "", 0, True
    while more:
        page = caller.get(f"launches/{launch.uid}/log?after={after}").data
        text, after, more = text + page["text"], page["end"], page["more"]
    steps = [int(line[5:10]) for line in text.splitlines()]
    assert steps[-1] == 19_999
    assert steps == list(range(steps[0], 20_000))
    hosting.send_log(launch)  # nothing new, nothing twice
    assert log_page(launch, after=after).text == ""
    assert not FeedEvent.objects.filter(type="launch.log").exists()  # a notification, not a row


def test_a_second_worker_of_the_host_stores_no_line_twice(host: str, olga: User) -> None:
    launch = make_launch(olga, recipe=Recipe.objects.get(slug="counter"), state=S.RUNNING)
    folder = hosting.launch_folder(launch)
    folder.mkdir(parents=True)
    writer = LogWriter(folder)
    writer.line("once")
    writer.close()
    late = Launch.objects.get(pk=launch.pk)
    hosting.send_log(launch)
    hosting.send_log(late)
    assert LogChunk.objects.filter(launch=launch).count() == 1


# --- command line -------------------------------------------------------------------------------


def test_the_command_line_does_what_the_pages_do_with_the_same_rights(olga: User) -> None:
    make_recipe()
    make_person("vera")

    def recipe(*words: str) -> str:
        with redirect_stdout(StringIO()) as out:
            cli.main(["recipe", *words], standalone_mode=False)
        return out.getvalue()

    assert "host-r/counter" in recipe("list")
    with pytest.raises(ClickException, match="Only admins or operators"):
        recipe("start", "counter", "steps=9", "--as", "vera")
    with pytest.raises(ClickException, match="must lie in"):
        recipe("start", "counter", "steps=9000", "--as", "olga")
    assert "requested" in recipe("start", "host-r/counter", "steps=9", "--as", "olga")
    launch = Launch.objects.get()
    assert launch.parameters == {"steps": 9}
    assert "stopped" in recipe("stop", f"L-{launch.number}", "--as", "olga")
    assert "requested" in recipe("resume", launch.uid, "--as", "olga")
    LogChunk.objects.create(launch=launch, offset=0, length=6, text="hello\n")
    assert recipe("logs", str(launch.number)) == "hello\n"
    acts = AuditEvent.objects.filter(object_uid=launch.uid).values_list("via", flat=True)
    assert set(acts) == {"command line"}
