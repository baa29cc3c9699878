"""Ranks that hold different weights are found; equal ones are not."""

from __future__ import annotations

import pytest
import torch

from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.tiny_replica import replica

pytestmark = pytest.mark.process


def _slugs(rank: int, differ: bool) -> list[str]:
    with replica(rank, mode="observe") as side:
        side.run(8 - side.at)
        if differ and rank == 1:
            with torch.no_grad():
                next(side.bare.parameters()).add_(0.1)
        side.run(4)
        return [finding.slug for finding in side.session.findings()]


@pytest.mark.parametrize("differ", [True, False], ids=["different", "equal"])
def test_different_weights_are_found_and_equal_ones_are_not(
    two_ranks: RankPool, differ: bool
) -> None:
    leader, other = two_ranks.run(_slugs, differ)
    assert leader == (["desynchronised_ranks"] if differ else [])
    assert other == []
