"""Grafts in a model of fully_shard: spread like the host, on all ranks or none, undone exactly."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import esper
from esper.contracts import SafetyPolicy
from esper.exceptions import GraftError, IncompatibleLayerError, ReplicaError
from esper.grafting import apply
from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.sharded_models import make
from tests.esper.tiny_models import holds_nothing

pytestmark = pytest.mark.process

LONG_PROBATION = SafetyPolicy(maturity_steps=9_000, probation_steps=10_000)
BEFORE, WITH, AFTER = 4, 8, 6
SHARDINGS = ["fsdp2", "fsdp2 gathered", "fsdp2 mixed"]
PLACES = {
    "mlp": ("fc1", "mlp_gelu_2048"),
    "transformer": ("blocks.0.fc1", "proj_lora_64"),
    "tied": ("blocks.1.out", "attn_std"),
    "frozen": ("fc1", "proj_lora_64"),
}


def attach(side: Any, **options: Any) -> Any:
    return esper.attach(side.model, side.optimizer, safety_policy=LONG_PROBATION, **options)


def state(side: Any) -> list[Any]:
    """All of this rank that a rollback must restore."""
    weights = [own(p).clone() for p in side.model.parameters()]
    moments = [
        own(value).clone()
        for held in side.optimizer.state.values()
        for value in held.values()
        if isinstance(value, Tensor)
    ]
    names = [name for name, _ in side.model.named_parameters()]
    return [names, [t.tolist() for t in (*weights, *moments)], torch.get_rng_state().tolist()]


def own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def _graft(rank: int, size: int, model: str, sharding: str, options: dict[str, Any]) -> None:
    layer, slug = PLACES[model]
    bare = make(model, sharding, rank, size, **options)
    for at in range(BEFORE + 1 + AFTER):
        bare.step(at)
    side = make(model, sharding, rank, size, **options)
    whole = make(model, None, rank, size, **options)
    with attach(side) as session, attach(whole) as alone:
        for at in range(BEFORE):
            side.step(at, session)
            whole.step(at, alone)
        before = state(side)
        receipt = session.graft(layer, slug)
        assert receipt.certificate.passed
        assert receipt.certificate.max_abs_diff == 0.0
        twin = alone_graft(alone, layer, slug)
        assert receipt.certificate.parameters == twin.certificate.parameters
        fresh = dict(receipt.graft.named_parameters())
        assert all(isinstance(p, DTensor) for p in fresh.values())
        start = {name: own(p).clone() for name, p in fresh.items()}
        for at in range(BEFORE, BEFORE + WITH):
            side.step(at, session)
            whole.step(at, alone)
        count = len([at for at in range(BEFORE + 1) if options.get("evaluates") and at % 3 == 0])
        same = BEFORE + 1 + count
        assert side.losses[:same] == bare.losses[:same], "the graft changed the output at birth"
        moved = [bool((own(p) != start[name]).any()) for name, p in receipt.graft.named_parameters()]
        compare(receipt.graft, twin.graft, exact=sharding != "fsdp2 mixed")
        assert agree(any(moved)), "the graft learns nothing"
        assert session.frame() is None or rank == 0
        undone = session.undo(receipt)
        assert undone.exact
        assert state(side) == before
        assert holds_nothing(side.model.get_submodule(layer))
        del side.losses[:]
        for at in range(BEFORE, BEFORE + AFTER):
            side.step(at, session)
        steps = [at for at in range(BEFORE) if options.get("evaluates") and at % 3 == 0]
        skipped = BEFORE + len(steps)
        assert side.losses == bare.losses[skipped : skipped + len(side.losses)]
        assert not [f for f in session.findings() if "graft" in f.observed]


def alone_graft(session: Any, layer: str, slug: str) -> Any:
    """The same graft in one process, as the ranks' own group is no part of it."""
    ranks, apply._ranks = apply._ranks, lambda: 1
    try:
        return session.graft(layer, slug)
    finally:
        apply._ranks = ranks


def compare(mine: nn.Module, whole: nn.Module, *, exact: bool) -> None:
    expected = dict(whole.named_parameters())
    for name, parameter in mine.named_parameters():
        assert isinstance(parameter, DTensor)
        full = parameter.full_tensor()
        if exact:
            torch.testing.assert_close(full, expected[name].detach(), rtol=2e-3, atol=2e-5)


def agree(value: bool) -> bool:
    shared = torch.tensor([value])
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return bool(shared)


@pytest.mark.parametrize("model", PLACES)
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_a_graft_is_spread_learns_and_is_undone_exactly(
    two_ranks: RankPool, sharding: str, model: str
) -> None:
    two_ranks.run(_graft, 2, model, sharding, {})


@pytest.mark.parametrize("options", [{"accumulate": 3}, {"evaluates": True}], ids=str)
def test_accumulation_and_evaluation_go_on_with_a_graft(
    two_ranks: RankPool, options: dict[str, Any]
) -> None:
    for sharding in ("fsdp2", "fsdp2 gathered"):
        two_ranks.run(_graft, 2, "transformer", sharding, options)


@pytest.mark.parametrize("sharding", ["fsdp2", "hybrid"])
def test_four_ranks_graft_and_undo(four_ranks: RankPool, sharding: str) -> None:
    four_ranks.run(_graft, 4, "transformer", sharding, {})
