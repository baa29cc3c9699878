"""Remedies that are not growth: each changes what it says, and is undone to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import esper
from esper.contracts import AdaptationState
from esper.exceptions import ConfigurationError, GraftError, UndoError, UnknownLayerError
from esper.grafting import RemedyReceipt, Surroundings, companions_of, digest
from esper.grafting.surroundings import BARE
from esper.remedies import Batch, Target, apply_remedy, get_remedy
from tests.esper.sdk.normed_training import NormedTraining
from tests.esper.sdk.test_resuming import saved_and_loaded
from tests.esper.sdk.tiny_training import Training


def kill_units(training: Training, *units: int) -> None:
    """As if their bias had been pushed so low that ReLU never lets them through."""
    with torch.no_grad():
        training.model.get_parameter("0.bias")[list(units)] = -100.0


def sample() -> torch.Tensor:
    return torch.randn(64, 8, generator=torch.Generator().manual_seed(3))


def merge_a_kept_graft(session: esper.Session) -> RemedyReceipt:
    kept = session.adaptations[0]
    kept.state = AdaptationState.KEPT
    assert kept.receipt is not None
    return session.merge(kept.receipt)


ALL: dict[str, Callable[[esper.Session], RemedyReceipt]] = {
    "recycle": lambda session: session.recycle("0", "3", sample()),
    "set_lr": lambda session: session.set_lr("3", 0.1),
    "freeze": lambda session: session.freeze("3"),
    "merge": merge_a_kept_graft,
}


@pytest.mark.parametrize("remedy", ALL.values(), ids=ALL.keys())
def test_a_remedy_is_undone_as_if_it_never_had_been(
    remedy: Callable[[esper.Session], RemedyReceipt],
) -> None:
    def start() -> tuple[Training, esper.Session]:
        training = Training()
        session = esper.attach(training.model, training.optimizer, scheduler=training.scheduler)
        training.run(5, session)
        session.graft("5", "proj_ia3")
        kill_units(training, 2, 7)
        training.run(5, session)
        return training, session

    alone, watched = start()
    expected = alone.run(20, watched)
    training, session = start()
    receipt = remedy(session)
    assert session.remedies == (receipt,)
    assert receipt.step == 10
    assert session.findings() == []
    training.run(6, session)
    report = session.undo(receipt)
    assert report.exact
    assert report.digest == receipt.digest_before
    assert session.remedies == ()
    assert training.run(20, session) == expected
    assert session.findings() == []
    with pytest.raises(UndoError):
        session.undo(receipt)


def test_dead_units_start_anew_without_a_change_of_the_output(training: Training) -> None:
    kill_units(training, 2, 7)
    training.run(3)
    model, x = training.model.eval(), sample()
    before = model(x)
    target = Target(model, Surroundings([training.optimizer]), "0", sample=Batch.of(x))
    receipt = apply_remedy(get_remedy("recycle"), target, {"next_layer": "3"})
    assert receipt.details["units"] == [2, 7]
    assert receipt.details["max_abs_diff"] == 0.0
    assert torch.equal(model(x), before)
    moments = training.optimizer.state[model.get_parameter("0.weight")]["exp_avg"]
    assert not moments[[2, 7]].any()
    assert moments.any()
    assert (torch.relu(model.get_submodule("0")(x)).mean(0)[[2, 7]] > 0).all()
    model.train()
    training.run(2)
    assert model.get_parameter("3.weight")[:, [2, 7]].all()  # read again
    assert receipt.digest_before != receipt.digest_after


class Skipping(nn.Module):
    """What reads ``wide`` besides ``narrow`` is not to be seen from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.wide(x))
        return h + self.narrow(h)


def test_units_that_something_else_reads_are_left_alone() -> None:
    torch.manual_seed(0)
    model = Skipping()
    with torch.no_grad():
        model.wide.bias[3] = -100.0
    before = digest(model)
    target = Target(model, BARE, "wide", sample=Batch.of(sample()))
    with pytest.raises(GraftError, match="reads its units"):
        apply_remedy(get_remedy("recycle"), target, {"next_layer": "narrow"})
    assert digest(model) == before


