"""A run of a recipe is branched: what is stored, what may be begun from, what the host does."""

from __future__ import annotations

import io
import runpy
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from apps.accounts.actors import SYSTEM
from apps.accounts.models import Project, User
from apps.adaptations.models import Adaptation
from apps.adaptations.services import reconcile_grafts
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint
from apps.policies.services import current_policy
from apps.recipes import hosting
from apps.recipes.files import STATE, RecipeError, read_recipe
from apps.recipes.models import Launch, Recipe, StoredState
from apps.recipes.selectors import ancestors_of_run, branch_tree
from apps.recipes.stored_states import copy_state, find_states
from apps.runs.models import Run
from apps.violations.models import Violation
from esper.contracts import LAUNCH_ENDED, AdaptationState, LaunchState, Role, TokenScope
from esper.contracts.protocol import Applied
from hosts.paths import ROOT
from tests.apps.callers import Caller, registration
from tests.apps.cast import make_blueprint, make_person, token_of
from tests.apps.recipes.rows import make_launch, make_recipe, make_worker, write_recipe

S = LaunchState
RECIPE = """
name = "Counter"
argv = ["{python}", "count.py", "{checkpoints}", "{steps}"]
resume_argv = ["{python}", "count.py", "{checkpoints}", "{steps}"]
branch_argv = ["{python}", "count.py", "{checkpoints}", "{steps}", "{state}"]
grace_seconds = 2

[parameters.steps]
type = "integer"
default = 3
minimum = 1
maximum = 1000
"""
# Counts on from a state, and keeps each tenth count as one.
COUNT = """
import pathlib, sys
place, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
count = int(pathlib.Path(sys.argv[3]).read_text()) if len(sys.argv) > 3 else 0
print("begins at", count, flush=True)
while count < steps:
    count += 1
    if count % 10 == 0:
        (place / f"step-{count}.txt").write_text(str(count))
print("ended at", count, flush=True)
"""


