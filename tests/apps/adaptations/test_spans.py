"""A graft that spans layers, from its proposal to the trainer's command and the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from django.test import Client

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.adaptations.selectors import run_snapshot
from apps.blueprints.models import Blueprint
from apps.rest.problems import Problem
from apps.runs.models import Command, Run
from esper.blueprints import get_blueprint
from esper.contracts import (
    AdaptationType,
    CommandKind,
    CommandState,
    LayerInfo,
    Role,
    SafetyPolicy,
)
from esper.contracts.protocol import VariantSuggestion
from esper.contracts.spans import span
from esper.replay import run_snapshot as read
from esper.selection import BlueprintSelector
from esper.services.tamiyo.learning import suggestion_for
from tests.apps.cast import TAMIYO, make_blueprint, make_person
from tests.apps.stage import Stage

FIRST = LayerInfo(
    "up", "Linear", (8, 64), (8, 4), "float32", 260, True, features_in=64, features_out=4,
    order=0, feeds=("down",),
)  # fmt: skip
LAST = replace(
    FIRST, name="down", in_shape=(8, 4), out_shape=(8, 10), features_in=4, features_out=10,
    parameters=50, order=1, feeds=(), activation="relu",
)  # fmt: skip
SPAN: dict[str, Any] = {"layer": "down", "since": "up", "config": {"hidden": 28}}


@pytest.fixture
def spanned(stage: Stage) -> Stage:
    Run.objects.filter(pk=stage.run.pk).update(layers=[FIRST.to_wire(), LAST.to_wire()])
    stage.run.refresh_from_db()
    return stage


def approved(stage: Stage, adaptation: Adaptation) -> Adaptation:
    return services.approve_adaptation(
        adaptation=adaptation,
        user=stage.operator,
        via="session",
        version=adaptation.version,
        reason="it fits",
        evidence_hash=adaptation.evidence_hash,
    )


@pytest.mark.django_db
def test_the_kernel_and_the_command_are_for_the_span(spanned: Stage) -> None:
    adaptation = approved(spanned, spanned.waiting(**SPAN))
    assert adaptation.job is not None
    built = LayerInfo.from_wire(adaptation.job.layer)
    assert (built.since, built.features_in, built.features_out) == ("up", 64, 10)
    command = spanned.dispatched(adaptation)
    assert (command.layer, command.payload) == ("down", {"since": "up"})


@pytest.mark.django_db
def test_the_page_says_what_is_spanned(spanned: Stage) -> None:
    adaptation = spanned.waiting(**SPAN)
    client = Client()
    client.force_login(spanned.operator)
    text = client.get(f"/adaptations/{adaptation.uid}").content.decode()
    assert "parallel to up … down, 28 units" in text


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("since", "layer", "words"), [("down", "up", "runs after"), ("nowhere", "down", "'nowhere'")]
)
def test_a_span_that_cannot_be_is_refused(
    spanned: Stage, since: str, layer: str, words: str
) -> None:
    with pytest.raises(Problem, match=words):
        spanned.waiting(layer=layer, since=since)


@pytest.mark.django_db
def test_an_approval_is_bound_to_the_span(spanned: Stage) -> None:
    adaptation = spanned.waiting(**SPAN)
    Adaptation.objects.filter(pk=adaptation.pk).update(since="")
    adaptation.refresh_from_db()
    with pytest.raises(Problem):
        approved(spanned, adaptation)


@pytest.mark.django_db
def test_another_size_of_a_span_is_suggested_tried_and_admitted(spanned: Stage) -> None:
    """From what Tamiyo reads to what its next decision may use."""
    widen = make_blueprint("widen_hidden", ident="BP-WIDEN-HIDDEN")
    Blueprint.objects.filter(pk=widen.pk).update(tunes=["hidden"])
    widen.refresh_from_db()
    twice = {"hidden": 2.0}
    told = VariantSuggestion(
        factors=twice, chance=0.5, expected=0.02, error=0.01, cases=(), policy="variants-1"
    )
    variant = services.suggest_variant(blueprint=widen, told=told, actor=TAMIYO)
    usual = {**SPAN, "config": {"hidden": 64, "activation": "relu"}}
    adaptation = spanned.waiting(blueprint="widen_hidden", **usual)
    for size, gain in (("", 0.02), (variant.uid, 0.06)):
        services.ask_for_shadow(
            adaptation=adaptation, user=spanned.operator, via="session", variant=size
        )
        command = Command.objects.filter(kind=CommandKind.SHADOW).latest("seq")
        assert command.payload["since"] == "up"
        assert command.payload.get("factors", {}) == (twice if size else {})
        found = {"gain": gain, "low": 0.01, "high": 0.09, "steps": 200, "looks": 9, "seconds": 1.0}
        spanned.ack(command, CommandState.APPLIED, step=1200, details=found)
    curator = make_person("cora", Role.CURATOR)
    services.admit_variant(variant=variant, user=curator, via="session", reason="better")

    seen = services.tried_sizes(widen)
    assert [(case.layer.since, case.gain) for case in seen.cases] == [("up", 0.02), ("up", 0.06)]
    next_one = suggestion_for(get_blueprint("widen_hidden"), seen)
    assert next_one is None or next_one.cases == tuple(case.uid for case in seen.cases)

    snapshot = read(run_snapshot(spanned.run))
    assert [(one.factors, one.trials) for one in snapshot.variants] == [(twice, 1)]
    chosen = BlueprintSelector([get_blueprint("widen_hidden")]).select(
        span(FIRST, LAST), AdaptationType.ADD_FFN, snapshot, SafetyPolicy()
    )
    assert chosen.best is not None
    assert (chosen.best.variant, chosen.best.config["hidden"]) == (variant.uid, 128)
