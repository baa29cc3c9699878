"""Grafts in a model of fully_shard: spread like the host, on all ranks or none, undone exactly."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import esper
from esper.contracts import SafetyPolicy
from esper.exceptions import ConfigurationError, GraftError, IncompatibleLayerError, ReplicaError
from esper.grafting.changes import apply
from tests.esper.distributed.rank_pool import RankPool, free_port
from tests.esper.distributed.sharded_models import Mlp, TinyTransformer, batch, fsdp2, make
from tests.esper.tiny_models import holds_nothing

pytestmark = pytest.mark.process

LONG_PROBATION = SafetyPolicy(maturity_steps=9_000, probation_steps=10_000)
BEFORE, WITH, AFTER = 4, 8, 6
PLACES = {
    "mlp": ("fc1", "mlp_gelu_2048"),
    "transformer": ("blocks.0.fc1", "proj_lora_64"),
    "tied": ("blocks.1.out", "attn_std"),
    "frozen": ("fc1", "proj_lora_64"),
}
CASES = [
    *(("fsdp2", model) for model in PLACES),
    ("fsdp2 gathered", "transformer"),
    ("fsdp2 gathered", "mlp"),
    ("fsdp2 mixed", "transformer"),
    ("fsdp2 mixed", "mlp"),
]


def attach(side: Any, **options: Any) -> Any:
    return esper.attach(side.model, side.optimizer, safety_policy=LONG_PROBATION, **options)


def state(side: Any) -> list[Any]:
    """All of this rank that a rollback must restore."""
    for module in side.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after an evaluation the outermost one is still whole
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
        evaluate_last(side)
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
        moved = [
            bool((own(p) != start[name]).any()) for name, p in receipt.graft.named_parameters()
        ]
        compare(receipt.graft, twin.graft, exact=sharding != "fsdp2 mixed")
        assert agree(any(moved)), "the graft learns nothing"
        assert session.frame() is None or rank == 0
        evaluate_last(side)
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


def evaluate_last(side: Any) -> None:
    """Leaves the outermost module with its whole weights."""
    if side.evaluates:
        with torch.no_grad():
            side.loss(2_000)


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


@pytest.mark.parametrize(("sharding", "model"), CASES)
def test_a_graft_is_spread_learns_and_is_undone_exactly(
    two_ranks: RankPool, sharding: str, model: str
) -> None:
    two_ranks.run(_graft, 2, model, sharding, {})


@pytest.mark.parametrize(
    "options", [{"accumulate": 3}, {"evaluates": True}, {"drops": True}], ids=str
)
def test_accumulation_evaluation_and_dropped_gradients_go_on_with_a_graft(
    two_ranks: RankPool, options: dict[str, Any]
) -> None:
    for sharding in ("fsdp2", "fsdp2 gathered"):
        two_ranks.run(_graft, 2, "transformer", sharding, options)


@pytest.mark.parametrize("sharding", ["fsdp2", "hybrid"])
def test_four_ranks_graft_and_undo(four_ranks: RankPool, sharding: str) -> None:
    four_ranks.run(_graft, 4, "transformer", sharding, {})


class Boom(RuntimeError):
    """Thrown by the test."""


def _fail(rank: int, failing: int, where: str) -> str:
    side, bare = make("transformer", "fsdp2", rank, 2), make("transformer", "fsdp2", rank, 2)
    place = {
        "build": "_build",
        "certificate": "certify",
        "insertion": "prepare_slots",
        "companion": "_accompany",
        "receipt": "Receipt",
    }[where]
    with attach(side) as session:
        for at in range(3):
            side.step(at, session)
            bare.step(at)
        before = state(side)
        kept = getattr(apply, place)
        if rank == failing:
            setattr(apply, place, boom)
        try:
            with pytest.raises((Boom, ReplicaError)) as failed:
                session.graft("blocks.0.fc1", "proj_lora_64")
        finally:
            setattr(apply, place, kept)
        assert isinstance(failed.value, Boom) == (rank == failing)
        assert state(side) == before
        assert holds_nothing(side.model.get_submodule("blocks.0.fc1"))
        for at in range(3, 6):
            side.step(at, session)
            bare.step(at)
        assert side.losses == bare.losses
        assert session.graft("blocks.0.fc1", "proj_lora_64").present
        side.step(6, session)
        return str(failed.value)


def boom(*_: Any, **__: Any) -> None:
    raise Boom("no memory")


@pytest.mark.parametrize("where", ["build", "certificate", "insertion", "companion", "receipt"])
def test_a_rank_that_fails_takes_all_ranks_back(two_ranks: RankPool, where: str) -> None:
    first, second = two_ranks.run(_fail, 1, where)
    assert "rank 1: Boom: no memory" in first
    assert "no memory" in second


def _refuse(rank: int) -> list[str]:
    side = make("transformer", "fsdp2", rank, 2)
    said = []
    with attach(side) as session:
        for at in range(3):
            side.step(at, session)
        session.graft("blocks.0.fc1", "proj_lora_64")
        before = state(side)
        for act in (
            lambda: session.graft("blocks.0.fc2", "clamp_grad_norm"),
            lambda: session.graft("blocks.0.fc2", "router_top2"),
            lambda: session.freeze("blocks.0.fc2"),
            lambda: session.graft("blocks.0.fc1", "proj_lora_64"),
        ):
            with pytest.raises((IncompatibleLayerError, GraftError)) as refused:
                act()
            said.append(str(refused.value))
        assert state(side) == before
        second = session.graft("blocks.0.fc1", "mlp_gelu_2048")  # beside the first
        side.step(3, session)
        assert second.certificate.max_abs_diff == 0.0
        session.prune(second)
        side.step(4, session)
    return said


def test_what_cannot_be_spread_is_refused(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(_refuse)
    assert first == second
    for sentence, word in zip(
        first, ["own weights", "other grafts", "DistributedDataParallel", "already"], strict=True
    ):
        assert word in sentence


def _resume(rank: int) -> None:
    side = make("transformer", "fsdp2", rank, 2)
    with attach(side) as session:
        for at in range(3):
            side.step(at, session)
        session.graft("blocks.0.fc1", "proj_lora_64")
        for at in range(3, 6):
            side.step(at, session)
        saved = io.BytesIO()
        states = [own(p).clone() for p in side.model.parameters()]
        torch.save([session.state_dict(), side.optimizer.state_dict()], saved)
        wanted = [side.step(at, session) for at in range(6, 12)]
    later = make("transformer", "fsdp2", rank, 2)
    with attach(later) as session:
        kept, optimizer = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)
        assert not any(isinstance(t, DTensor) for t in kept["grafts"].values())
        session.load_state_dict(kept)
        with torch.no_grad():
            for parameter, value in zip(later.model.parameters(), states, strict=True):
                own(parameter).copy_(value)
        later.optimizer.load_state_dict(optimizer)
        assert [later.step(at, session) for at in range(6, 12)] == wanted


def test_a_checkpoint_goes_on_equal_to_the_bit(two_ranks: RankPool) -> None:
    two_ranks.run(_resume)


def _export(rank: int) -> float:
    """How far off the exported model is, which one rank makes as the refusal says."""
    side = make("mlp", "fsdp2", rank, 2)
    with attach(side) as session:
        for at in range(3):
            side.step(at, session)
        session.graft("fc1", "proj_lora_64")
        for at in range(3, 6):
            side.step(at, session)
        with pytest.raises(ConfigurationError, match="Gather the whole state"):
            esper.export(side.model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered = get_model_state_dict(side.model, options=options)
        x, _ = batch(0, 5_000)
        wanted = side.model(x)
    if rank:
        return 0.0
    whole = Mlp()
    esper.load_state_dict(whole, gathered)
    assert torch.equal(whole(x), wanted)
    plain = Mlp()
    plain.load_state_dict(esper.export(whole).state_dict())
    return float((plain(x) - wanted).abs().max())


def test_the_whole_model_is_exported_from_the_gathered_state(two_ranks: RankPool) -> None:
    assert max(two_ranks.run(_export)) < 1e-5


def _guard(rank: int) -> list[Any]:
    side = make("transformer", "fsdp2", rank, 2)
    policy = SafetyPolicy(maturity_steps=10, probation_steps=9_000, probation_looks=89)
    options: dict[str, Any] = {"mode": "automatic", "evaluate": lambda: evaluate(side)}
    with esper.attach(side.model, side.optimizer, safety_policy=policy, **options) as session:
        for at in range(3):
            side.step(at, session)
        receipt = session.graft("blocks.0.fc1", "proj_lora_64")
        for at in range(3, 120):
            side.step(at, session)
        gain = session.adaptations[0].ablation_gain
        session.step(float("nan") if rank == 1 else 1.0)
        present = receipt.present
        for at in range(120, 124):
            side.step(at, session)
        return [gain, present, [str(entry.state) for entry in session.adaptations], side.losses[-1]]


def evaluate(side: Any) -> float:
    with torch.no_grad():
        return float(side.loss(5_000))


def test_all_ranks_evaluate_and_the_guard_of_one_takes_a_graft_out_of_all(
    two_ranks: RankPool,
) -> None:
    (*first, loss), (*second, other) = two_ranks.run(_guard)
    assert first == second
    assert first[0] == first[0], "the graft's gain was measured"
    assert first[1:] == [False, ["rolled_back"]]
    assert loss == loss
    assert other == other


def _on_nccl(rank: int, size: int, port: int) -> None:
    torch.cuda.set_device(rank)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl", init_method=where, rank=rank, world_size=size)
    mesh = dist.device_mesh.init_device_mesh("cuda", (size,))
    torch.manual_seed(5)
    model = TinyTransformer().cuda()
    fsdp2(model, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = torch.randint(0, 11, (4, 6), device="cuda")
    with esper.attach(model, optimizer, safety_policy=LONG_PROBATION) as session:
        losses = []
        for at in range(30):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
            losses.append(loss.item())
            if at == 3:
                receipt = session.graft("blocks.0.fc1", "proj_lora_64")
                assert receipt.certificate.max_abs_diff == 0.0
        assert losses[-1] < losses[0]
        assert (session.frame() is not None) == (rank == 0)
        assert session.undo(receipt).exact
    dist.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with nccl")
def test_a_graft_is_spread_with_nccl() -> None:
    size = min(2, torch.cuda.device_count())
    torch.multiprocessing.spawn(_on_nccl, (size, free_port()), nprocs=size)
