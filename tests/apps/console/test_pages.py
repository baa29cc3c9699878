"""Every page, for every role."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.cache import cache
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from apps.adaptations.models import Adaptation
from apps.audit import chain
from apps.audit.models import AuditEvent
from apps.audit.services import ChainReport, sign_head, verify_chain
from apps.console.urls import urlpatterns
from apps.runs.models import Run
from esper.contracts import AdaptationState, RunState
from tests.apps.cast import PASSWORD, make_person
from tests.apps.console.world_runs import make_run

PEOPLE = ["vera", "rafi", "olga", "carl", "ada"]
OPEN_TO_ALL = {
    *("sign-in", "sign-out", "sign-in-code", "provider-sign-in", "provider-callback"),
    *("set-language", "words"),
}
FAILED_PANEL = "This part could not be shown"


def page_addresses(world: Any) -> list[str]:
    plain = (
        "overview",
        "inbox",
        "runs",
        "blueprints",
        "violations",
        "policy",
        "kernels",
        "me",
        "workers",
        "recipes",
        "duty",
        "status",
        "wall",
        "report",
        "accessibility",
        "search",
    )
    return [
        *(reverse(f"console:{name}") for name in plain),
        reverse("console:run", args=[world.runs["digits-cnn"].uid]),
        reverse("console:adaptation", args=[world.adaptations["waiting"].uid]),
        reverse("console:adaptation", args=[world.adaptations["kept"].uid]),
        reverse("console:blueprint", args=["proj_lora_64"]),
        reverse("console:kernel", args=["ab" * 32]),
        reverse("console:recipe", args=[world.launches["running"].recipe.uid]),
        *(reverse("console:launch", args=[launch.uid]) for launch in world.launches.values()),
        "/kernels?blueprint=mlp_gelu_2048&capability=cpu&tier=0",
        "/inbox?state=history",
        "/inbox?state=mine&risk=high",
        "/audit?verify=1&act=adaptation.",
        "/violations?state=all&severity=serious",
        "/runs?state=running&mine=1",
        "/bar?section=inbox",
        "/search?q=digits&part=list",
        "/report?ago=1",
    ]


@pytest.mark.parametrize("who", PEOPLE)
def test_every_role_sees_every_page_complete(world: Any, who: str) -> None:
    client = world.client(who)
    for address in page_addresses(world):
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert FAILED_PANEL not in answer.content.decode(), address


def test_the_catalogue_has_the_track_record_of_each_blueprint(world: Any) -> None:
    uses = Adaptation.objects.filter(blueprint__slug="mlp_gelu_2048").exclude(graft_step=None)
    grafted, kept = uses.count(), uses.filter(state=AdaptationState.KEPT).count()
    assert 0 < kept <= grafted
    page = world.client("vera")
    rows = page.get("/blueprints").content.decode().split('id="row-')[1:]
    row = next(one for one in rows if one.startswith("mlp_gelu_2048"))
    counts = dict(re.findall(r'data-label="([a-z ]+)">(\d+)<', row))
    assert (int(counts["grafted"]), int(counts["kept"])) == (grafted, kept)
    about = page.get("/blueprints/mlp_gelu_2048").content.decode()
    assert f"grafted {grafted}×, kept {kept}, rolled back {counts['rolled back']}" in about
    assert "too few to trust a rate" in about


def test_no_page_has_inline_scripts_styles_or_handlers(world: Any) -> None:
    client = world.client("ada")
    for address in page_addresses(world):
        text = client.get(address).content.decode()
        assert not re.search(r"<style|<[^>]+\s(style|on\w+)=", text), address
        for script in re.findall(r"<script[^>]*>", text):
            assert " src=" in script or "application/json" in script, address


def test_a_visitor_is_asked_to_sign_in_and_returns_to_the_page(world: Any) -> None:
    client = Client()
    for pattern in urlpatterns:
        if pattern.name in OPEN_TO_ALL:
            continue
        arguments = ["x"] if "<" in str(pattern.pattern) else []
        address = reverse(f"console:{pattern.name}", args=arguments)
        answer = client.get(address)
        assert (answer.status_code, answer["Location"]) == (302, f"/login?next={address}")


def test_signing_in_leads_to_the_page_that_was_asked_for(world: Any) -> None:
    address = reverse("console:adaptation", args=[world.adaptations["waiting"].uid])
    form = {"username": "olga", "password": PASSWORD, "next": address}
    answer = Client().post("/login", form)
    assert (answer.status_code, answer["Location"]) == (302, address)


def test_a_run_says_what_waits_for_a_decision_in_it(world: Any) -> None:
    def told(run: str) -> str:
        return str(world.client("vera").get(f"/runs/{world.runs[run].uid}").content.decode())

    waiting = world.adaptations["waiting"]
    text = told("digits-cnn")
    assert f"A-{waiting.number} {waiting.title} waits for a decision" in text
    assert text.count("waits for a decision") == 1
    waiting.state = AdaptationState.REJECTED
    waiting.save()
    assert "waits for a decision" not in told("digits-cnn")


def test_signing_in_never_leads_to_another_site(world: Any) -> None:
    form = {
        "username": "olga",
        "password": PASSWORD,
        "next": "https://elsewhere.example/",
    }
    assert Client().post("/login", form)["Location"] == "/"


def test_a_wrong_password_is_refused_without_saying_which_part_is_wrong(world: Any) -> None:
    answers = [
        Client().post("/login", {"username": name, "password": "wrong"}).content.decode()
        for name in ("olga", "nobody-of-that-name")
    ]
    assert all("User name and password do not match" in text for text in answers)


@pytest.mark.parametrize(
    "address",
    [
        "/runs/run_none",
        "/adaptations/adp_none",
        "/blueprints/none",
        "/kernels/none",
        "/recipes/none",
        "/launches/none",
        "/inbox?state=gone",
        "/?panel=x",
    ],
)
def test_an_unknown_address_is_a_page_not_found(world: Any, address: str) -> None:
    assert world.client("olga").get(address).status_code == 404


def test_many_who_verify_the_audit_log_at_once_cause_one_pass_over_it(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def verify() -> ChainReport:
        passes.append(1)
        return verify_chain()

    monkeypatch.setattr("apps.console.pages.audit.verify_chain", verify)
    pages = [world.client(who).get("/audit?verify=1") for who in ("vera", "olga", "ada")]
    assert all("Verified" in page.content.decode() for page in pages)
    assert len(passes) == 1


def test_a_log_without_a_signed_head_is_not_called_broken(
    world: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that there is none, and when the first is made; changed events are still broken."""
    settings.ESPER_AUDIT_DIR = tmp_path

    def told() -> str:
        cache.clear()
        return str(world.client("vera").get("/audit?verify=1&panel=chain").content.decode())

    assert "no head is signed yet" in told()
    monkeypatch.setattr(chain, "database_now", lambda: timezone.now() + timedelta(minutes=5))
    text = told()
    assert "No signed head exists" in text
    assert "signs the first head within ten seconds" in text
    assert "broken" not in text.replace("unbroken", "")
    assert sign_head() is not None
    assert "covered by the head signed at" in told()
    (tmp_path / "heads.ndjson").unlink()
    AuditEvent.objects.filter(pk=1).update(reason="forged")
    assert "The chain is broken" in told()