def archive(text: str = "weights") -> bytes:
    """As torch.save writes its files: a zip with checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("data", text)
    return buffer.getvalue()


# --- what counts as a stored state, on the host ------------------------------------------------


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-400.pt", 400),
        ("kept-7.pt", 7),
        ("checkpoint-1200", 1200),
        ("epoch=3-step=52.ckpt", 52),
        ("model_000100.safetensors", 100),
        ("12", 12),
    ],
)
def test_a_state_is_known_by_the_step_in_its_name(tmp_path: Path, name: str, step: int) -> None:
    (tmp_path / name).write_bytes(archive())
    [found] = find_states(tmp_path)
    assert (found.name, found.step) == (name, step)


@pytest.mark.parametrize(
    "name", ["net.pt", "step-400.new", "step-4.tmp", ".step-4.pt", "step-4\x1b.pt", "v2-last.pt"]
)
def test_what_is_unfinished_or_names_no_step_is_no_state(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(archive())
    assert find_states(tmp_path) == []


def test_links_and_empty_files_are_no_states(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "step-1.pt").symlink_to(tmp_path / "secret")
    (tmp_path / "step-2.pt").touch()
    assert find_states(tmp_path) == []
    assert find_states(tmp_path / "nowhere") == []


def test_a_file_or_a_folder_is_copied_whole_with_its_digest(tmp_path: Path) -> None:
    source = tmp_path / "from"
    (source / "checkpoint-5" / "deep").mkdir(parents=True)
    (source / "checkpoint-5" / "deep" / "model.pt").write_bytes(archive())
    (source / "checkpoint-5" / "state.json").write_text("{}")
    (source / "step-5.pt").write_bytes(archive())
    digests = set()
    for name in ("checkpoint-5", "step-5.pt"):
        digests.add(copy_state(source, name, tmp_path / "to", lambda: None))
        assert [path.name for path in (tmp_path / "to").iterdir()] == [name]
    assert len(digests) == 2
    again = copy_state(source, "step-5.pt", tmp_path / "other", lambda: None)
    assert again in digests
    assert (tmp_path / "other" / "step-5.pt").read_bytes() == archive()


def damaged(kind: str) -> bytes:
    whole = archive("weights" * 50)
    if kind == "cut off":
        return whole[: len(whole) // 2]
    if kind == "empty":
        return b""
    middle = whole.index(b"weightsweights")
    return whole[:middle] + b"X" + whole[middle + 1 :]


@pytest.mark.parametrize("kind", ["cut off", "altered", "empty"])
def test_a_damaged_state_is_refused_and_nothing_is_left(tmp_path: Path, kind: str) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "step-5.pt").write_bytes(damaged(kind))
    with pytest.raises(RecipeError, match="damaged"):
        copy_state(tmp_path / "from", "step-5.pt", tmp_path / "to", lambda: None)
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize(
    "name", ["../step-5.pt", "/etc/hosts-1", "step-5.pt/../step-6.pt", "net.pt"]
)
def test_no_name_leads_out_of_the_checkpoints(tmp_path: Path, name: str) -> None:
    (tmp_path / "step-5.pt").write_bytes(archive())
    with pytest.raises(RecipeError, match="no stored state"):
        copy_state(tmp_path / "from", name, tmp_path / "to", lambda: None)


def test_a_link_inside_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "model.pt").symlink_to("/etc/passwd")
    with pytest.raises(RecipeError, match="is a link"):
        copy_state(tmp_path, "checkpoint-5", tmp_path / "to", lambda: None)


def test_the_state_is_a_placeholder_of_branches_alone(tmp_path: Path) -> None:
    text = RECIPE.replace('"{steps}"]', '"{steps}", "{state}"]', 1)
    with pytest.raises(RecipeError, match="which is not a parameter"):
        read_recipe(write_recipe(tmp_path, text))
    recipe = read_recipe(write_recipe(tmp_path, RECIPE))
    given = {"python": "py", "run": "r", "checkpoints": "/c"}
    assert recipe.command({"steps": 3}, given)[-1] == "3"
    for resume in (False, True):  # it may have no checkpoint of its own yet
        argv = recipe.command({"steps": 3}, {**given, STATE: "/s/step-1.pt"}, resume=resume)
        assert argv[-1] == "/s/step-1.pt"


# --- what a person asks for --------------------------------------------------------------------


@pytest.fixture
def olga(db: None) -> User:
    return make_person("olga")


@pytest.fixture
def caller(olga: User) -> Caller:
    return Caller(token_of(olga, TokenScope.ACT))


def branchable(**changes: Any) -> Recipe:
    recipe = make_recipe()
    Recipe.objects.filter(pk=recipe.pk).update(branch_argv=["{python}", "{state}"], **changes)
    recipe.refresh_from_db()
    return recipe


def run_of_recipe(
    owner: User, *, states: tuple[int, ...] = (), **changes: Any
) -> tuple[Run, Launch]:
    """A run that was started from a recipe, with stored states of these steps."""
    recipe = changes.pop("recipe", None) or branchable()
    launch = make_launch(owner, state=S.RUNNING, recipe=recipe, **changes)
    run = Run.objects.create(
        uid=launch.run_uid, name=f"counter-{launch.number}", owner=owner, mode="observe", step=50
    )
    for step in states:
        StoredState.objects.create(
            launch=launch,
            name=f"step-{step}.pt",
            step=step,
            size_bytes=10,
            written_at=launch.requested_at,
        )
    return run, launch


def test_a_branch_begins_from_the_newest_state_or_from_the_one_that_is_named(
    caller: Caller, olga: User
) -> None:
    run, parent = run_of_recipe(olga, states=(10, 40, 20))
    first = caller.post(f"runs/{run.uid}/branches", {"reason": "does it help?"})
    assert first.status == 202, first.data
    assert first.data["branch_of"] == run.uid
    assert (first.data["branch_state"], first.data["branch_step"]) == ("step-40.pt", 40)
    assert first.data["parameters"] == parent.parameters
    named = {"state": "step-10.pt", "parameters": {"steps": 7}}
    second = caller.post(f"runs/R-{run.number}/branches", named)
    assert second.data["branch_step"] == 10
    assert second.data["parameters"] == {"steps": 7}
    acts = AuditEvent.objects.filter(act="run.branched", run_uid=run.uid).order_by("id")
    assert [row.data["step"] for row in acts] == [40, 10]
    assert acts[0].reason == "does it help?"
    requested = AuditEvent.objects.filter(
        act="launch.requested", object_uid=second.data["uid"]
    ).get()
    assert (requested.data["branch_of"], requested.data["step"]) == (run.uid, 10)


def test_the_same_request_makes_one_branch(caller: Caller, olga: User) -> None:
    run, _ = run_of_recipe(olga, states=(10,))
    answers = [
        caller.post(f"runs/{run.uid}/branches", {}, **{"Idempotency-Key": "once"}) for _ in range(2)
    ]
    assert answers[0].data["uid"] == answers[1].data["uid"]
    assert Launch.objects.filter(branch_of__run_uid=run.uid).count() == 1
    dry = caller.post(f"runs/{run.uid}/branches?dry_run=true")
    assert dry.status in {200, 202}
    assert Launch.objects.filter(branch_of__run_uid=run.uid).count() == 1


def _no_recipe(run: Run, launch: Launch) -> None:
    Launch.objects.filter(pk=launch.pk).update(run_uid="run_00000000000000000000000000")


def _no_branch_argv(run: Run, launch: Launch) -> None:
    Recipe.objects.update(branch_argv=[])


def _changed_recipe(run: Run, launch: Launch) -> None:
    Recipe.objects.update(digest="11" * 32)


def _broken_recipe(run: Run, launch: Launch) -> None:
    Recipe.objects.update(problem="argv must be a list")


def _no_states(run: Run, launch: Launch) -> None:
    StoredState.objects.all().delete()


def _no_worker(run: Run, launch: Launch) -> None:
    make_worker(state="offline")


@pytest.mark.parametrize(
    ("spoil", "body", "status", "code"),
    [
        (_no_recipe, {}, 409, "not-a-recipe-run"),
        (_no_branch_argv, {}, 409, "not-branchable"),
        (_changed_recipe, {}, 409, "recipe-changed"),
        (_broken_recipe, {}, 409, "recipe-unusable"),
        (_no_states, {}, 409, "no-stored-state"),
        (None, {"state": "step-11.pt"}, 409, "state-gone"),
        (None, {"state": "../step-10.pt"}, 409, "state-gone"),
        (_no_worker, {}, 409, "host-away"),
        (None, {"parameters": {"steps": 0}}, 422, "invalid"),
        (None, {"parameters": {"rate": 1}}, 422, "invalid"),
        (None, {"argv": ["sh"]}, 400, "invalid"),
    ],
)
def test_each_refusal_says_why_and_starts_nothing(
    caller: Caller, olga: User, spoil: Any, body: dict[str, Any], status: int, code: str
) -> None:
    run, launch = run_of_recipe(olga, states=(10,))
    if spoil:
        spoil(run, launch)
    answer = caller.post(f"runs/{run.uid}/branches", body)
    assert (answer.status, answer.code) == (status, code)
    assert Launch.objects.count() == 1
    assert not AuditEvent.objects.filter(act="run.branched").exists()


@pytest.mark.parametrize(
    ("role", "status"),
    [(Role.OPERATOR, 202), (Role.ADMIN, 202), (Role.RESEARCHER, 403), (Role.CURATOR, 403),
     (Role.VIEWER, 403)],
)  # fmt: skip
def test_who_may_start_runs_may_branch_them(olga: User, role: Role, status: int) -> None:
    run, _ = run_of_recipe(olga, states=(10,))
    asks = Caller(token_of(make_person("kim", role), TokenScope.ACT))
    assert asks.post(f"runs/{run.uid}/branches", {}).status == status


def test_a_run_of_a_foreign_project_does_not_exist(olga: User) -> None:
    run, launch = run_of_recipe(olga, states=(10,))
    place = Project.objects.create(name="apart")
    Run.objects.filter(pk=run.pk).update(project=place)
    Launch.objects.filter(pk=launch.pk).update(project=place)
    asks = Caller(token_of(make_person("kim", Role.OPERATOR), TokenScope.ACT))
    assert asks.post(f"runs/{run.uid}/branches", {}).status == 404
    assert asks.get(f"runs/{run.uid}/branches").status == 404


# --- the tree ----------------------------------------------------------------------------------


def test_the_tree_shows_ancestors_siblings_and_children_from_any_of_its_runs(
    caller: Caller, olga: User
) -> None:
    run, root = run_of_recipe(olga, states=(10,))
    child_run, child = run_of_recipe(
        olga, branch_of=root, branch_step=10, branch_state="step-10.pt", parameters={"steps": 9}
    )
    _, sibling = run_of_recipe(olga, branch_of=root, branch_step=5, branch_state="step-5.pt")
    grandchild_run, grandchild = run_of_recipe(
        olga, branch_of=child, branch_step=12, branch_state="step-12.pt", parameters={"steps": 9}
    )
    order = [root.pk, sibling.pk, child.pk, grandchild.pk]
    for start in (root, child, sibling, grandchild):
        assert [one.launch.pk for one in branch_tree(start)] == order
    tree = caller.get(f"runs/{grandchild_run.uid}/branches").data["tree"]
    assert [one["depth"] for one in tree] == [0, 1, 1, 2]
    assert [one["branch_step"] for one in tree] == [None, 5, 10, 12]
    assert [one["changed"] for one in tree] == [{}, {}, {"steps": [100, 9]}, {}]
    assert tree[2]["run"] == child_run.uid
    assert ancestors_of_run(grandchild_run.uid) == [child_run.uid, run.uid]
    assert ancestors_of_run(run.uid) == []


def test_a_tree_that_names_itself_ends(olga: User) -> None:
    _, one = run_of_recipe(olga)
    _, two = run_of_recipe(olga, branch_of=one)
    Launch.objects.filter(pk=one.pk).update(branch_of=two)
    one.refresh_from_db()
    assert len(branch_tree(one)) <= 2
    assert len(ancestors_of_run(one.run_uid)) <= 2


# --- the host ----------------------------------------------------------------------------------


@pytest.fixture
def host(db: None, settings: Any, tmp_path: Path) -> str:
    """This process plays the worker of a host, whose recipe counts."""
    settings.ESPER_HOST_NAME = "host-r"
    settings.ESPER_RECIPES = tmp_path / "recipes"
    settings.ESPER_LAUNCH_DIR = tmp_path / "launches"
    settings.ESPER_SERVER = "http://127.0.0.1:9"
    write_recipe(settings.ESPER_RECIPES, RECIPE)
    (settings.ESPER_RECIPES / "count.py").write_text(COUNT)
    make_worker()
    hosting.register_recipes()
    return "host-r"


def run_to_its_end(launch: Launch) -> Launch:
    """A real process under its launch monitor."""
    hosting.start(launch)
    until = time.monotonic() + 600
    while launch.state not in LAUNCH_ENDED and time.monotonic() < until:
        launch.refresh_from_db()
        if launch.state not in LAUNCH_ENDED:
            hosting.look_at(launch)
            time.sleep(0.05)
    return launch


@pytest.mark.process
def test_a_real_process_goes_on_from_the_state_of_another_run(
    host: str, caller: Caller, olga: User
) -> None:
    recipe = Recipe.objects.get(slug="counter")
    parent = make_launch(olga, recipe=recipe, parameters={"steps": 35})
    run_to_its_end(parent)
    assert parent.state == S.FINISHED, parent.reason
    assert [state.step for state in parent.states.all()] == [30, 20, 10]
    Run.objects.create(uid=parent.run_uid, name="counter", owner=olga, mode="observe")
    body = {"state": "step-20.txt", "parameters": {"steps": 25}}
    answer = caller.post(f"runs/{parent.run_uid}/branches", body)
    assert answer.status == 202, answer.data
    branch = run_to_its_end(Launch.objects.select_related("branch_of").get(uid=answer.data["uid"]))
    assert branch.state == S.FINISHED, branch.reason
    assert branch.last_lines == ["begins at 20", "ended at 25"]
    assert len(branch.branch_digest) == 64
    assert (hosting.launch_folder(parent) / "checkpoints" / "step-20.txt").exists()


def prepared(olga: User) -> tuple[Launch, Path]:
    """A requested branch, and the folder with its parent's states."""
    recipe = Recipe.objects.get(slug="counter")
    parent = make_launch(olga, recipe=recipe, state=S.FINISHED)
    place = hosting.launch_folder(parent) / "checkpoints"
    place.mkdir(parents=True)
    (place / "step-20.pt").write_bytes(archive())
    (place / "step-10.pt").write_bytes(archive())
    hosting.list_states(parent)
    assert [state.step for state in parent.states.all()] == [20, 10]
    branch = make_launch(
        olga, recipe=recipe, branch_of=parent, branch_step=20, branch_state="step-20.pt"
    )
    return branch, place


