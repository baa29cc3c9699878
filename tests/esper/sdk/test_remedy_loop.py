"""Sick runs are answered by rule, by a person, or not at all; healthy runs are left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper import Session
from esper.constraints.remedy_gates import BY_RULE
from esper.contracts import RunMode, SafetyPolicy, Severity
from esper.contracts.remedies import MARKED
from esper.diagnosis import Diagnosis, Observation, get_rule, list_rules, title_of
from esper.diagnosis.base import Evidence, Memory, RemedySlug
from esper.diagnosis.rules.dying_relu import DyingRelu
from esper.diagnosis.rules.plateau import Plateau as PlateauRule
from esper.diagnosis.rules.vanishing_gradient import VanishingGradient
from esper.diagnosis.updates import EXCESSIVE
from esper.exceptions import GraftError
from esper.remedies import list_remedies
from esper.sdk.remedy_loop.doses import GENTLE
from esper.sdk.remedy_loop.history import IN_VAIN, History
from esper.sdk.remedy_loop.ladder import Ladder
from esper.sdk.remedy_loop.settling import WINDOW, Settling
from esper.sdk.remedy_loop.verdicts import WINDOW_STEPS, Verdicts
from esper.sdk.remedy_loop.young_run import YoungRun
from esper.sdk.run_state import RunState
from esper.sdk.treatments import Treatment
from tests.esper.diagnosis import small_runs

HELD_OUT = 1400
HEALTHY = 0.8  # held-out accuracy, which a run without a fault passes in this time


@dataclass
class Fault:
    """What is wrong with the run.

    Attributes:
        rate: of plain SGD.
        scale: of the initial weights and biases.
        shift: added to them.
        depth: hidden layers.
        held: how many of the last tensors the optimizer is given; None: all.
        batch: changes the inputs of a step.
        before: runs before a step.
        steps: how long the run is.
    """

    rate: float = 0.1
    momentum: float = 0.9
    scale: float = 1.0
    shift: float = 0.0
    depth: int = 3
    activation: type[nn.Module] = nn.ReLU
    adam: bool = False
    held: int | None = None
    steps: int = 600
    batch: Callable[[int, Tensor], Tensor] = field(default=lambda _, x: x)
    before: Callable[[int, torch.optim.Optimizer], None] = field(default=lambda *_: None)


def jump(step: int, optimizer: torch.optim.Optimizer) -> None:
    if step == 200:
        for group in optimizer.param_groups:
            group["lr"] *= 100


def poisoned(step: int, x: Tensor) -> Tensor:
    return x * float("nan") if 200 <= step < 203 else x


FAULTS = {
    "the rate is 3,000 times too high": Fault(rate=300.0, momentum=0.0),
    "Adam's rate is 1,000 times too high": Fault(rate=1.0, adam=True),
    "the rate is 100,000 times too low": Fault(rate=1e-6, steps=1200),
    "the rate is 100 times too high, and tanhs saturate": Fault(
        rate=1.0, activation=nn.Tanh, depth=6
    ),
    "the rate jumps": Fault(before=jump),
    "weights start too small": Fault(scale=0.05, depth=7, activation=nn.Tanh),
    "weights start too large": Fault(scale=30.0, depth=7, activation=nn.Tanh),
    "all weights start at zero": Fault(scale=0.0),
    "all weights start at the same number": Fault(scale=0.0, shift=0.1),
    "three batches are not numbers": Fault(batch=poisoned),
    "the optimizer holds the last layer only": Fault(held=2),
}


class Run:
    def __init__(self, fault: Fault, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.x, self.y = small_runs.digits()
        layers: list[nn.Module] = [nn.Linear(64, 32), fault.activation()]
        for _ in range(fault.depth - 1):
            layers += [nn.Linear(32, 32), fault.activation()]
        self.model = nn.Sequential(*layers, nn.Linear(32, 10))
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(fault.scale).add_(fault.shift)
        own = list(self.model.parameters())
        own = own if fault.held is None else own[-fault.held :]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(own, lr=fault.rate)
            if fault.adam
            else torch.optim.SGD(own, lr=fault.rate, momentum=fault.momentum)
        )
        self.fault = fault
        self.steps = 0

    def train(self, steps: int, session: Session | None = None) -> list[float]:
        losses = []
        for _ in range(steps):
            self.fault.before(self.steps, self.optimizer)
            rows = torch.randint(0, HELD_OUT, (64,))
            x = self.fault.batch(self.steps, self.x[rows])
            loss = F.cross_entropy(self.model(x), self.y[rows])
            self.optimizer.zero_grad()
            torch.autograd.backward(loss)
            self.optimizer.step()
            if session is not None:
                session.step(loss)
            self.steps += 1
            losses.append(loss.item())
        return losses

    def accuracy(self) -> float:
        with torch.no_grad():
            found = self.model(self.x[HELD_OUT:]).argmax(1) == self.y[HELD_OUT:]
        return float(found.float().mean())


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_sick_run_recovers_by_rule(fault: Fault) -> None:
    alone = Run(fault)
    alone.train(fault.steps)
    assert not alone.accuracy() > HEALTHY - 0.2
    run = Run(fault)
    rates = [group["lr"] for group in run.optimizer.param_groups]
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        run.train(fault.steps, session)
        assert run.accuracy() > HEALTHY
        assert session.remedies
        if fault.before is not jump:
            assert [group["lr"] for group in run.optimizer.param_groups] == rates
        for finding in session.findings():
            assert finding.slug != "non_finite"


@pytest.mark.parametrize("mode", ["observe", "supervised", "automatic"])
def test_a_healthy_run_is_left_alone_to_the_bit(mode: str) -> None:
    alone, run = Run(Fault(momentum=0.0)), Run(Fault(momentum=0.0))
    expected = alone.train(400)
    torch.manual_seed(7)
    run = Run(Fault(momentum=0.0))
    with esper.attach(run.model, run.optimizer, mode=mode, server="") as session:
        assert run.train(400, session) == expected
        assert session.remedies == ()
        assert session.proposed_remedies == ()


@pytest.mark.parametrize("scale", [4.0, 30.0])
def test_a_bad_start_at_a_rate_that_is_too_high_takes_a_repair_and_then_a_lower_rate(
    scale: float,
) -> None:
    run = Run(Fault(scale=scale, depth=8, rate=0.5))
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        run.train(400, session)
        loop = session._parts.remedies
        assert loop is not None
        first, *later = [entry.remedy for entry in loop.treatments]
        assert first == "repair_scale"
        assert "rewind" in later
        assert run.accuracy() > HEALTHY - 0.1


def test_a_lowered_rate_of_sgd_is_matched_to_the_weights_and_one_of_adam_is_not() -> None:
    for adam, expected in ((False, ["rewind", "match_updates"]), (True, ["rewind"])):
        run = Run(Fault(rate=1.0 if adam else 10.0, adam=adam))
        with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
            run.train(20, session)
            assert [receipt.remedy for receipt in session.remedies] == expected


def test_a_deep_convolutional_net_of_sigmoids_learns_after_a_repair() -> None:
    """The mean of what a sigmoid gives is far larger than what its inputs make of it."""
    run = Run(Fault(momentum=0.9))
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 8, 8))]
    for channels in (1, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.Sigmoid()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    for _ in range(5):
        layers += [nn.Linear(16, 16), nn.Sigmoid()]
    run.model = nn.Sequential(*layers, nn.Linear(16, 10))
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.01, momentum=0.9)
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        run.train(400, session)
        assert [receipt.remedy for receipt in session.remedies] == ["repair_scale"]
    assert run.accuracy() > 0.6


def test_large_data_takes_a_repair_however_far_the_first_update_went() -> None:
    fault = Fault(rate=0.05, batch=lambda _, x: 1600 * x)
    run = Run(fault)
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        run.train(1, session)
        assert session._parts.diagnosis.update_excess > EXCESSIVE
        losses = run.train(300, session)
        assert [change.remedy for change in session.remedies] == ["repair_scale"]
        assert max(losses[-20:]) < 1


@pytest.mark.parametrize("centered", [True, False])
def test_the_long_first_updates_of_rmsprop_are_no_fault(centered: bool) -> None:
    """At torch's own default rate; its mean of squares begins at zero, and is not corrected."""
    alone, run = (Run(Fault()) for _ in range(2))
    for one in (alone, run):
        one.optimizer = torch.optim.RMSprop(one.model.parameters(), centered=centered)
    torch.manual_seed(7)
    expected = alone.train(150)
    torch.manual_seed(7)
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        assert run.train(150, session) == expected
        assert session.remedies == ()
        serious = [f.slug for f in session.findings() if f.severity is not Severity.INFO]
        assert not serious