def test_what_cannot_be_remedied_is_refused_and_nothing_is_touched(training: Training) -> None:
    session = esper.attach(training.model, training.optimizer, scheduler=training.scheduler)
    training.run(3, session)
    receipt = session.graft("3", "mlp_gelu_2048")
    before, companions = digest(training.model), companions_of(training.optimizer)
    wrong: list[tuple[type[Exception], Callable[[], object]]] = [
        (GraftError, lambda: session.recycle("0", "3", sample())),  # none is dead
        (GraftError, lambda: session.recycle("0", "5", sample())),  # not the next one
        (GraftError, lambda: session.recycle("1", "3", sample())),  # a ReLU
        (UnknownLayerError, lambda: session.freeze("nowhere")),
        (GraftError, lambda: session.freeze("1")),
        (GraftError, lambda: session.unfreeze("3")),
        (ConfigurationError, lambda: session.set_lr("3", 0.0)),
        (ConfigurationError, lambda: session.set_lr("3", float("nan"))),
        (ConfigurationError, lambda: session.merge(receipt)),  # on probation
    ]
    for error, act in wrong:
        with pytest.raises(error):
            act()
    session.adaptations[0].state = AdaptationState.KEPT
    with pytest.raises(GraftError, match="cannot be merged"):
        session.merge(receipt)
    assert (digest(training.model), companions_of(training.optimizer)) == (before, companions)
    assert session.remedies == ()


def test_a_frozen_layer_stands_still_and_moves_again(training: Training) -> None:
    session = esper.attach(training.model, training.optimizer, scheduler=training.scheduler)
    training.run(3, session)
    session.freeze("3")
    weight = training.model.get_parameter("3.weight")
    still = weight.detach().clone()
    training.run(3, session)
    assert torch.equal(weight, still)
    assert session.findings() == []
    session.unfreeze("3")
    training.run(3, session)
    assert not torch.equal(weight, still)
    assert session.findings() == []


def test_a_merged_graft_costs_nothing_and_computes_the_same(training: Training) -> None:
    session = esper.attach(training.model, training.optimizer, scheduler=training.scheduler)
    training.run(3, session)
    receipt = session.graft("3", "proj_lora_64")
    training.run(20, session)
    model, x = training.model, sample()
    expected = model.eval()(x)
    done = merge_a_kept_graft(session)
    assert not receipt.present
    assert (model(x) - expected).abs().max().item() <= 1e-6
    assert 0.0 <= done.details["max_abs_diff"] <= done.details["limit"]
    assert companions_of(training.optimizer) == ()
    assert session.adaptations[0].merged
    with pytest.raises(UndoError):
        session.undo(receipt)


def test_a_hard_undo_of_an_older_graft_takes_later_remedies_along(training: Training) -> None:
    session = esper.attach(training.model, training.optimizer, scheduler=training.scheduler)
    training.run(3, session)
    merged_one = session.graft("3", "proj_lora_64")
    training.run(3, session)
    older = session.graft("0", "proj_ia3")
    before = older.digest_before
    training.run(3, session)
    merge_a_kept_graft(session)
    session.set_lr("5", 0.1)
    training.run(3, session)
    assert session.undo(older).digest == before
    assert session.remedies == ()
    assert merged_one.present  # the weights are again without it
    assert not session.adaptations[0].merged
    assert len(companions_of(training.optimizer)) == 1
    training.run(3, session)


def test_a_pruned_graft_is_out_for_good(training: Training) -> None:
    session = esper.attach(training.model, training.optimizer, scheduler=training.scheduler)
    training.run(3, session)
    pruned = session.graft("3", "proj_lora_64")
    training.run(3, session)
    later = session.graft("0", "proj_ia3")
    training.run(3, session)
    assert session.prune(pruned).hard is False
    assert session.adaptations[0].state is AdaptationState.REVERTED
    session.undo(later)
    assert not pruned.present
    with pytest.raises(UndoError):
        session.prune(pruned)


def test_remedies_outlive_a_restart_to_the_bit() -> None:
    training = NormedTraining()
    session = training.attach()
    training.run(5, session)
    session.set_lr("4", 0.1)
    session.freeze("0")
    session.graft("6", "proj_lora_64")
    session.graft("4", "proj_ia3")
    training.run(5, session)
    merge_a_kept_graft(session)
    training.run(5, session)
    saved = saved_and_loaded(training, session)
    expected, end = training.run(20, session), digest(training.model)
    later = NormedTraining(seed=5)
    resumed = later.resume(saved)
    assert [receipt.remedy for receipt in resumed.remedies] == ["set_lr", "freeze"]
    assert later.run(20, resumed) == expected
    assert digest(later.model) == end
    assert resumed.findings() == []
