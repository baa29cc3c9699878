"""Weight decay that shrinks the weights faster than they learn is told, and a usual one is used.

One that is all that moves them is not multiplied with the rate.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.esper.diagnosis.small_runs import Run, perceptron

Make = Callable[[nn.Module], torch.optim.Optimizer]
TOO_MUCH: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=0.3),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 3e-3, weight_decay=100.0),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), 3e-3, weight_decay=3.0),
}
USUAL: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, weight_decay=1e-2),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 3e-3, weight_decay=1.0),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), 3e-3, weight_decay=1e-2),
}
# At these rates the decay takes so little of the weights that the updates are too small.
DECAYING: dict[str, Make] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 0.05, weight_decay=1e-4),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
}
# A norm of the gradients at which they move the weights by little too.
FAINT: dict[str, tuple[Make, float]] = {
    "SGD": (lambda m: torch.optim.SGD(m.parameters(), 0.05), 1e-5),
    "AdamW": (lambda m: torch.optim.AdamW(m.parameters(), 1e-3), 1e-9),
}


def run(make: Make, mode: str) -> Run:
    torch.manual_seed(0)
    return Run(perceptron(), optimizer=make, mode=mode, steps=200)


@pytest.mark.parametrize("make", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_run_that_decay_holds_down_learns_with_a_usual_one(make: Make) -> None:
    alone = run(make, "observe").go()
    sick = run(make, "automatic")
    with sick.start() as session:
        treated = sick.train(session)
        assert [receipt.remedy for receipt in session.remedies] == ["weight_decay"]
        own = {float(group["weight_decay"]) for group in sick.opt.param_groups}
        assert max(own) == max(g["weight_decay"] for g in make(perceptron()).param_groups)
    assert alone.losses[-1] > 2.0 > 1.0 > treated.losses[-1]


@pytest.mark.parametrize("make", USUAL.values(), ids=USUAL)
def test_a_strong_decay_that_lets_a_run_learn_is_left_alone(make: Make) -> None:
    healthy = run(make, "automatic")
    with healthy.start() as session:
        assert healthy.train(session).alarms() == []
        assert session.remedies == ()


def clipped(make: Make, norm: float) -> Make:
    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        made = make(model)
        made.register_step_pre_hook(
            lambda *_: nn.utils.clip_grad_norm_(model.parameters(), norm) and None
        )
        return made

    return optimizer


@pytest.mark.parametrize("make", DECAYING.values(), ids=DECAYING)
def test_a_rate_is_not_raised_where_decay_alone_moves_the_weights(make: Make) -> None:
    """A higher rate would shrink them to zero."""
    sick = run(clipped(make, 1e-12), "automatic")
    with sick.start() as session:
        told = sick.train(session)
        assert session.remedies == ()
    found = {one.slug: one for one in [*told.open, *told.resolved]}
    # Of the two, only SGD follows the size of the gradient.
    one = found.get("clipped_to_nothing") or found["update_ratio_low"]
    assert one.slug == "clipped_to_nothing" or "weight decay alone" in one.remedy
    assert one.remedies == ("tell",)
    assert told.losses == run(clipped(make, 1e-12), "observe").go().losses


@pytest.mark.parametrize(("make", "norm"), FAINT.values(), ids=FAINT)
def test_a_rate_is_raised_where_faint_gradients_move_the_weights(make: Make, norm: float) -> None:
    sick = run(clipped(make, norm), "automatic")
    with sick.start() as session:
        sick.train(session)
        assert {receipt.remedy for receipt in session.remedies} & {"set_lr", "match_updates"}
