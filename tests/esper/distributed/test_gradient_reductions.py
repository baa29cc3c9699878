"""The two blueprints that take the place of DDP's all-reduce."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper
from esper import blueprints
from esper.blueprints.gradient_reduction import GradientReduction, ReductionBlueprint
from esper.exceptions import IncompatibleLayerError
from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.tiny_replica import graft, replica, sgd

pytestmark = pytest.mark.process

SLUGS = ["all_reduce_shard", "ring_allreduce"]
SIZES = [1, 2, 3, 4, 5, 7, 1000, 100_003]


def reduction_of(slug: str) -> GradientReduction:
    blueprint = blueprints.get_blueprint(slug)
    assert isinstance(blueprint, ReductionBlueprint)
    return blueprint.make_reduction()


def _sum_many_sizes(rank: int, slug: str, dtype: torch.dtype) -> list[torch.Tensor]:
    reduction, group = reduction_of(slug), dist.group.WORLD
    sums = []
    for size in SIZES:
        generator = torch.Generator().manual_seed(10 * size + rank)
        mine = torch.randn(size, generator=generator).to(dtype)
        wanted = mine.double()
        dist.all_reduce(wanted)
        reduction.add_up(mine, group)
        slack = 4 * dist.get_world_size() * torch.finfo(dtype).eps
        torch.testing.assert_close(mine.double(), wanted, atol=slack, rtol=slack)
        sums.append(mine)
    return sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("ranks", ["two_ranks", "three_ranks", "four_ranks"])
def test_every_size_is_summed_alike_on_all_ranks(
    request: pytest.FixtureRequest, ranks: str, slug: str, dtype: torch.dtype
) -> None:
    pool: RankPool = request.getfixturevalue(ranks)
    answers = pool.run(_sum_many_sizes, slug, dtype)
    for sums in zip(*answers, strict=True):
        assert all(torch.equal(sums[0], other) for other in sums[1:])


def _train(rank: int, slug: str, steps: int) -> dict[str, Any]:
    """Six steps, as many with the reduction where there is one, then a soft undo and six more."""
    with replica(rank, ddp={"bucket_cap_mb": 0.0002}, make_optimizer=sgd) as side:
        side.run(6)
        receipt = graft(side, "", slug) if slug else None
        side.run(steps)
        parameters = {name: p.detach().clone() for name, p in side.bare.named_parameters()}
        signals = receipt.graft.signals() if receipt is not None else {}
        certificate = receipt.certificate if receipt is not None else None
        hook = side.model._get_ddp_logging_data().get("comm_hook")
        if receipt is not None:
            side.session.undo(receipt, hard=False)
        side.run(2)
        later = side.model._get_ddp_logging_data().get("comm_hook")
        return {
            "parameters": parameters,
            "signals": signals,
            "certificate": certificate,
            "hooks": (hook, later),
            "sha": side.parameters(),
        }


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("ranks", ["two_ranks", "three_ranks"])
def test_a_model_learns_the_same_through_a_reduction(
    request: pytest.FixtureRequest, ranks: str, slug: str
) -> None:
    pool: RankPool = request.getfixturevalue(ranks)
    plain = pool.run(_train, "", 10)
    through = pool.run(_train, slug, 10)
    assert len({side["sha"] for side in through}) == 1
    for name, parameter in plain[0]["parameters"].items():
        torch.testing.assert_close(through[0]["parameters"][name], parameter, atol=1e-4, rtol=1e-4)
    certificate = through[0]["certificate"]
    assert certificate.passed
    assert 0.0 <= certificate.max_abs_diff <= certificate.tolerance < 1e-4
    assert certificate.latency_ms > 0
    assert through[0]["hooks"] == ("sum_in_background", None)
    assert through[0]["signals"]["sent_mib"] > 0
    assert through[0]["signals"]["exchange_ms"] > 0


def _undo_hard(rank: int, slug: str) -> None:
    with replica(rank, dropout=0.2) as side:
        side.run(3)
        before = side.state()
        receipt = graft(side, "", slug)
        side.run(3)
        assert side.session.undo(receipt).exact
        assert side.state() == before
        side.run(2)


@pytest.mark.parametrize("slug", SLUGS)
def test_a_reduction_is_taken_out_to_the_bit(two_ranks: RankPool, slug: str) -> None:
    two_ranks.run(_undo_hard, slug)


def _refusals(rank: int) -> list[str]:
    said = []
    with replica(rank) as side:
        side.run(1)
        with pytest.raises(IncompatibleLayerError) as refused:
            graft(side, "inner", "ring_allreduce")
        said.append(refused.value.reason)
        graft(side, "", "ring_allreduce")
        with pytest.raises(IncompatibleLayerError) as refused:
            graft(side, "", "all_reduce_shard")
        said.append(refused.value.reason)
        whole = side.session.layers[-1]
        assert (whole.name, whole.kind, whole.graftable) == ("", "DistributedDataParallel", True)
        side.run(1)
    with replica(rank) as side:
        side.model.register_comm_hook(None, _own_hook)
        side.run(1)
        with pytest.raises(IncompatibleLayerError) as refused:
            graft(side, "", "ring_allreduce")
        said.append(refused.value.reason)
    bare = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3)))
    with esper.attach(bare, torch.optim.SGD(bare.parameters(), lr=0.1)) as session:
        with pytest.raises(IncompatibleLayerError) as refused:
            session.graft("", "ring_allreduce")
        said.append(refused.value.reason)
    return said


def _own_hook(state, bucket):  # type: ignore[no-untyped-def] # DDP reads the annotations
    work = dist.all_reduce(bucket.buffer() / 2, async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def test_where_no_reduction_fits_a_sentence_says_why(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(_refusals)
    assert first == second
    for sentence, part in zip(
        first,
        ["at least 2 ranks", "conflicts with", "its own communication hook", "bare Sequential"],
        strict=True,
    ):
        assert part in sentence


def test_one_process_has_nobody_to_reduce_with() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(IncompatibleLayerError, match="at least 2 ranks"):
        esper.graft(model, "0", "ring_allreduce")


def test_a_reduction_that_was_not_used_yet_has_measured_nothing() -> None:
    assert all(math.isnan(value) for value in reduction_of("ring_allreduce").signals().values())