def test_a_rate_of_adam_that_is_raised_does_not_depend_on_the_noise_of_batches() -> None:
    """Noise makes later updates smaller, and the run would seem to need a higher rate."""
    chosen = []
    for batch in (lambda _, x: x, lambda _, x: torch.rand_like(x)):
        run = Run(Fault(rate=1e-6, adam=True, batch=batch))
        with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
            run.train(50, session)
            (raised,) = session.remedies
            chosen.append(1e-6 * raised.details["factor"])
    assert chosen[0] == pytest.approx(chosen[1], rel=0.3)
    assert 3e-4 < chosen[0] < 3e-3


@pytest.mark.parametrize("learns", [True, False])
def test_a_run_that_learns_at_a_high_rate_gets_the_rate_of_its_present_weights(
    learns: bool,
) -> None:
    """They have grown since the first updates, and the rate of the first ones hardly moves them."""
    torch.manual_seed(0)
    hidden = [(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(64, 10))
    x, y = small_runs.digits()
    high = small_runs.Run(
        model,
        data=(x, y if learns else y[torch.randperm(len(y))]),
        optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.3),
        steps=100,
    )
    with high.start() as session:
        high.train(session)
        loop = session._parts.remedies
        assert loop is not None
        evidence = Evidence("the loss moves about", "none", "loss", math.nan)
        found: Any = SimpleNamespace(
            rule=SimpleNamespace(slug="oscillating_loss"), evidence=evidence
        )
        factor = loop._chooser._doses.of("set_lr", found, 0)["factor"]
    assert (0.02 < factor <= 0.1) is learns