def test_a_state_that_is_gone_fails_the_launch_and_is_not_offered_again(
    host: str, olga: User
) -> None:
    branch, place = prepared(olga)
    (place / "step-20.pt").unlink()
    hosting.start(branch)
    branch.refresh_from_db()
    assert branch.state == S.FAILED
    assert "step-20.pt is not on this host any more" in branch.reason
    assert branch.branch_of is not None
    assert [state.step for state in branch.branch_of.states.all()] == [10]


def test_a_damaged_state_fails_the_launch_with_that_reason(host: str, olga: User) -> None:
    branch, place = prepared(olga)
    (place / "step-20.pt").write_bytes(damaged("altered"))
    hosting.start(branch)
    branch.refresh_from_db()
    assert branch.state == S.FAILED
    assert "step-20.pt is damaged" in branch.reason


def test_a_branch_is_resumed_from_its_own_copy(host: str, olga: User) -> None:
    branch, place = prepared(olga)
    recipe = read_recipe(hosting.settings.ESPER_RECIPES / "counter.toml")
    first = hosting._order(branch, recipe).argv
    (place / "step-20.pt").unlink()
    branch.attempt = 2
    assert hosting._order(branch, recipe).argv == first
    assert Path(first[-1]).read_bytes() == archive()


# --- a graft of the parent is the branch's own -------------------------------------------------


