"""Grafts into a model that trains on several ranks: all replicas, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn import functional as F

import esper
from esper.exceptions import ReplicaError
from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.tiny_replica import (
    LONG_PROBATION,
    Replica,
    TinyNet,
    batch,
    graft,
    replica,
    sgd,
)
from tests.esper.tiny_models import holds_nothing

pytestmark = pytest.mark.process


def _train_past_a_graft(rank: int, slug: str, steps: int) -> dict[str, Any]:
    with replica(rank) as side:
        side.run(3)
        receipt = graft(side, slug=slug)
        seen = []
        for _ in range(steps):
            side.step()
            seen.append(side.parameters())
        grafted = [p for n, p in side.bare.named_parameters() if ".esper." in n]
        return {
            "seen": seen,
            "moved": all(bool(p.any()) for p in grafted),
            "gradients": [p.grad.clone() for p in grafted if p.grad is not None],
            "certificate": receipt.certificate.max_abs_diff,
            "step": receipt.step,
        }


@pytest.mark.parametrize(
    ("ranks", "slug"),
    [
        ("two_ranks", "proj_lora_64"),
        pytest.param("two_ranks", "mlp_gelu_2048", marks=pytest.mark.full),
        ("three_ranks", "proj_lora_64"),
        ("four_ranks", "mlp_gelu_2048"),
    ],
)
def test_the_replicas_stay_equal_for_200_steps_after_a_graft(
    request: pytest.FixtureRequest, ranks: str, slug: str
) -> None:
    pool: RankPool = request.getfixturevalue(ranks)
    first, *others = pool.run(_train_past_a_graft, slug, 200)
    assert first["certificate"] == 0.0
    assert first["moved"]
    assert first["gradients"]
    assert others
    for other in others:
        assert first["seen"] == other["seen"]
        assert first["step"] == other["step"] == 3
        for mine, theirs in zip(first["gradients"], other["gradients"], strict=True):
            assert torch.equal(mine, theirs)


def _train_past_a_span(rank: int) -> dict[str, Any]:
    with replica(rank) as side:
        side.run(2)
        receipt = graft(side, "outer", "widen_hidden", since="inner")
        seen = []
        for _ in range(5):
            side.step()
            seen.append(side.parameters())
        gradients = [p.grad for p in receipt.graft.parameters()]
        side.session.undo(receipt)
        return {
            "seen": seen,
            "learns": all(g is not None and bool(g.any()) for g in gradients),
            "names": [name for name, _ in side.bare.named_parameters() if ".esper." in name],
        }


def test_a_graft_that_spans_layers_stays_equal_on_all_ranks(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(_train_past_a_span)
    assert first["seen"] == second["seen"]
    assert first["learns"]
    assert first["names"] == second["names"] == []


def _train_on_own_rows(rank: int, steps: int) -> dict[str, Any]:
    with replica(rank, norm=False, make_optimizer=sgd) as side:
        side.run(3)
        graft(side, slug="mlp_gelu_2048")
        side.run(steps)
        return {name: p.detach() for name, p in side.bare.named_parameters()}


def test_the_replicas_learn_what_one_process_learns_from_all_their_rows(
    two_ranks: RankPool,
) -> None:
    steps = 40
    replicated = two_ranks.run(_train_on_own_rows, steps)[0]
    torch.manual_seed(3)
    model = TinyNet(norm=False)
    optimizer = sgd(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.99**step)
    with esper.attach(model, optimizer, scheduler=scheduler, safety_policy=LONG_PROBATION) as alone:
        for at in range(3 + steps):
            x, y = (torch.cat(parts) for parts in zip(batch(0, at), batch(1, at), strict=True))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            alone.step(loss)
            if at == 2:
                alone.graft("inner", "mlp_gelu_2048")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(replicated[name], parameter.detach(), atol=1e-4, rtol=1e-4)
    assert any(".esper." in name for name in replicated)


def _undo_hard(rank: int, *, with_graft: bool) -> dict[str, Any]:
    with replica(rank, dropout=0.3) as side:
        side.run(3)
        before = side.state()
        if with_graft:
            receipt = graft(side)
            side.run(5)
            graft(side, "outer", "mlp_gelu_2048")
            side.run(5)
            changed = side.state() != before
            exact = side.session.undo(receipt).exact
            assert changed
            assert exact
            assert side.state() == before
            side.at = 3
        losses = side.run(20)
        return {"losses": losses, "parameters": side.parameters(), "state": side.state()}


def test_after_a_hard_undo_each_rank_goes_on_as_if_nothing_had_been(two_ranks: RankPool) -> None:
    untouched = two_ranks.run(_undo_hard_without)
    undone = two_ranks.run(_undo_hard_with)
    assert undone == untouched
    assert undone[0]["losses"] != undone[1]["losses"], "each rank has its own rows"
    assert undone[0]["parameters"] == undone[1]["parameters"]


def _undo_hard_with(rank: int) -> dict[str, Any]:
    return _undo_hard(rank, with_graft=True)


def _undo_hard_without(rank: int) -> dict[str, Any]:
    return _undo_hard(rank, with_graft=False)


def _undo_softly(rank: int) -> list[str]:
    with replica(rank) as side:
        side.run(3)
        receipt = graft(side)
        side.run(5)
        assert not side.session.undo(receipt, hard=False).exact
        assert len(side.optimizer.param_groups) == 1
        seen = []
        for _ in range(10):
            side.step()
            seen.append(side.parameters())
        return seen


def test_after_a_soft_undo_the_replicas_train_on_together(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(_undo_softly)
    assert first == second
    assert len(set(first)) == 10


def _meet_a_bad_loss(rank: int, bad_rank: int) -> dict[str, Any]:
    with replica(rank) as side:
        side.run(3)
        before = side.state()
        receipt = graft(side)
        side.run(4)
        side.step(loss_factor=float("nan") if rank == bad_rank else 1.0)
        return {
            "present": receipt.present,
            "restored": side.state() == before,
            "after": side.run(5) and side.parameters(),
        }


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_a_bad_loss_on_one_rank_takes_the_graft_out_on_all_in_the_same_step(
    two_ranks: RankPool, bad_rank: int
) -> None:
    first, second = two_ranks.run(_meet_a_bad_loss, bad_rank)
    for side in (first, second):
        assert not side["present"]
        assert side["restored"]
    assert first["after"] == second["after"]


def _want_different_things(rank: int) -> tuple[str, str]:
    with replica(rank) as side:
        side.run(3)
        before = side.state()
        with pytest.raises(ReplicaError) as different:
            graft(side, "inner" if rank else "outer")
        with pytest.raises(ReplicaError) as out_of_order:
            graft(side) if rank else side.session.step(0.5)
        assert holds_nothing(side.bare.inner)
        assert side.state() == before
        return str(different.value), str(out_of_order.value)


def test_ranks_that_call_different_things_get_an_error_and_do_not_hang(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(_want_different_things)
    assert first == second
    assert "must make the same calls" in first[0]
    assert "rank 0: step at step 4; rank 1: graft at step 3" in first[1]


def _train_with(rank: int, options: dict[str, Any], hook: str) -> list[str]:
    with replica(rank, ddp=options) as side:
        if hook:
            side.model.register_comm_hook(None, getattr(default_hooks, hook))
        side.run(3)
        receipt = graft(side, slug="mlp_gelu_2048")
        accumulate(side)
        side.run(6)
        seen = [side.parameters()]
        side.session.undo(receipt, hard=False)
        side.run(3)
        return [*seen, side.parameters()]


def accumulate(side: Replica) -> None:
    """One optimizer step of two backward passes, the first without a synchronisation."""
    side.optimizer.zero_grad()
    (x, y), (later_x, later_y) = side.batch(), batch(side.rank, 77)
    with side.model.no_sync():
        F.cross_entropy(side.model(x), y).backward()
    loss = F.cross_entropy(side.model(later_x), later_y)
    loss.backward()
    side.optimizer.step()
    side.scheduler.step()
    side.session.step(loss)


OPTIONS = [
    ({}, ""),
    ({"find_unused_parameters": True}, ""),
    ({"gradient_as_bucket_view": True}, ""),
    ({"broadcast_buffers": False}, ""),
    ({"bucket_cap_mb": 0.0001}, ""),
    ({}, "allreduce_hook"),
    ({}, "fp16_compress_hook"),
]


@pytest.mark.parametrize(("options", "hook"), OPTIONS, ids=lambda value: str(value) or "-")
def test_what_the_wrapper_was_made_with_holds_after_a_graft(
    two_ranks: RankPool, options: dict[str, Any], hook: str
) -> None:
    first, second = two_ranks.run(_train_with, options, hook)
    assert first == second
