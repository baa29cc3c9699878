"""``print(session)``, ``session.why()`` and what else is printed: readable, and never an error."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esper
from esper.contracts import SIGNALS, HealthFrame, LayerInfo, RunMode, Signal
from esper.diagnosis.base import Evidence
from esper.exceptions import IncompatibleLayerError, UnknownLayerError
from esper.sdk.summary import MOST_ROWS, layer_rows
from esper.sdk.treatments import RemedyProposal
from tests.esper.sdk.test_local_loop import EAGER, Bottleneck
from tests.esper.sdk.test_local_loop import attached as attached_bottleneck
from tests.esper.sdk.tiny_training import Training


def attached(training: Training, **options: Any) -> esper.Session:
    return esper.attach(
        training.model, training.optimizer, run="told", scheduler=training.scheduler, **options
    )


def a_layer(name: str, **members: Any) -> LayerInfo:
    return LayerInfo(name, "Linear", (2, 4), (2, 4), "float32", 20, **{"graftable": True} | members)


# -- the summary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("show", [str, repr, lambda session: session._repr_html_()])
def test_a_summary_has_run_mode_step_layers_findings_and_adaptations(
    training: Training, show: Callable[[object], str]
) -> None:
    training.optimizer.param_groups[0]["params"].pop()  # the last bias is trained by nothing
    with attached(training, mode="supervised") as session:
        training.run(12, session)
        session.graft("3", "proj_lora_64")
        remedy = session.set_lr("0", 0.5)
        text = html.unescape(show(session))
        for words in (
            "'told': supervised mode, step 12, local",
            "health of step 10",
            "serious finding at '5': bias: trainable, but in no optimizer",
            "proj_lora_64 in '3', step 12: probation until step 612 at most",
            "proj_lora_64 (probation)",
            str(remedy),
            "Why nothing happens",
        ):
            assert words in text, words


def test_a_summary_before_the_first_step_and_after_the_end(training: Training) -> None:
    session = attached(training)
    assert "no health frame yet" in str(session)
    assert "session.step(loss)" in str(session)
    session.close()
    assert ", closed" in str(session)
    assert "The session is closed." in str(session)


def test_the_least_healthy_layers_come_first_and_the_rest_is_counted() -> None:
    layers = [a_layer(f"layer{place}") for place in range(100)]
    values = np.full((100, len(SIGNALS)), np.nan, dtype=np.float32)
    values[:99, SIGNALS.index(Signal.HEALTH)] = np.linspace(1.0, 0.01, 99)
    frame = HealthFrame(5, 0.0, tuple(layer.name for layer in layers), values)
    rows, left_out = layer_rows(layers, frame, {"layer98": "a graft"})
    assert (len(rows), left_out) == (MOST_ROWS, 88)
    assert [row[0] for row in rows] == [f"layer{98 - place}" for place in range(MOST_ROWS)]
    assert rows[0][-1] == "a graft"


def test_numbers_are_written_as_people_write_them() -> None:
    signals = (Signal.HEALTH, Signal.GRAD_NORM, Signal.UPDATE_RATIO)
    values = np.full((2, len(SIGNALS)), np.nan, dtype=np.float32)
    for row, known in enumerate([(0.97, 0.4421, 0.0272), (0.98, 31_000, 4.2e-6)]):
        for signal, value in zip(signals, known, strict=True):
            values[row, SIGNALS.index(signal)] = value
    layers = [a_layer("fc1"), a_layer("fc2")]
    rows, _ = layer_rows(layers, HealthFrame(5, 0.0, ("fc1", "fc2"), values), {})
    assert [row[3:7] for row in rows] == [
        ("0.97", "0.44", "0.027", "-"),
        ("0.98", "31,000", "4.2e-06", "-"),
    ]


def test_a_long_list_is_cut_and_counted() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))
    with esper.attach(model, torch.optim.SGD(model.parameters(), lr=0.1)) as session:
        lines = str(session).splitlines()
    assert "and 18 more" in lines
    assert len(lines) < 30


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        self.open += tag != "br"

    def handle_endtag(self, tag: str) -> None:
        self.open -= 1


def test_the_html_form_is_escaped_and_whole() -> None:
    model = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(4, 4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with esper.attach(model, optimizer, run="<b>&") as session:
        tags = Tags()
        tags.feed(session._repr_html_())
        reasons = session.why()._repr_html_()
    assert "script" not in tags.seen
    assert "table" in tags.seen
    assert tags.open == 0
    assert "&lt;b&gt;" in reasons


def test_a_summary_that_fails_is_no_error(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attached(training) as session:
        monkeypatch.setattr(session, "_summary", lambda: 1 / 0)
        for shown in (str(session), repr(session), session._repr_html_()):
            assert "'told'" in shown


def test_looking_changes_nothing() -> None:
    quiet = Training()
    with attached(quiet, mode="automatic") as session:
        expected = quiet.run(30, session)
    looked_at = Training()
    with attached(looked_at, mode="automatic") as session:
        losses = []
        for _ in range(30):
            losses += looked_at.run(1, session)
            _ = str(session), session.why(), session.why("3"), session._repr_html_()
    assert losses == expected


# -- why -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(RunMode))
def test_why_names_the_reasons_of_policy_and_gates(training: Training, mode: RunMode) -> None:
    with attached(training, mode=mode) as session:
        training.run(12, session)
        reasons = session.why()
    assert len(reasons) > 0
    assert all(isinstance(reason, str) for reason in reasons)
    assert "No open finding says that the run lacks capacity" in str(reasons)
    assert "12 samples of the loss do not show its trend" in str(reasons)
    assert ("Observe mode changes nothing." in reasons) == (mode is RunMode.OBSERVE)


def test_why_in_observe_mode_says_what_would_be_proposed() -> None:
    host = Bottleneck()
    with attached_bottleneck(host, "observe") as session:
        host.run_until(lambda: "would propose" in str(session.why()), session)
        assert session.adaptations == session.waiting == ()
        (reason,) = session.why()
        assert 'mode="supervised"' in reason
        assert not session._parts.surgery.changes.adaptations


def test_why_names_what_waits_and_how_to_answer() -> None:
    host = Bottleneck()
    with attached_bottleneck(host, "supervised") as session:
        host.run_until(lambda: session.waiting, session)
        (waiting,) = session.waiting
        assert f"session.approve({waiting.layer!r})" in session.why()[0]
        assert f"session.approve({waiting.layer!r})" in str(session.why(waiting.layer))
        assert str(waiting) in str(session)


def test_why_names_a_cooldown() -> None:
    host = Bottleneck()
    policy = replace(EAGER, cooldown_run_steps=100_000, cooldown_layer_steps=100_000)
    with attached_bottleneck(host, "supervised", policy) as session:
        host.run_until(lambda: session.waiting, session)
        session.reject(session.waiting[0])
        host.run_until(lambda: "cooldown is 100000 steps" in str(session.why()), session)
        assert "cooldown is 100000 steps" in str(session.why("0"))


def test_why_names_signals_that_are_missing(training: Training) -> None:
    with attached(training, mode="automatic") as session:
        for _ in range(60):
            training.step()
            training.optimizer.zero_grad(set_to_none=True)
            session.step()
        reasons = str(session.why())
    assert "0 samples of the loss" in reasons


def test_why_when_no_layer_may_be_grafted() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with esper.attach(model, optimizer, mode="automatic", slots=[]) as session:
        loss = model(torch.ones(2, 4)).mean()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)
        assert (
            "None of 1 layers may be grafted: attach was told to leave it alone." in session.why()
        )
        assert "attach was told to leave it alone" in str(session.why("0"))


def test_why_after_detach_and_with_a_server(training: Training) -> None:
    session = attached(training, server="http://127.0.0.1:9", token="esp_x")
    training.step(session)
    assert "http://127.0.0.1:9" in str(session.why())
    assert "not registered there yet" in str(session.why())
    session.detach()
    assert "detached" in str(session.why())
    session.close(timeout=0.0)


def test_why_of_a_layer_tells_its_measurements_and_what_fits(training: Training) -> None:
    with attached(training, mode="automatic") as session:
        training.run(12, session)
        session.graft("3", "proj_lora_64")
        told = str(session.why("3"))
    for words in ("Linear [32, 16] -> [32, 16]", "At step 10: health", "proj_lora_64", "fit ("):
        assert words in told, words


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("fc22", "fc2"), ("FC1", "fc1"), ("head", "block.head"), ("block.hed", "block.head")],
)
def test_a_mistyped_layer_gets_the_near_names(typed: str, meant: str) -> None:
    model = nn.ModuleDict(
        {"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4), "block": nn.ModuleDict()}
    )
    model.block["head"] = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with esper.attach(model, optimizer) as session:
        for ask in (
            lambda: session.why(typed),
            lambda: session.graft(typed, "proj_lora_64"),
            lambda: session.set_lr(typed, 0.5),
        ):
            with pytest.raises(UnknownLayerError, match=f"did you mean .*'{meant}'"):
                ask()


def test_a_wrong_call_is_answered_with_what_to_do(training: Training) -> None:
    with attached(training, mode="supervised") as session:
        with pytest.raises(IncompatibleLayerError, match=r"call session\.step\(loss\)"):
            session.graft("0", "proj_lora_64")
        training.run(2, session)
        with pytest.raises(UnknownLayerError, match=r"'1' is not .* a ReLU has no param"):
            session.graft("1", "proj_lora_64")
        with pytest.raises(ValueError, match="waits for layer '0'; none waits for any layer"):
            session.approve("0")
        with pytest.raises(TypeError, match="undo takes the receipt"):
            session.undo("0")  # type: ignore[call-overload, arg-type]


def test_why_no_layer_was_measured(training: Training) -> None:
    other = torch.optim.SGD(training.model.parameters(), lr=0.1)
    with esper.attach(training.model, other) as session:
        training.run(31, session)
        assert "No layer was measured in 31 steps" in str(session.why())


# -- one line each ---------------------------------------------------------------------------------


def test_what_is_returned_prints_in_one_line(training: Training) -> None:
    with attached(training, mode="supervised") as session:
        training.run(2, session)
        receipt = session.graft("3", "proj_lora_64")
        remedy = session.freeze("5")
        (adaptation,) = session.adaptations
        things: list[object] = [receipt, remedy, adaptation]
        things += [session.layers[0], session.undo(receipt), receipt]
        flat = Evidence(observed="the loss is flat", limit="it falls")
        things.append(RemedyProposal("plateau", "set_lr", "5", {"factor": 0.5}, 2, "", flat))
        for thing in things:
            for shown in (str(thing), repr(thing)):
                assert "\n" not in shown
                assert len(shown) < 200
                assert "0x" not in shown
        assert "not in the model any more" in str(receipt)
        assert "proj_lora_64 in '3' at step 2: 128 parameters, output unchanged" in str(things[0])
        assert str(session.layers[0]).startswith("0: Linear [32, 8] -> [32, 16], float32, 144")
