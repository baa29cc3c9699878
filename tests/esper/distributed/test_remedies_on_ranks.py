"""What else changes a model on several ranks: remedies, running averages, checkpoints, routers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esper.contracts import AdaptationState
from esper.exceptions import (
    ConfigurationError,
    EsperError,
    IncompatibleLayerError,
    ReplicaError,
)
from esper.grafting import RemedyReceipt
from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.test_failing_ranks import Boom, break_once
from tests.esper.distributed.tiny_replica import Replica, graft, replica

pytestmark = pytest.mark.process

REMEDIES: dict[str, Callable[[Replica], RemedyReceipt]] = {
    "set_lr": lambda side: side.session.set_lr("inner", 0.5),
    "freeze": lambda side: side.session.freeze("inner"),
    "unfreeze": lambda side: side.session.unfreeze("outer"),
    "merge": lambda side: side.session.merge(kept(side)),
    "stop_early": lambda side: side.session.remedy("stop_early", restore_best=False),
}


def kept(side: Replica) -> Any:
    (entry,) = side.session.adaptations
    return entry.receipt


def prepare(side: Replica, remedy: str) -> None:
    """What the remedy needs, done alike on all ranks."""
    side.run(2)
    if remedy == "merge":
        graft(side)
        side.run(3)
        if side.rank == 0:  # the verdict is rank 0's
            side.session.adaptations[0].state = AdaptationState.KEPT
    if remedy == "unfreeze":
        side.session.freeze("outer")
        side.run(1)


def _remedy_and_undo(rank: int, remedy: str) -> list[str]:
    with replica(rank, dropout=0.2) as side:
        prepare(side, remedy)
        before = side.state()
        receipt = REMEDIES[remedy](side)
        side.run(5)
        with_it = side.parameters()
        assert side.session.remedies[-1:] == (receipt,)
        side.session.undo(receipt)
        assert side.state() == before
        side.run(5)
        return [with_it, side.parameters()]


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_remedy_is_given_and_undone_on_all_ranks(two_ranks: RankPool, remedy: str) -> None:
    lead, other = two_ranks.run(_remedy_and_undo, remedy)
    assert lead == other


def _fail_in_a_remedy(rank: int, remedy: str, undo: bool) -> str:
    with replica(rank, dropout=0.2) as side:
        prepare(side, remedy)
        receipt = REMEDIES[remedy](side) if undo else None
        before, remedies = side.state(), side.session.remedies
        if rank == 1:
            break_once(side)
        with pytest.raises(Boom if rank == 1 else ReplicaError):
            REMEDIES[remedy](side) if receipt is None else side.session.undo(receipt)
        assert side.state() == before
        assert side.session.remedies == remedies
        if receipt is not None:
            assert receipt.can_undo_hard
            side.session.undo(receipt)
        else:
            REMEDIES[remedy](side)
        side.run(3)
        return side.parameters()


@pytest.mark.parametrize("undo", [False, True], ids=["give", "undo"])
@pytest.mark.parametrize("remedy", ["freeze", "merge"])
def test_a_remedy_that_fails_on_one_rank_is_given_on_none(
    two_ranks: RankPool, remedy: str, undo: bool
) -> None:
    lead, other = two_ranks.run(_fail_in_a_remedy, remedy, undo)
    assert lead == other


def _differ(rank: int) -> list[str]:
    said = []
    with replica(rank) as side:
        side.run(2)
        before = side.state()
        calls: list[Callable[[], object]] = [
            lambda: side.session.set_lr("inner", 0.5 + rank),
            lambda: side.session.freeze("inner" if rank else "outer"),
            lambda: side.session.merge(kept(side)),
        ]
        for call in calls[:2]:
            with pytest.raises(ReplicaError) as refused:
                call()
            said.append(str(refused.value))
            assert side.state() == before
        graft(side)
        with pytest.raises(EsperError, match="only a kept graft"):
            calls[2]()
        side.run(2)
        assert side.session.remedies == ()
        return [*said, side.parameters()]


def test_remedies_that_differ_between_ranks_are_refused_on_all(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_differ)
    assert lead == other
    assert "with the same arguments" in lead[0]


def _recycle(rank: int, same: bool) -> str:
    """A unit that never fires, and one that fires where the first input is not zero."""
    with replica(rank, norm=None, averaged=True) as side:
        side.run(2)
        with torch.no_grad():
            side.bare.inner.weight[3:5] = 0.0  # type: ignore[index]
            side.bare.inner.bias[3:5] = 0.0  # type: ignore[index]
            side.bare.inner.weight[4, 0] = 5.0  # type: ignore[index]
        before = side.state()
        sample = torch.randn(64, 7, generator=torch.Generator().manual_seed(rank))
        if same:
            receipt = side.session.recycle("inner", "outer", sample)
            assert receipt.details["units"] == [3]
        else:
            sample[:, 0] *= rank
            with pytest.raises(ReplicaError, match="checksums differ"):
                side.session.recycle("inner", "outer", sample)
            assert side.state() == before
            assert side.session.remedies == ()
        side.run(2)
        return side.parameters()


@pytest.mark.parametrize("same", [True, False])
def test_units_are_recycled_where_they_are_dead_on_all_ranks(
    two_ranks: RankPool, same: bool
) -> None:
    lead, other = two_ranks.run(_recycle, same)
    assert lead == other


def _average(rank: int) -> list[Any]:
    with replica(rank, dropout=0.2, averaged=True) as side:
        side.run(3)
        before = side.state()
        receipt = graft(side)
        side.run(3)
        names = [name for name, _ in side.average.module.named_parameters()]  # type: ignore[union-attr]
        grafted = side.parameters()
        held = side.state()
        if rank == 1:
            break_once(side)
        with pytest.raises((Boom, ReplicaError)):
            side.session.undo(receipt, hard=False)
        assert side.state() == held, "the average still has what it learnt"
        side.session.undo(receipt)
        assert side.state() == before
        side.run(3)
        return [names, grafted, side.parameters()]


def test_a_running_average_follows_on_all_ranks_and_on_the_way_back(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_average)
    assert lead == other
    assert any("proj_lora_64" in name for name in lead[0])


def _load(rank: int, wrong: str) -> str:
    with replica(rank, averaged=True) as side:
        side.run(3)
        graft(side)
        side.session.set_lr("outer", 0.5)
        side.run(2)
        state = side.session.state_dict()
    with replica(rank, averaged=True) as later:
        before = later.state()
        broken = copy.deepcopy(state)
        if rank == 1 and wrong == "weights":
            name = next(iter(broken["grafts"]))
            broken["grafts"][name] = broken["grafts"][name] + 1.0
        if rank == 1 and wrong == "shape":
            name = next(iter(broken["grafts"]))
            broken["grafts"][name] = torch.zeros(1)
        if rank == 1 and wrong == "guard":
            broken["guard"] = None
        if rank == 1 and wrong == "junk":
            broken = {"format": 7}
        with pytest.raises((ReplicaError, ConfigurationError)):
            later.session.load_state_dict(broken)
        assert later.state() == before
        assert later.session.adaptations == later.session.remedies == ()
        later.session.load_state_dict(state)
        (entry,) = later.session.adaptations
        assert entry.receipt is not None
        later.run(3)
        assert any("proj_lora_64" in name for name, _ in later.average.named_parameters())  # type: ignore[union-attr]
        later.session.undo(entry.receipt, hard=False)
        assert not any("proj_lora_64" in n for n, _ in later.average.named_parameters())  # type: ignore[union-attr]
        later.run(3)
        return later.parameters()


@pytest.mark.parametrize("wrong", ["weights", "shape", "guard", "junk"])
def test_a_state_that_one_rank_cannot_take_is_taken_by_none(
    two_ranks: RankPool, wrong: str
) -> None:
    lead, other = two_ranks.run(_load, wrong)
    assert lead == other


def _mixture(rank: int) -> str:
    with replica(rank, norm=False) as side:
        side.run(2)
        graft(side, "inner", "router_moe_auxloss")
        graft(side, "inner", "cap_fuse_hffn")
        with pytest.raises(IncompatibleLayerError, match="each rank counts only its own batch"):
            graft(side, "inner", "load_bal_ema")
        side.run(20)
        buffers = [t.item() for _, t in side.bare.named_buffers() if t.numel() == 1]
        return side.parameters() + str(buffers)


def test_routers_stay_equal_and_what_counts_its_own_batch_is_refused(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_mixture)
    assert lead == other


def _prune(rank: int) -> str:
    with replica(rank) as side:
        side.run(2)
        receipt = graft(side)
        side.run(2)
        side.session.prune(receipt)
        side.run(2)
        assert not receipt.present
        return side.parameters()


def test_a_graft_is_pruned_on_all_ranks(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_prune)
    assert lead == other


def _poisoned(rank: int) -> list[Any]:
    with replica(rank, mode="automatic") as side:
        side.run(30)
        with torch.no_grad():
            next(side.bare.parameters()).fill_(float("nan"))
        side.run(3)
        proposed = [str(entry) for entry in side.session.proposed_remedies]
        assert side.session.remedies == ()
        if rank == 0:
            with pytest.raises(ConfigurationError, match=r"call session.remedy on each"):
                side.session.approve(side.session.proposed_remedies[0])
            assert proposed[0] in str(side.session.why())
        receipt = side.session.remedy("rewind")
        side.run(3)
        finite = all(bool(p.isfinite().all()) for p in side.bare.parameters())
        return [proposed, receipt.details["to_step"], finite, side.parameters()]


def test_rank_0_proposes_in_words_and_all_ranks_apply_it_at_the_same_step(
    two_ranks: RankPool,
) -> None:
    lead, other = two_ranks.run(_poisoned)
    assert "On several ranks, call session.remedy with these settings on each" in lead[0][0]
    assert other[0] == []
    assert lead[1:] == other[1:]
    assert lead[2]


def _ask_whether_prepared(rank: int) -> list[bool]:
    with replica(rank) as side:
        side.run(2)
        # Each rank compiles by itself, and the second one is later.
        waits = iter([True] * (rank + 1) + [False] * 4)
        vars(side.session._parts.ahead)["waits"] = lambda *_, **__: next(waits)
        answers = []
        for _ in range(4):
            answers.append(side.session.prepare("inner", "proj_lora_64"))
            side.run(1)
        return answers


def test_all_ranks_hear_at_the_same_step_that_a_graft_is_prepared(two_ranks: RankPool) -> None:
    """Otherwise one would graft while the other trains on, and both would stop."""
    lead, other = two_ranks.run(_ask_whether_prepared)
    assert lead == other == [False, False, True, True]
