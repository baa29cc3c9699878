"""A graft that spans layers, from its proposal to the trainer's command and the page."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from django.test import Client

from apps.adaptations import services
from apps.adaptations.models import Adaptation
from apps.rest.problems import Problem
from apps.runs.models import Run
from esper.contracts import LayerInfo
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