def test_a_rate_that_jumped_goes_back_to_the_rate_of_before_and_no_other() -> None:
    def early(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step == 120:
            for group in optimizer.param_groups:
                group["lr"] *= 100

    run = Run(Fault(before=early))
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        run.train(140, session)
        assert "rewind" in [receipt.remedy for receipt in session.remedies]
        assert "match_updates" not in [receipt.remedy for receipt in session.remedies]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("fall", "level", "settles"),
    [(0.0, 0.5, True), (0.2, 0.5, False), (0.0, 0.99, False), (-0.2, 0.5, True)],
    ids=["stands still", "falls", "has learned nothing", "rises"],
)
def test_a_chosen_rate_is_lowered_once_the_loss_stands_still(
    fall: float, level: float, settles: bool, kept: bool
) -> None:
    run = RunState("run", RunMode.AUTOMATIC, SafetyPolicy())
    noise = [0.01 * (-1) ** step for step in range(2 * WINDOW)]
    losses = [level - fall * (step >= WINDOW) + noise[step] for step in range(2 * WINDOW)]
    run.losses.extend(enumerate([1.0] * 30 + losses, start=1))
    run.step = 30 + 2 * WINDOW
    ended = "kept, because it is over" if kept else "did not help, because it is open"
    receipt: Any = SimpleNamespace(details={"factor": 0.1}, in_force=True)
    rewound = Treatment("update_ratio_high", "rewind", 30, receipt, None, ended=ended)
    settling = Settling()
    own = replace(rewound, receipt=SimpleNamespace(details={"factor": 1.0}, in_force=True))
    later = replace(rewound, step=300)
    assert settling.next_step([own]) == settling.next_step([later]) == float("inf")
    due = settling.next_step([rewound])
    assert due == (run.step if kept else float("inf"))
    assert settling.stands_still([rewound], run) is (rewound if kept and settles else None)


@pytest.mark.parametrize(("level", "ends"), [(2.3, True), (2.2, False), (2.4, True)])
def test_a_raised_rate_stays_while_the_loss_falls(level: float, ends: bool) -> None:
    # The finding looks at all losses, so it ends long after the run has begun to learn.
    run = RunState("run", RunMode.AUTOMATIC, SafetyPolicy())
    losses = [2.3 + 0.01 * (-1) ** step for step in range(250)]
    losses += [level + 0.01 * (-1) ** step for step in range(WINDOW_STEPS)]
    run.losses.extend(enumerate(losses, start=1))
    run.step = len(losses)
    evidence = Evidence("the loss is 99.9 % of the first", "a fall", "loss")
    treatment = Treatment("slow_convergence", "match_updates", 250, None, evidence)
    history = History()
    history.treatments.append(treatment)
    newer: Any = SimpleNamespace(severity=Severity.CAUTION, evidence=replace(evidence, value=0.99))
    unused: Any = Mock()
    Verdicts(run, unused, history, unused, None).judge({"slow_convergence": newer})
    assert bool(treatment.ended) == ends


@pytest.mark.parametrize("hard", [True, False])
def test_the_scripts_own_rate_is_not_lowered_where_a_rewind_was_taken_back(hard: bool) -> None:
    run = Run(Fault())
    with esper.attach(run.model, run.optimizer, mode="supervised", server="") as session:
        run.train(30, session)
        receipt = session.remedy("rewind", factor=0.1)
        ended = "kept, because it is over"
        rewound = Treatment("dying_relu", "rewind", 30, receipt, None, ended=ended)
        settling = Settling()
        assert settling.next_step([rewound]) < math.inf
        session.undo(receipt, hard=hard)
        assert settling.next_step([rewound]) == math.inf


