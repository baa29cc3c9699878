"""A plain state that is loaded across a graft on several ranks, or on one rank alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.tiny_replica import graft, replica

pytestmark = pytest.mark.process


def equal_everywhere(value: str) -> bool:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return len(set(everyone)) == 1


def _go_back_and_forth(rank: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with replica(rank) as side:
        side.run(2)
        older = copy.deepcopy(side.model.state_dict())
        graft(side)
        side.run(2)
        later = copy.deepcopy(side.model.state_dict())
        for name, state in (("older", older), ("later", later)):
            side.model.load_state_dict(state)
            now = side.model.state_dict()
            seen[name] = now.keys() == state.keys() and all(
                torch.equal(now[key], value) for key, value in state.items()
            )
            side.run(2)
            seen[f"{name}, equal"] = equal_everywhere(side.parameters())
    return seen


def _test_on_one_rank(rank: int) -> dict[str, Any]:
    """As scripts do at their end; the other rank waits for nothing."""
    with replica(rank) as side:
        side.run(2)
        older = copy.deepcopy(side.model.state_dict())
        graft(side)
        side.run(2)
        if rank == 0:
            side.model.load_state_dict(older)
        return {"keys": len(side.model.state_dict())}


def _save_for_all(rank: int, folder: str) -> bool:
    """As each rank holds the same, torch writes that of one, and all read it."""
    with replica(rank) as side:
        side.run(2)
        measured = (0.5, 0.0625)[rank]
        with patch("esper.grafting.changes.certify._latency_ms", lambda *_: measured):
            receipt = graft(side)
        assert receipt.certificate.latency_ms == measured
        side.run(2)
        saved = copy.deepcopy(side.bare.state_dict())
        dcp.save({"model": saved}, checkpoint_id=folder)
        side.run(2)
        state = {"model": side.bare.state_dict()}
        dcp.load(state, checkpoint_id=folder)
        side.bare.load_state_dict(state["model"])
        now = side.bare.state_dict()
        own = ("running_mean", "running_var")  # each rank has those of its own batches
        return all(torch.equal(now[k], v) for k, v in saved.items() if not k.endswith(own))


def test_a_distributed_checkpoint_of_a_graft_is_read_on_all_ranks(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    assert two_ranks.run(_save_for_all, str(tmp_path)) == [True, True]


def test_each_rank_follows_the_state_that_it_loads(two_ranks: RankPool) -> None:
    for seen in two_ranks.run(_go_back_and_forth):
        assert all(seen.values()), seen


def test_one_rank_loads_the_best_state_at_the_end(two_ranks: RankPool) -> None:
    lead, other = two_ranks.run(_test_on_one_rank)
    assert lead["keys"] < other["keys"]
