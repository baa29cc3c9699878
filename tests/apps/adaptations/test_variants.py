"""Variants: suggested from experience, tried in shadow, admitted by a curator, with lineage."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from django.test import Client

from apps.accounts.models import User
from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.adaptations.selectors import run_snapshot
from apps.audit.models import AuditEvent
from apps.blueprints.models import Blueprint, Variant
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from esper.blueprints import get_blueprint
from esper.contracts import AdaptationState, CommandKind, CommandState, Role, TokenScope, wire
from esper.contracts.protocol import VariantSuggestion
from esper.services.tamiyo.learning import suggestion_for
from tests.apps.callers import Caller
from tests.apps.cast import (
    TAMIYO,
    force_state,
    make_blueprint,
    make_person,
    make_tamiyo,
    token_of,
)
from tests.apps.stage import Stage

pytestmark = pytest.mark.django_db
DOUBLE = {"rank": 2.0}
LATER = 10_000  # steps, after every cooldown
FOUND = {"gain": 0.05, "low": 0.01, "high": 0.09, "steps": 200, "looks": 12, "seconds": 4.5}


@pytest.fixture
def curator() -> User:
    return make_person("cora", Role.CURATOR)


@pytest.fixture(autouse=True)
def tuned(stage: Stage) -> None:
    Blueprint.objects.update(tunes=["rank", "alpha"])
    stage.blueprint.refresh_from_db()


def told(**changes: Any) -> VariantSuggestion:
    base = VariantSuggestion(
        factors=DOUBLE, chance=0.3, expected=0.02, error=0.01, cases=(), policy="variants-1"
    )
    return msgspec.structs.replace(base, **changes)


def suggested(stage: Stage, **changes: Any) -> Variant:
    return services.suggest_variant(blueprint=stage.blueprint, told=told(**changes), actor=TAMIYO)


def tried(stage: Stage, adaptation: Adaptation, variant: Variant | None, gain: float) -> None:
    uid = variant.uid if variant else ""
    services.ask_for_shadow(adaptation=adaptation, user=stage.operator, via="session", variant=uid)
    command = Command.objects.filter(kind=CommandKind.SHADOW).latest("seq")
    stage.ack(command, CommandState.APPLIED, step=1200, details={**FOUND, "gain": gain})


def admitted(stage: Stage, curator: User) -> tuple[Variant, Adaptation]:
    variant, adaptation = suggested(stage), stage.waiting()
    tried(stage, adaptation, None, 0.02)
    tried(stage, adaptation, variant, 0.05)
    done = services.admit_variant(variant=variant, user=curator, via="session", reason="better")
    return done, adaptation


def refused(code: str, act: Any, **arguments: Any) -> None:
    with pytest.raises(Problem) as caught:
        act(**arguments)
    assert caught.value.code == code


def page(user: User, path: str) -> str:
    client = Client()
    client.force_login(user)
    return client.get(path).content.decode()


# --- admission ------------------------------------------------------------------------------------


def test_only_a_curator_admits_and_only_what_was_tried(stage: Stage, curator: User) -> None:
    variant, act = suggested(stage), services.admit_variant
    for person in (stage.viewer, stage.operator, stage.owner):
        refused("not-eligible", act, variant=variant, user=person, via="session", reason="I want")
    refused("not-tried", act, variant=variant, user=curator, via="session", reason="")
    assert run_snapshot(stage.run).variants == ()
    tried(stage, stage.waiting(), variant, 0.05)
    done = act(variant=variant, user=curator, via="session", reason="better")
    assert (done.state, done.decided_by) == ("admitted", curator)
    refused("variant-decided", act, variant=variant, user=curator, via="session", reason="")
    (event,) = AuditEvent.objects.filter(act="variant.admitted")
    assert (event.actor, event.reason) == ("cora", "better")


def test_decisions_get_admitted_ones_with_what_their_trials_have_shown(
    stage: Stage, curator: User
) -> None:
    variant, _ = admitted(stage, curator)
    (known,) = run_snapshot(stage.run).variants
    assert (known.uid, known.blueprint, known.factors) == (variant.uid, "proj_lora_64", DOUBLE)
    assert known.gain == pytest.approx(0.03)
    assert known.trials == 1


@pytest.mark.parametrize("state", ["suggested", "withdrawn", "unknown"])
def test_a_proposal_of_what_is_not_admitted_is_refused(stage: Stage, state: str) -> None:
    variant = suggested(stage)
    Variant.objects.filter(pk=variant.pk).exclude(state=state).update(
        state=state if state != "unknown" else "suggested"
    )
    uid = "var_none" if state == "unknown" else variant.uid
    refused("variant-not-admitted", stage.waiting, variant=uid)
    assert not Adaptation.objects.exists()


def test_the_variant_of_another_blueprint_is_refused(stage: Stage, curator: User) -> None:
    variant, first = admitted(stage, curator)
    make_blueprint("proj_ia3", ident="BP-PROJ-IA3")
    force_state(first, AdaptationState.REJECTED)
    refused("variant-not-admitted", stage.waiting, variant=variant.uid, blueprint="proj_ia3",
            step=LATER)  # fmt: skip


def test_what_was_withdrawn_while_it_waited_is_not_approved(stage: Stage, curator: User) -> None:
    variant, first = admitted(stage, curator)
    force_state(first, AdaptationState.REJECTED)
    waiting = stage.waiting(variant=variant.uid, step=LATER)
    assert waiting.variant == variant
    services.withdraw_variant(variant=variant, user=curator, via="session", reason="worse later")
    refused(
        "variant-not-admitted", services.approve_adaptation, adaptation=waiting,
        user=stage.operator, via="session", version=waiting.version,
        evidence_hash=waiting.evidence_hash,
    )  # fmt: skip
    assert run_snapshot(stage.run).variants == ()


def test_withdrawing_needs_a_right_and_a_reason(stage: Stage, curator: User) -> None:
    variant, act = suggested(stage), services.withdraw_variant
    refused("not-eligible", act, variant=variant, user=stage.operator, via="session", reason="no")
    refused("reason-required", act, variant=variant, user=curator, via="session", reason=" ")


# --- suggestions ----------------------------------------------------------------------------------


def test_what_was_withdrawn_is_never_suggested_again(stage: Stage, curator: User) -> None:
    variant = suggested(stage)
    refused("variant-known", suggested, stage=stage, factors={"alpha": 2.0})  # one at a time
    services.withdraw_variant(variant=variant, user=curator, via="session", reason="too large")
    refused("variant-known", suggested, stage=stage)
    seen = services.tried_sizes(stage.blueprint)
    assert (seen.taken, seen.waiting) == ((DOUBLE,), False)
    found = suggestion_for(get_blueprint("proj_lora_64"), seen)
    assert found is None or found.factors != DOUBLE


@pytest.mark.parametrize(
    "factors", [{}, {"rank": 3.0}, {"hidden": 2.0}, {"rank": 2.0, "alpha": 2.0, "x": 2.0}]
)
def test_only_what_the_grammar_has_can_be_suggested(
    stage: Stage, factors: dict[str, float]
) -> None:
    refused("invalid", suggested, stage=stage, factors=factors)


def test_tamiyo_suggests_from_closed_grafts_and_trials(stage: Stage, curator: User) -> None:
    _, closed = admitted(stage, curator)
    force_state(closed, AdaptationState.KEPT, reward=0.04, graft_step=1001)
    caller = Caller(token_of(make_tamiyo(), TokenScope.READ, TokenScope.DECIDE))
    data = caller.get("blueprints/proj_lora_64/tried-sizes").data
    assert [case["gain"] for case in data["cases"]] == [0.04, 0.02, 0.05]
    assert data["cases"][-1]["factors"] == DOUBLE
    body = wire.to_wire(told(factors={"alpha": 0.5}, cases=(closed.uid,)))
    answer = caller.post("blueprints/proj_lora_64/variants", body)
    assert answer.status == 201, answer.data
    assert answer.data["learned_from"] == [closed.uid]
    person = Caller(token_of(curator, TokenScope.READ, TokenScope.ACT))
    assert person.post("blueprints/proj_lora_64/variants", body).status == 403


# --- lineage --------------------------------------------------------------------------------------


def test_the_page_and_the_api_show_where_a_variant_comes_from(stage: Stage, curator: User) -> None:
    variant, adaptation = admitted(stage, curator)
    Variant.objects.filter(pk=variant.pk).update(learned_from=[adaptation.uid, "adp_foreign"])
    shown = page(curator, "/blueprints/proj_lora_64")
    for words in (
        "rank × 2", "admitted", "by cora", "better", "+2% ± 1%",
        f"A-{adaptation.number}</a> (reward", "and 1 in projects that you do not see",
        f"/api/v1/variants/{variant.uid}/withdraw",
    ):  # fmt: skip
        assert words in shown, words
    assert f"{variant.uid}/withdraw" not in page(stage.operator, "/blueprints/proj_lora_64")
    caller = Caller(token_of(stage.viewer, TokenScope.READ))
    (row,) = caller.get("variants?state=admitted").data["results"]
    assert (row["decided_by"], row["learned_from"], row["unseen"]) == ("cora", [adaptation.uid], 1)
    assert row["gains"] == [pytest.approx(0.03)]
    assert [trial["gain"] for trial in row["trials"]] == [0.05]


def test_a_decision_offers_the_sizes_to_be_tried(stage: Stage) -> None:
    variant, adaptation = suggested(stage), stage.waiting()
    assert f'value="{variant.uid}"' in page(stage.operator, f"/adaptations/{adaptation.uid}")
    tried(stage, adaptation, variant, 0.05)
    command = Command.objects.get(kind=CommandKind.SHADOW)
    assert (command.payload["factors"], command.payload["config"]) == (DOUBLE, {})
    assert "the variant rank × 2" in page(stage.operator, f"/adaptations/{adaptation.uid}")
    with pytest.raises(Problem):
        tried(stage, adaptation, Variant(uid="var_none"), 0.0)


def test_an_edited_size_is_not_the_variants_any_more(stage: Stage, curator: User) -> None:
    variant, first = admitted(stage, curator)
    force_state(first, AdaptationState.REJECTED)
    Run.objects.update(step=LATER)
    stage.run.refresh_from_db()
    waiting = stage.waiting(variant=variant.uid)
    services.approve_adaptation(
        adaptation=waiting, user=stage.operator, via="session", version=waiting.version,
        evidence_hash=waiting.evidence_hash, config={"rank": 2},
    )  # fmt: skip
    waiting.refresh_from_db()
    assert (waiting.variant, waiting.config["rank"]) == (None, 2)