def test_in_supervised_mode_a_person_decides() -> None:
    run = Run(FAULTS["three batches are not numbers"])
    with esper.attach(run.model, run.optimizer, mode="supervised", server="") as session:
        run.train(230, session)
        (proposal,) = session.proposed_remedies
        assert (proposal.remedy, proposal.finding) == ("rewind", "non_finite")
        assert "a person decides" in str(proposal)
        assert session.remedies == ()
        session.approve(proposal)
        with pytest.raises(ValueError, match="not waiting any more"):
            session.approve(proposal)
        losses = run.train(50, session)
        assert all(loss == loss for loss in losses)
        assert session.proposed_remedies == ()


def test_a_loss_that_is_not_finite_after_a_jump_of_the_rate_goes_back_before_the_jump() -> None:
    """The losses in between look usual; going on with the new rate would end the same way."""
    fault = Fault(before=jump, batch=lambda step, x: x * float("nan") if step >= 225 else x)
    run = Run(fault)
    with esper.attach(run.model, run.optimizer, mode="supervised", server="") as session:
        run.train(230, session)
        (asked,) = session.proposed_remedies
    assert asked.findings == ("rate_jump", "non_finite")
    assert asked.config["factor"] == pytest.approx(0.01)
    assert asked.config["step"] <= 201


@pytest.mark.parametrize("approves", [True, False])
def test_one_rewind_is_proposed_once_however_many_findings_ask_for_it(approves: bool) -> None:
    fault = Fault(before=jump, batch=lambda step, x: x * float("nan") if step == 225 else x)
    run = Run(fault)
    with esper.attach(run.model, run.optimizer, mode="supervised", server="") as session:
        run.train(230, session)
        (asked,) = session.proposed_remedies
        assert all(name in str(asked) for name in ("rewind", *map(title_of, asked.findings)))
        if approves:
            session.approve(asked)
        else:
            session.reject(asked)
        losses = run.train(15, session)
        assert all(entry.remedy != "rewind" for entry in session.proposed_remedies)
        assert len(session.remedies) == approves
        if approves:
            assert max(losses) < 1
            run.train(40, session)
            assert {found.slug for found in session.findings()}.isdisjoint(asked.findings)


def test_what_a_person_rejected_is_not_proposed_again() -> None:
    run = Run(FAULTS["three batches are not numbers"])
    with esper.attach(run.model, run.optimizer, mode="supervised", server="") as session:
        run.train(210, session)
        (proposal,) = session.proposed_remedies
        session.reject(proposal)
        run.train(20, session)
        assert all(entry.remedy != "rewind" for entry in session.proposed_remedies)
        assert session.remedies == ()


def test_observing_says_what_would_be_done_and_does_nothing() -> None:
    fault = FAULTS["the rate jumps"]
    alone, run = Run(fault), Run(fault)
    expected = alone.train(260)
    run = Run(fault)
    with esper.attach(run.model, run.optimizer, mode="observe", server="") as session:
        assert run.train(260, session) == expected
        assert any("only observes" in str(entry) for entry in session.proposed_remedies)
        assert session.remedies == ()


def test_a_fault_that_comes_back_again_and_again_is_left_to_a_person() -> None:
    """Bad data without end: restoring for ever would be worse than nothing."""

    def poison(step: int, x: Tensor) -> Tensor:
        return x * float("nan") if step > 60 and step % 40 < 2 else x

    def spoil(step: int, optimizer: torch.optim.Optimizer) -> None:
        if step > 60 and step % 40 == 2:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    group["params"][0].fill_(float("nan"))

    run = Run(Fault(batch=poison, before=spoil))
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        run.train(600, session)
        rewound = [receipt for receipt in session.remedies if receipt.remedy == "rewind"]
        assert len(rewound) <= BY_RULE
        assert any("came back" in str(entry) for entry in session.proposed_remedies)