def kept_graft(run: Run) -> Adaptation:
    return Adaptation.objects.create(
        run=run,
        run_epoch=1,
        idempotency_key=run.uid,
        layer="fc",
        adaptation_type="add_efficiency",
        blueprint=Blueprint.objects.first() or make_blueprint(),
        risk="low",
        forecast_parameters=1,
        policy="heuristic-1",
        safety_policy=current_policy(),
        proposed_step=5,
        state=AdaptationState.KEPT,
    )


def test_grafts_that_came_with_the_state_are_no_violation(olga: User) -> None:
    run, root = run_of_recipe(olga)
    foreign, _ = run_of_recipe(olga)
    inherited, strange = kept_graft(run), kept_graft(foreign)
    child_run, _ = run_of_recipe(olga, branch_of=root, branch_step=10)

    def entry(row: Adaptation) -> Applied:
        return Applied(adaptation=row.uid, layer=row.layer, blueprint="proj_lora_64", step=5)

    reconcile_grafts(child_run, {inherited.uid: entry(inherited)}, SYSTEM)
    assert not Violation.objects.exists()
    reconcile_grafts(child_run, {strange.uid: entry(strange)}, SYSTEM)
    assert Violation.objects.filter(run=child_run).count() == 1


def _rollback(uid: str) -> tuple[str, dict[str, Any]]:
    return "rollbacks", {
        "epoch": 1, "adaptation": uid, "step": 40, "rule": "non_finite",
        "observed": "nan", "limit": 1.0, "exact": True,
    }  # fmt: skip