def test_pages_accept_no_writes(world: Any) -> None:
    client = world.client("olga")
    assert client.post("/inbox").status_code == 405
    assert client.get("/logout").status_code == 405


def test_a_panel_can_be_fetched_alone(world: Any) -> None:
    text = world.client("olga").get("/?panel=system").content.decode()
    assert text.lstrip().startswith("<section")
    assert 'id="panel-system"' in text
    assert "<html" not in text


def test_one_broken_panel_does_not_break_the_page(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("apps.console.pages.overview.system_health", broken)
    text = world.client("olga").get("/").content.decode()
    assert text.count(FAILED_PANEL) == 1
    assert "digits-cnn" in text
    assert "the disk is full" not in text


def test_the_empty_installation_says_what_to_do(db: None) -> None:
    client = Client()
    client.force_login(make_person("vera"))
    overview = client.get("/").content.decode()
    assert "Nothing needs a person" in overview
    assert "esper.attach" in overview
    assert "Nothing waits for a person" in client.get("/inbox").content.decode()
    for address in (
        "/runs",
        "/blueprints",
        "/violations",
        "/policy",
        "/kernels",
        "/audit",
        "/workers",
        "/recipes",
    ):
        assert FAILED_PANEL not in client.get(address).content.decode()


def test_the_event_stream_starts_where_the_page_ends(world: Any) -> None:
    """What happens after the page was read is replayed from these numbers."""
    uid = world.runs["digits-cnn"].uid
    text = world.client("olga").get(f"/runs/{uid}").content.decode()
    since = re.search(r'<script id="since"[^>]*>(.*?)</script>', text)
    assert since is not None
    events = Adaptation.objects.get(pk=world.adaptations["kept"].pk)
    assert f'"run:{events.run.uid}": 12' in since[1]
    assert '"inbox": 12' in since[1]


def test_a_researcher_reads_which_acts_are_limited_to_their_own_runs(world: Any) -> None:
    def line(who: str, words: str) -> str:
        text = world.client(who).get("/me").content.decode()
        found = re.search(rf"<li>(?:(?!</li>).)*<span>{words}</span>(.*?)</li>", text, re.DOTALL)
        assert found is not None, words
        return found[1]

    assert "in your own runs" in line("rafi", "stop runs")
    assert "Only admins or operators may stop runs." in line("vera", "stop runs")
    assert "in the runs of others" in line("olga", "approve")
    assert "Only admins or curators may publish policies." in line("olga", "publish policies")


def test_the_empty_installation_links_to_tokens_for_people_who_may_attach_runs(
    db: None,
) -> None:
    client = Client()
    client.force_login(make_person("rafi"))
    text = client.get("/").content.decode()
    assert "ESPER_SERVER=http://testserver" in text
    assert 'href="/me">create a token' in text
    viewer = Client()
    viewer.force_login(make_person("vera"))
    assert "create a token" not in viewer.get("/").content.decode()


def test_the_history_uses_the_state_words_of_the_pages(world: Any) -> None:
    uid = world.adaptations["kept"].uid
    text = world.client("olga").get(f"/adaptations/{uid}").content.decode()
    assert "waiting for a worker" in text
    assert "compile queued" not in text


def test_the_topology_shows_grafts_and_where_a_finding_began(world: Any) -> None:
    run = world.runs["topics-lm"]
    text = world.client("vera").get(f"/runs/{run.uid}?panel=layers").content.decode()
    drawn = re.search(r'<ol class="topology".*?</ol>', text, re.S)
    assert drawn is not None
    nodes = re.findall(r"<li title=.*?</li>", drawn[0], re.S)
    names = [re.search(r'title="([^:]+):', node)[1] for node in nodes]  # type: ignore[index]
    assert names == [layer["name"] for layer in run.layers]  # in the order in which they run
    assert [name for name, node in zip(names, nodes, strict=True) if "✚ A-" in node] == [
        "classifier.0"
    ]
    assert [name for name, node in zip(names, nodes, strict=True) if "data-found" in node] == [
        "features.3"
    ]


def test_a_large_model_is_drawn_in_blocks(world: Any) -> None:
    run = world.runs["digits-cnn"]
    run.layers = [
        {**run.layers[3], "name": f"model.layers.{i // 8}.part{i % 8}", "order": i}
        for i in range(400)
    ]
    run.save()
    text = world.client("vera").get(f"/runs/{run.uid}?panel=layers").content.decode()
    drawn = text[text.index('<ol class="topology"') : text.index("</ol>")]
    assert drawn.count("<li ") == 50
    assert 'model.layers.49 <span class="muted">(8)</span>' in drawn


def test_a_branch_says_that_what_it_inherited_is_not_undone_from_its_page(world: Any) -> None:
    launch, parent = world.launches["branch"], world.runs["digits-cnn"]
    client = world.client("olga")
    make_run(world, "from-there", "olga", steps=5, state=RunState.RUNNING)
    Run.objects.filter(name="from-there").update(uid=launch.run_uid)
    said = "cannot be undone from this page"
    text = client.get(f"/runs/{launch.run_uid}?panel=branches").content.decode()
    assert said in text
    assert "begin another branch from a state before them" in text
    assert said not in client.get(f"/runs/{parent.uid}?panel=branches").content.decode()