def test_dead_units_are_recycled_where_nothing_sudden_killed_them() -> None:
    def push(step: int, _: torch.optim.Optimizer) -> None:
        if 100 <= step < 255:  # one unit of the second layer after the other, until two are left
            with torch.no_grad():
                run.model.get_parameter("2.bias")[: (step - 100) // 5] = -100.0

    run = Run(Fault(rate=0.05, momentum=0.0, before=push))
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        before = run.train(300, session)
        while run.steps < 3000 and not session.remedies:
            run.train(20, session)
        assert [(r.remedy, r.layer) for r in session.remedies] == [("recycle", "2")]
        assert (torch.relu(run.model[:3](run.x)).amax(0) > 0).all()
        assert run.train(600, session)[-1] < before[-1] / 2


@pytest.mark.parametrize("grafted", [False, True])
def test_the_loss_of_earlier_weights_is_no_jump(grafted: bool) -> None:
    """They are as good as they were then: neither a remedy nor the guard of a graft answers."""
    run = Run(Fault())
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        losses = run.train(5, session)
        if grafted:
            session.graft("2", "proj_ia3")
        losses += run.train(185, session)
        states = session._parts.surgery.states
        assert states is not None
        back_to = next(step for step in states.steps if step > 10)
        assert losses[back_to] > 4 * max(losses[-20:])  # a jump by all measures
        asked = session.remedy("rewind", step=back_to)
        run.train(60, session)
        assert session.remedies == (asked,)
        assert session.findings() == []
        assert len(session.adaptations) == grafted


def test_a_young_run_that_has_learned_nothing_begins_anew_when_units_die() -> None:
    """Recycled, its units would die again, and it has nothing to lose."""

    def push(step: int, _: torch.optim.Optimizer) -> None:
        if step == 25:
            with torch.no_grad():
                run.model.get_parameter("2.bias").fill_(-100.0)

    run = Run(Fault(rate=0.05, momentum=0.0, before=push))
    run.y = run.y[torch.randperm(len(run.y))]
    first = [tensor.clone() for tensor in run.model.parameters()]
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        while run.steps < 100 and not session.remedies:
            run.train(1, session)
        receipt = session.remedies[0]
        assert (receipt.remedy, receipt.details["to_step"]) == ("rewind", 0)
        assert receipt.details["factor"] == GENTLE
        assert all(map(torch.equal, run.model.parameters(), first))


@pytest.mark.parametrize("seed", [0, 1])
def test_units_that_far_too_large_updates_switched_off_are_had_again(seed: int) -> None:
    """Behind a batch norm such a run learns a little, and stays far from what it could learn."""
    torch.manual_seed(seed)
    hidden = [(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(3)]
    model = nn.Sequential(*(layer for block in hidden for layer in block), nn.Linear(64, 10))
    sick = small_runs.Run(
        model,
        optimizer=lambda m: torch.optim.RMSprop(m.parameters(), 0.3),
        mode="automatic",
        steps=300,
    )
    with sick.start() as session:
        losses = sick.train(session).losses
        first = session.remedies[0]
    assert first.remedy == "rewind"
    assert first.details["to_step"] == 0
    assert sum(losses[-20:]) / 20 < 0.3


@pytest.mark.parametrize(
    ("slug", "now"), [("dying_relu", 0.7), ("saturation", 0.5), ("vanishing_gradient", 0.5)]
)
def test_layers_that_far_too_large_updates_have_blocked_get_their_first_weights(
    slug: str, now: float
) -> None:
    """New scales would give up as much, and leave the rate as it is."""
    run = RunState("run", RunMode.AUTOMATIC, SafetyPolicy(), None, step=35)
    run.losses.extend(enumerate([*[1.1] * 5, *[0.4] * 10, *[now] * 20], 1))
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.3)
    watch: Any = SimpleNamespace(
        update_excess=2 * EXCESSIVE, guessing_loss=math.log(3), optimizers=(optimizer,)
    )
    watch.diagnosis = SimpleNamespace(open=())
    history = History()
    ladder = Ladder(run, watch, history, YoungRun(run, watch, history))
    rule = get_rule(slug)
    found: Any = SimpleNamespace(
        rule=rule, remedies=rule.remedies, severity=rule.severity, since_step=50
    )
    assert ladder.order(found)[0] == "rewind"
    watch.update_excess = 1.0
    assert ladder.order(found)[0] != "rewind"


@pytest.mark.parametrize("last", [0.3, 2.2])
def test_a_run_that_has_learned_is_not_taken_for_one_that_can_begin_anew(last: float) -> None:
    run = RunState("run", RunMode.AUTOMATIC, SafetyPolicy(), None, step=39)
    falling = [2.3 + (last - 2.3) * step / 35 for step in range(1, 36)]
    run.losses.extend(enumerate([*falling, last, 1.9, 2.0, 2.1], 1))
    watch = SimpleNamespace(update_excess=2 * EXCESSIVE, guessing_loss=math.nan)
    young = YoungRun(run, watch, History())  # type: ignore[arg-type]
    assert young.is_early is young.was_hurt is (last > 1.0)


@pytest.mark.parametrize("now", [0.4, 2.4])
def test_a_hurt_run_that_has_lost_what_it_learned_can_begin_anew(now: float) -> None:
    run = RunState("run", RunMode.AUTOMATIC, SafetyPolicy(), None, step=80)
    run.losses.extend(enumerate([*[2.3] * 10, *[0.3] * 40, *[now] * 30], 1))
    watch = SimpleNamespace(update_excess=2 * EXCESSIVE, guessing_loss=math.log(10))
    young = YoungRun(run, watch, History())  # type: ignore[arg-type]
    assert young.was_hurt is (now > 2.0)
    watch.update_excess = 1.0
    assert not young.was_hurt


@pytest.mark.parametrize(("last", "nothing"), [(1.1, True), (0.4, False)])
def test_a_run_that_comes_down_to_guessing_has_learned_nothing(last: float, nothing: bool) -> None:
    """Its first losses are those of weights that were far too large."""
    run = RunState("run", RunMode.AUTOMATIC, SafetyPolicy(), None, step=45)
    run.losses.extend(enumerate([*[300.0] * 10, *[last] * 35], 1))
    watch = SimpleNamespace(update_excess=2 * EXCESSIVE, guessing_loss=math.log(3))
    young = YoungRun(run, watch, History())  # type: ignore[arg-type]
    assert young.is_early is young.was_hurt is young.loses_nothing is young.guesses is nothing
    assert young.has_learned is not nothing


def test_units_that_die_late_in_a_run_that_guesses_are_scaled_anew() -> None:
    """Recycled, they would have dead ones behind them; and there is nothing to lose."""

    class Late(DyingRelu):
        explained_by = frozenset()

        def check(self, observation: Observation, _: Memory) -> Evidence | None:
            found = Evidence("a layer is dead", "none", "grad", 1.0, "2")
            return found if observation.step > 210 else None

    run = Run(Fault(rate=0.05, momentum=0.0))
    run.y = run.y[torch.randperm(len(run.y))]
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        watch = session._parts.diagnosis
        assert watch is not None
        watch.diagnosis = Diagnosis([Late()])
        run.train(200, session)
        with torch.no_grad():
            run.model.get_parameter("2.bias").fill_(-100.0)
        while run.steps < 500 and not session.remedies:
            run.train(1, session)
        assert session.remedies[0].remedy == "repair_scale"
        assert float((run.model[:4](run.x[:200]) > 0).float().mean()) > 0.2


def test_why_and_the_summary_say_what_is_proposed_and_what_is_tried() -> None:
    run = Run(FAULTS["three batches are not numbers"])
    with esper.attach(run.model, run.optimizer, mode="supervised", server="") as session:
        run.train(210, session)
        (proposal,) = session.proposed_remedies
        line = f"Proposed: {proposal}. Answer with session.approve or session.reject."
        assert line in session.why()
        assert str(proposal) in str(session)
        receipt = session.approve(proposal)
        why = f"{receipt} was applied at step 210 because of “NaN or infinite values”"
        assert f"{why}, and is being tried." in session.why()


def test_a_run_has_a_budget_of_remedies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("esper.sdk.remedy_loop.approval.BUDGET", 0)
    run = Run(FAULTS["three batches are not numbers"])
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        run.train(210, session)
        assert session.remedies == ()
        (proposal,) = session.proposed_remedies
        assert "0 remedies were applied in the last 10,000 steps" in str(proposal)


def test_a_run_whose_remedies_all_fail_ends_no_worse_than_where_they_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fault that never ends, and remedies that do damage from which the run does not recover."""

    class Endless(PlateauRule):
        slug, opens_after, explained_by = "plateau", 1, frozenset()

        def check(self, observation: Observation, _: Memory) -> Evidence | None:
            if observation.step < 100:
                return None
            return Evidence("a fault that never ends", "none", "grad", float(observation.step))

    run = Run(Fault(momentum=0.0))
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        watch = session._parts.diagnosis
        assert watch is not None
        watch.diagnosis = Diagnosis([Endless()])
        real, at = session._parts.surgery.remedies.apply, []

        def spoil(slug: str, layer: str, sample: object, config: Any, *rest: object) -> object:
            at.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
            receipt = real(slug, layer, sample, config, *rest)
            if config.get("step") != MARKED:
                with torch.no_grad():
                    for parameter in run.model.parameters():
                        parameter.add_(torch.randn_like(parameter))
                run.optimizer.param_groups[0]["lr"] = 1e-9
            else:
                back = dict(run.model.named_parameters())
                assert all(torch.equal(back[name], first) for name, first in at[0].items())
            return receipt

        monkeypatch.setattr(session._parts.surgery.remedies, "apply", spoil)
        before = run.train(100, session)
        after = run.train(300, session)
        assert max(after) > 2 * max(before[80:100])
        assert sum(after[-10:]) / 10 <= 1.1 * sum(before[80:100]) / 20
        assert session._parts.remedies is not None
        assert any("none helped" in entry.ended for entry in session._parts.remedies.treatments)


@pytest.mark.parametrize("remedy", [RemedySlug.REPAIR_SCALE, RemedySlug.SET_LR, RemedySlug.REWIND])
@pytest.mark.parametrize("harmful", [True, False])
def test_a_remedy_that_ends_its_finding_and_leaves_the_run_worse_is_taken_back(
    monkeypatch: pytest.MonkeyPatch, remedy: RemedySlug, *, harmful: bool
) -> None:
    """A finding that is over by itself says nothing of what the remedy did to the run."""

    class Passing(PlateauRule):
        slug, opens_after, closes_after, explained_by = "plateau", 1, 1, frozenset()
        remedies = (remedy,)

        def check(self, observation: Observation, _: Memory) -> Evidence | None:
            if not 100 <= observation.step <= 110:
                return None
            return Evidence("a fault that passes", "none", "grad", float(observation.step))

    run = Run(Fault(rate=1e-2, momentum=0.0))
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        watch, loop = session._parts.diagnosis, session._parts.remedies
        assert watch is not None
        assert loop is not None
        watch.diagnosis = Diagnosis([Passing()])
        real, at, rates = session._parts.surgery.remedies.apply, [], []

        def spoil(slug: str, layer: str, sample: object, config: Any, *rest: object) -> object:
            at.append([p.detach().clone() for p in run.model.parameters()])
            receipt = real(slug, layer, sample, config, *rest)
            if config.get("step") == MARKED:
                assert all(map(torch.equal, run.model.parameters(), at[0]))
            elif harmful:
                with torch.no_grad():
                    for parameter in run.model.parameters():
                        parameter.add_(torch.randn_like(parameter))
                run.optimizer.param_groups[0]["lr"] = 1e-9
            return receipt

        monkeypatch.setattr(session._parts.surgery.remedies, "apply", spoil)
        monkeypatch.setattr("esper.sdk.remedy_loop.losses.fell", lambda *_: False)
        before = run.train(100, session)
        run.train(200, session)
        given, *later = [t for t in loop.treatments if t.remedy != "match_updates"]
        assert given.remedy == remedy
        assert given.ended.startswith("kept")
        assert [entry.remedy for entry in later] == (["rewind"] if harmful else [])
        run.optimizer.register_step_pre_hook(
            lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
        )
        last = run.train(20, session)
    if harmful:
        assert "the loss higher than before" in later[0].ended
        assert max(last) < 1.5 * max(before[80:])
        assert rates[0] == 1e-9  # the script's own, not a multiple


@pytest.mark.parametrize(("rate", "far_too_large"), [(0.2, True), (3e-3, False)])
def test_a_rate_at_which_updates_were_far_too_large_stays_lowered(
    rate: float, far_too_large: bool
) -> None:
    """Whatever becomes of the finding: each later remedy would fail at the script's rate."""

    class Endless(DyingRelu):
        explained_by = frozenset()

        def check(self, observation: Observation, _: Memory) -> Evidence | None:
            return Evidence("a layer is dead", "none", "grad", float(observation.step), "2")

    run = Run(Fault(rate=rate, adam=True))
    rates: list[float] = []
    lowers = {"rewind", "set_lr"}
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        loop, watch = session._parts.remedies, session._parts.diagnosis
        assert loop is not None
        assert watch is not None
        watch.diagnosis = Diagnosis([Endless()])
        while not (ended := [t for t in loop.treatments if t.remedy in lowers and t.ended]):
            run.train(1, session)
            assert run.steps < 400
        assert ended[0].ended.startswith(IN_VAIN)
        run.optimizer.register_step_pre_hook(
            lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
        )
        run.train(3, session)
        assert (max(rates) <= 0.1 * rate) == far_too_large
        assert run.optimizer.param_groups[0]["lr"] == rate


@pytest.mark.parametrize("learns", [True, False])
def test_the_weights_of_a_run_that_has_learned_get_no_new_scale(learns: bool) -> None:
    class Late(VanishingGradient):
        opens_after, explained_by = 1, frozenset()

        def check(self, observation: Observation, _: Memory) -> Evidence | None:
            found = Evidence("the gradient vanishes", "none", "grad_norm", 1e-9, "0")
            return found if observation.step >= 100 else None

    run = Run(Fault())
    if not learns:
        run.y = run.y[torch.randperm(len(run.y))]
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        watch = session._parts.diagnosis
        assert watch is not None
        watch.diagnosis = Diagnosis([Late()])
        run.train(240, session)
        assert [f.slug for f in session.findings()] == ["vanishing_gradient"]
        assert [r.remedy for r in session.remedies] == ([] if learns else ["repair_scale"])


def test_a_gradient_that_is_lost_between_two_numbers_is_told_and_left_alone() -> None:
    """Whatever the weights are, LayerNorm makes 1 and -1 of two numbers."""
    torch.manual_seed(0)
    layers = [nn.Linear(13, 2), nn.LayerNorm(2), nn.SiLU(), nn.Linear(2, 2), nn.LayerNorm(2)]
    model = nn.Sequential(*layers, nn.SiLU(), nn.Linear(2, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(200, 13)[:32], torch.randint(0, 3, (200,))[:32]
    with esper.attach(model, optimizer, mode="automatic", server="") as session:
        for _ in range(30):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
        found = {finding.slug: finding for finding in session.findings()}
        assert "LayerNorm over two numbers" in found["vanishing_gradient"].remedy
        assert not session.remedies


def test_over_fitting_takes_no_run_back_by_rule() -> None:
    """The training loss swings; the held-out loss is what is wrong."""
    run = Run(Fault())
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        run.train(60, session)
        loop = session._parts.remedies
        assert loop is not None
        for slug, goes_back in (("over_fitting", False), ("update_ratio_high", True)):
            rule = next(rule for rule in list_rules() if rule.slug == slug)
            case = loop.history.case_of(slug)
            case.given["any"], case.level = 1, 1e-6
            found = SimpleNamespace(rule=rule)
            assert loop.way_back.is_needed(found) is goes_back  # type: ignore[arg-type]


def test_a_remedy_that_cannot_be_applied_is_not_tried_again_in_each_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(FAULTS["three batches are not numbers"])
    with esper.attach(run.model, run.optimizer, mode="automatic", server="") as session:
        tried: list[str] = []

        def refuse(slug: str, *_: object) -> None:
            tried.append(slug)
            raise GraftError("no room", layer="")

        monkeypatch.setattr(session._parts.surgery.remedies, "apply", refuse)
        run.train(230, session)
        assert tried.count("rewind") == 1
        assert "rewind cannot answer “NaN or infinite values”: no room." in str(session.why())


def test_every_finding_is_answered_by_remedies_that_exist() -> None:
    known = {remedy.slug for remedy in list_remedies()}
    others = {RemedySlug.TELL, RemedySlug.ADAPTER, RemedySlug.SPAN, RemedySlug.BLOCK}
    for rule in list_rules():
        assert set(rule.remedies) - others <= known
    only_people_ask = {"checkpoint_now", "evaluate_now"}
    assert set(RemedySlug) - others == known - only_people_ask


def test_a_tensor_that_no_optimizer_holds_is_no_reason_to_rewind() -> None:
    """Also where the first updates were large: they have nothing to do with it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model[:4].parameters(), lr=3e-2)
    with esper.attach(model, optimizer, mode="supervised", verbose=False) as session:
        for _ in range(15):
            x = torch.randn(32, 8)
            loss = (model(x) - (x[:, :4] > 0).float()).pow(2).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
        proposed = [p.remedy for p in session.proposed_remedies if p.finding == "not_held"]
    assert proposed == ["adopt"]


class Shared(nn.Module):
    """One layer in three places, on purpose."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(8, 8)
        self.layers = nn.ModuleList([layer, nn.ReLU(), layer, layer, nn.Linear(8, 4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_how_a_script_is_written_is_no_reason_to_rewind() -> None:
    """Also where the first updates were large, as three for one layer are."""
    losses = []
    for mode in ("", "automatic"):
        torch.manual_seed(0)
        model, x, y = Shared(), torch.randn(16, 8), torch.randint(4, (16,))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        options: dict[str, Any] = {"run": "shared", "mode": mode, "verbose": False}
        session = esper.attach(model, optimizer, **options) if mode else None
        for _ in range(40):
            loss = nn.functional.cross_entropy(model(x), y)
            losses.append(loss.item())
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if session is not None:
                session.step(loss)

    assert session is not None
    assert "is the same object as" in str(session.findings())
    assert losses[:40] == losses[40:]


class Branched(nn.Module):
    """What the frozen zero branch would add is nothing; the other one learns."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.none = nn.Linear(8, 16), nn.Linear(8, 16)
        self.last = nn.Linear(16, 4)
        for parameter in self.none.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.relu(self.one(x) + self.none(x)))
        return out


@pytest.mark.parametrize("rate", [1e-3, 0.3])
def test_what_is_frozen_is_no_reason_to_rewind(rate: float) -> None:
    """Whatever the first updates were: a lower rate thaws nothing."""
    torch.manual_seed(0)
    model, x = Branched(), torch.randn(256, 8)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    with esper.attach(model, optimizer, mode="automatic", server="", verbose=False) as session:
        for _ in range(60):
            loss = F.cross_entropy(model(x), x[:, :4].argmax(1))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            session.step(loss)
        remedies = session._parts.remedies
        assert remedies is not None
        answers = {t.remedy for t in remedies.treatments if t.finding == "frozen_part"}
        assert answers <= {"thaw"}