def _verdict(uid: str) -> tuple[str, dict[str, Any]]:
    return "remedy-verdicts", {
        "epoch": 1, "adaptation": uid, "keep": False, "reason": "still open",
        "step": 40, "steps_observed": 20,
    }  # fmt: skip


def _merge(uid: str) -> tuple[str, dict[str, Any]]:
    return "remedies", {
        "epoch": 1, "key": "k1", "remedy": "merge", "layer": "fc", "step": 40,
        "details": {}, "adaptation": uid,
    }  # fmt: skip


@pytest.mark.parametrize("report", [_rollback, _verdict, _merge])
def test_what_becomes_of_an_inherited_change_is_taken_and_leaves_the_parent_alone(
    olga: User, report: Any
) -> None:
    """A 404 would end the branch's connection: its trainer would take the run for unknown."""
    run, root = run_of_recipe(olga)
    graft = kept_graft(run)
    before = Adaptation.objects.filter(pk=graft.pk).values().get()
    child = make_launch(olga, state=S.RUNNING, recipe=root.recipe, branch_of=root, branch_step=10)
    token = token_of(olga, TokenScope.RUNS_CREATE, run_uid=child.run_uid)
    answer = Caller(token).post("runs", registration(name="child"))
    assert answer.status == 201, answer.data
    path, body = report(graft.uid)
    told = Caller(answer.data["token"]).post(f"runs/{child.run_uid}/{path}", body)
    assert told.status < 300, told.data
    assert Adaptation.objects.filter(pk=graft.pk).values().get() == before


# --- the recipe that comes with Esper ----------------------------------------------------------


def test_the_example_goes_on_to_the_bit_from_a_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and optimizer after 40 steps: of one run, and of a branch from its step 20."""
    import torch

    monkeypatch.setenv("ESPER_SERVER", "")

    def train(name: str, *options: str) -> dict[str, Any]:
        place = tmp_path / name
        place.mkdir()
        argv = ["digits_cnn.py", "--steps", "40", "--every", "20", *options]
        argv += ["--states", str(place), "--checkpoint", str(place / "net.pt")]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(ROOT / "examples" / "digits_cnn.py"), run_name="__main__")
        state: dict[str, Any] = torch.load(place / "step-40.pt", weights_only=True)
        return state

    whole = train("whole")
    start = ("--from", str(tmp_path / "whole" / "step-20.pt"))
    branch, other = train("branch", *start), train("other", *start, "--seed", "1", "--lr", "0.001")

    def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
        weights = all(torch.equal(one["model"][name], two["model"][name]) for name in one["model"])
        moments = one["optimizer"]["state"], two["optimizer"]["state"]
        return weights and all(
            torch.equal(moments[0][key][name], moments[1][key][name])
            for key in moments[0]
            for name in moments[0][key]
        )

    assert same(whole, branch)
    assert not same(whole, other)
    assert other["optimizer"]["param_groups"][0]["lr"] == 0.001
    assert (other["seed"], other["step"], other["session"]["step"]) == (1, 40, 40)
