"""Remedies on a model of fully_shard: those that act on updates work on each rank's parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from esper.exceptions import EsperError
from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.sharded_models import make
from tests.esper.distributed.test_sharded_grafts import agree, attach, own, state

pytestmark = pytest.mark.process

REMEDIES: dict[str, Callable[[Any], Any]] = {
    "set_lr": lambda session: session.remedy("set_lr", factor=0.1),
    "set_lr of a layer": lambda session: session.remedy("set_lr", "fc1", factor=0.1),
    "weight_decay": lambda session: session.remedy("weight_decay", value=0.5),
    "clip_layer": lambda session: session.remedy("clip_layer", factor=0.01, decay=0.5),
    "skip_update": lambda session: session.remedy("skip_update"),
    "stop_early": lambda session: session.remedy("stop_early"),
}
REFUSED: dict[str, Callable[[Any], Any]] = {
    "thaw": lambda session: session.remedy("thaw", "fc1"),
    "rewind": lambda session: session.remedy("rewind"),
    "repair_scale": lambda session: session.remedy("repair_scale", sample=torch.zeros(2, 8)),
    "freeze": lambda session: session.freeze("fc1"),
}


def _act(rank: int, remedy: str) -> None:
    side, bare = make("mlp", "fsdp2", rank, 2), make("mlp", "fsdp2", rank, 2)
    alone = make("mlp", None, rank, 2)
    with attach(side) as session, attach(alone) as other:
        for at in range(4):
            side.step(at, session)
            alone.step(at, other)
            bare.step(at)
        before = state(side)
        receipt = REMEDIES[remedy](session)
        REMEDIES[remedy](other)
        for at in range(4, 8):
            if remedy == "skip_update" and at == 5:
                _spoil_on_one_rank(side, rank)
                _spoil(alone)
            side.step(at, session)
            alone.step(at, other)
        pairs = zip(side.model.parameters(), alone.model.parameters(), strict=True)
        for mine, whole in pairs:
            torch.testing.assert_close(mine.full_tensor(), whole.detach(), rtol=2e-3, atol=2e-5)
        if remedy == "skip_update":
            assert receipt.details["skipped"] == 1
        if remedy == "stop_early":
            assert session.should_stop
        assert session.undo(receipt).exact
        assert state(side) == before
        for at in range(4, 6):
            side.step(at, session)
            bare.step(at)
        assert side.losses[-2:] == bare.losses[-2:]


def _spoil(side: Any) -> None:
    """The first gradient of the next step is infinite in one place."""
    first = next(iter(side.model.parameters()))

    todo = [first]

    def spoil(optimizer: Any, args: Any, kwargs: Any) -> None:
        if todo:
            own(todo.pop().grad).view(-1)[:1] = float("inf")

    hooks = side.optimizer._optimizer_step_pre_hooks
    handle = side.optimizer.register_step_pre_hook(spoil)
    hooks.move_to_end(handle.id, last=False)


def _spoil_on_one_rank(side: Any, rank: int) -> None:
    if rank == 0:
        _spoil(side)


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_remedy_acts_on_parts_as_on_whole_tensors(two_ranks: RankPool, remedy: str) -> None:
    two_ranks.run(_act, remedy)


def _refuse(rank: int) -> list[str]:
    side = make("mlp", "fsdp2", rank, 2)
    said = []
    with attach(side, mode="supervised") as session:
        for at in range(3):
            side.step(at, session)
        before = state(side)
        for act in REFUSED.values():
            with pytest.raises(EsperError) as refused:
                act(session)
            said.append(str(refused.value))
        assert agree(state(side) == before)
        side.step(3, session)
    return said


def test_what_needs_whole_tensors_is_refused_at_the_act(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(_refuse)
    assert first == second
    for sentence in first:
        assert "this changes whole ones" in sentence
        assert "set_lr" in sentence
