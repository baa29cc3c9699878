"""A model that is spread over ranks is observed: nothing changes, and norms are of the whole."""

from __future__ import annotations

import math
import os
import tempfile
import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import esper
from esper.contracts import CommandKind, HealthFrame, Signal
from esper.exceptions import EsperError, GraftError, IncompatibleLayerError
from esper.grafting.ranks.replicas import RankGroup
from esper.health import sharded
from esper.sdk import RunStopped, attaching
from esper.sdk.transport.queues import Pace
from esper.sharding import FrameSum
from tests.esper.distributed.rank_pool import RankPool
from tests.esper.distributed.sharded_models import make
from tests.esper.sdk.transport.control_plane import ControlPlane

pytestmark = pytest.mark.process

STEPS = 22  # two frames
NORMS = (Signal.GRAD_NORM, Signal.WEIGHT_NORM, Signal.UPDATE_RATIO)
ON_TWO = [
    "fsdp",
    "fsdp original",
    "fsdp gradients",
    "fsdp whole",
    "fsdp2",
    "fsdp2 gathered",
    "tensor parallel",
]
GRAFTED = ["fsdp2", "fsdp2 gathered", "hybrid"]
ON_FOUR = ["hybrid", "two axes"]
LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 3},
    "evaluated": {"evaluates": True},
    "accumulated and evaluated": {"accumulate": 2, "evaluates": True},
}


def first_frame(side: Any, session: Any) -> HealthFrame | None:
    found = None
    for at in range(STEPS):
        side.step(at, session)
        found = found or session.frame()
    return found


def frame_of_the_whole(whole: Any, session: Any) -> HealthFrame | None:
    """The same one; every rank holds the whole model, so none waits for another."""
    for at in range(STEPS):
        whole.step(at, session)
        if frame := session.frame():
            return frame
    return None


def _observe(rank: int, size: int, model: str, sharding: str, loop: str) -> Any:
    options = LOOPS[loop]
    bare = make(model, sharding, rank, size, **options)
    for at in range(STEPS):
        bare.step(at)
    side = make(model, sharding, rank, size, **options)
    with esper.attach(side.model, side.optimizer) as session:
        frame = first_frame(side, session)
        said = [(finding.layer, finding.observed) for finding in session.findings()]
        layers = [(layer.name, layer.parameters, layer.kind) for layer in session.layers]
        reasons = {layer.reason for layer in session.layers}
    assert side.losses == bare.losses, "observing changed the training"
    whole = make(model, None, rank, size, same_data=side.same_data, **options)
    with esper.attach(whole.model, whole.optimizer) as session:
        expected = frame_of_the_whole(whole, session)
        assert layers == [(layer.name, layer.parameters, layer.kind) for layer in session.layers]
    assert not said, said
    if sharding in GRAFTED:
        assert reasons == {""}
    else:
        assert all("use fully_shard (FSDP2)" in reason for reason in reasons)
    if rank == 0:
        assert frame is not None
        assert expected is not None
        compare(frame, expected)
    return frame is not None


def compare(frame: HealthFrame, expected: HealthFrame) -> None:
    assert frame.layers == expected.layers
    assert frame.step == expected.step == 10
    for signal in NORMS:
        np.testing.assert_allclose(
            frame.column(signal), expected.column(signal), rtol=2e-3, err_msg=signal
        )
    assert np.isfinite(frame.column(Signal.WEIGHT_NORM)).all()


# The frozen model is the mlp with less to train; the transformer alone adds nothing to the tied one
# here, and to the loops of the next test.
MORE = [pytest.param(model, marks=pytest.mark.full) for model in ("mlp", "transformer")]


@pytest.mark.parametrize("model", ["frozen", "tied", *MORE])
@pytest.mark.parametrize("sharding", ON_TWO)
def test_each_kind_of_sharding_is_observed(two_ranks: RankPool, sharding: str, model: str) -> None:
    assert two_ranks.run(_observe, 2, model, sharding, "plain") == [True, False]


@pytest.mark.parametrize(
    "loop",
    [
        "accumulated and evaluated",
        *(pytest.param(alone, marks=pytest.mark.full) for alone in ("accumulated", "evaluated")),
    ],
)
@pytest.mark.parametrize("sharding", ON_TWO)
def test_accumulation_and_evaluation_change_no_norm(
    two_ranks: RankPool, sharding: str, loop: str
) -> None:
    assert two_ranks.run(_observe, 2, "transformer", sharding, loop) == [True, False]


@pytest.mark.parametrize("sharding", ON_FOUR)
def test_meshes_of_two_axes_count_each_element_once(four_ranks: RankPool, sharding: str) -> None:
    answers = four_ranks.run(_observe, 4, "transformer", sharding, "plain")
    assert answers == [True, False, False, False]


def _count(rank: int, sharding: str) -> tuple[int, int]:
    """(sums, meetings) of a run, with the meeting at attach."""
    sums, meetings = [], []
    start, gather = FrameSum.start, RankGroup._gather
    FrameSum.start = lambda *args: (sums.append(1), start(*args))[1]  # type: ignore[assignment, func-returns-value, method-assign]
    RankGroup._gather = lambda *args: (meetings.append(1), gather(*args))[1]  # type: ignore[method-assign]
    try:
        side = make("mlp", sharding, rank, 2)
        with esper.attach(side.model, side.optimizer) as session:
            for at in range(9):
                side.step(at, session)
            assert not sums
            for at in range(9, 40):
                side.step(at, session)
    finally:
        FrameSum.start, RankGroup._gather = start, gather  # type: ignore[method-assign]
    return len(sums), len(meetings)


@pytest.mark.parametrize("sharding", ["fsdp", "fsdp2"])
def test_there_is_one_collective_for_each_frame_and_no_other(
    two_ranks: RankPool, sharding: str
) -> None:
    first, second = two_ranks.run(_count, sharding)
    assert first == second
    assert 1 <= first[0] <= 4, "a frame every ten steps at most"
    assert first[1] == 1, "only attach meets"


def _noise(rank: int) -> Any:
    side = make("transformer", "fsdp", rank, 2)
    whole = make("transformer", None, rank, 2)
    with esper.attach(side.model, side.optimizer) as session:
        frame = None
        for at in range(STEPS):
            side.step(at, session)
            if at < 10:
                whole.step(at)
            frame = frame or session.frame()
    if frame is None:
        return None
    state = whole.optimizer.state[whole.model.get_submodule("blocks.0.fc1").weight]
    other = whole.optimizer.state[whole.model.get_submodule("blocks.0.fc1").bias]
    mean = sum((s["exp_avg"] / (1 - 0.9**10)).square().sum() for s in (state, other))
    power = sum((s["exp_avg_sq"] / (1 - 0.999**10)).sum() for s in (state, other))
    expected = float((mean / (power - mean)).sqrt())
    row = frame.layers.index("blocks.0.fc1")
    return expected, float(frame.column(Signal.GRAD_SNR)[row])


def test_the_noise_of_gradients_is_that_of_the_whole_layer(two_ranks: RankPool) -> None:
    (expected, measured), none = two_ranks.run(_noise)
    assert none is None
    assert math.isclose(expected, measured, rel_tol=5e-3)


def _go_on_alone(rank: int, how: str) -> Any:
    sharded.PATIENCE_S = 0.3
    side = make("mlp", "fsdp2", rank, 2)
    session = esper.attach(side.model, side.optimizer)
    for at in range(60):
        if rank == 1 and at == 15 and how == "ends":
            os._exit(3)
        broken = rank == 1 and at >= 15
        if how == "raises" and broken and session._parts.surgery.sampler is not None:
            session._parts.surgery.sampler._start_sum = None  # type: ignore[union-attr, method-assign, assignment]
        own = None if how == "silent" and broken else session
        if how != "ends":
            side.step(at, own)
        else:
            side.optimizer.step()
            session.step(1.0)  # the script's own collectives would raise
    said = [finding.observed for finding in session.findings()]
    session.close()
    return said


@pytest.mark.parametrize("how", ["silent", "raises", "ends"])
def test_a_rank_that_takes_no_part_blocks_no_other(how: str) -> None:
    pool = RankPool(2)
    try:
        first, second = pool.run(_go_on_alone, how, timeout=120)
    finally:
        pool.close()
    if how == "ends":
        assert second is None
        assert any("sum of the ranks' norms failed" in text for text in first)
    else:
        assert any("call session.step on every rank" in text for text in first)


def _stop(rank: int) -> Any:
    os.environ["ESPER_STATE_DIR"] = tempfile.mkdtemp()
    attaching.Pace = partial(Pace, flush=0.02, first_retry=0.02)  # type: ignore[misc,assignment]
    plane = ControlPlane().start() if rank == 0 else None
    side = make("mlp", "fsdp", rank, 2)
    try:
        address = plane.url if plane else "http://nobody"
        with esper.attach(side.model, side.optimizer, server=address, token="esp_x") as session:
            for at in range(20_000):
                if plane is not None and at == 5:
                    while not plane.listeners:
                        session._parts.server.send_step(None, {"loss": 1.0})  # type: ignore[union-attr]
                        time.sleep(0.02)
                    plane.send(plane.command(CommandKind.STOP_RUN, 1, payload={"reason": "enough"}))
                try:
                    side.step(at, session)
                except RunStopped as stop:
                    return at, str(stop)
    finally:
        attaching.Pace = Pace  # type: ignore[misc]
        if plane is not None:
            plane.stop()


def test_a_person_stops_all_ranks_in_one_step(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(_stop)
    assert first == second
    assert first[1] == "enough"


def _refuse(rank: int, sharding: str) -> list[str]:
    side = make("transformer", sharding, rank, 2)
    said = []
    with esper.attach(side.model, side.optimizer, mode="automatic", slots=["head"]) as session:
        for at in range(3):
            side.step(at, session)
        before = side.losses[-1]
        for act in (
            lambda: session.graft("head", "proj_lora_64"),
            lambda: session.set_lr("head", 0.5),
        ):
            with pytest.raises((IncompatibleLayerError, GraftError)) as refused:
                act()
            said.append(str(refused.value))
        state = session.state_dict() if rank == 0 else {}  # one rank alone may save
        assert not any(name.endswith("esper") for name, _ in side.model.named_modules())
        assert before == side.losses[-1]
    fresh = make("transformer", sharding, rank, 2)
    with esper.attach(fresh.model, fresh.optimizer) as session:
        shared = [state]
        torch.distributed.broadcast_object_list(shared, 0)
        session.load_state_dict(shared[0])
        fresh.step(0, session)
    return said


@pytest.mark.parametrize("sharding", ["fsdp", "fsdp original", "tensor parallel"])
def test_what_cannot_be_done_is_refused_when_it_is_asked(
    two_ranks: RankPool, sharding: str
) -> None:
    first, second = two_ranks.run(_refuse, sharding)
    assert first == second
    assert all("use fully_shard (FSDP2)" in sentence for sentence in first)


class DeepSpeedEngine(nn.Module):
    """Wraps a model as DeepSpeed's does: it has the name, and the model inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def _zero(rank: int) -> Any:
    """ZeRO-3 leaves the parameters empty, and keeps this rank's part beside them."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    whole = [p.detach().clone() for p in model.parameters()]
    flats = []
    for number, parameter in enumerate(model.parameters()):
        flat = torch.zeros(2 * -(-parameter.numel() // 2))
        flat[: parameter.numel()] = parameter.detach().flatten()
        parameter.ds_id, parameter.ds_shape = number, parameter.shape  # type: ignore[attr-defined]
        parameter.ds_tensor = flat.chunk(2)[rank].clone()  # type: ignore[attr-defined]
        parameter.data = torch.empty(0)
        flats.append(nn.Parameter(parameter.ds_tensor))  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(flats, lr=0.0)  # the norms stay
    with esper.attach(DeepSpeedEngine(model), optimizer) as session:
        seen = torch.zeros(())
        while not seen:  # a busy machine sums the norms beside many of such short steps
            for flat in flats:
                flat.grad = torch.ones_like(flat)
            optimizer.step()
            session.step(1.0)
            seen.fill_(session.frame() is not None)
            dist.broadcast(seen, 0)
        assert not session.findings()
        layers = session.layers
        with pytest.raises(EsperError, match="DeepSpeed"):
            session.graft("0", "proj_lora_64")
        frame = session.frame()
    norms = None if frame is None else frame.column(Signal.WEIGHT_NORM).tolist()
    expected = [
        math.sqrt(float(whole[0].square().sum() + whole[1].square().sum())),
        math.sqrt(float(whole[2].square().sum() + whole[3].square().sum())),
    ]
    return [(layer.name, layer.parameters) for layer in layers], norms, expected


def test_a_model_of_zero_3_is_observed(two_ranks: RankPool) -> None:
    (layers, norms, expected), other = two_ranks.run(_zero)
    assert other[0] == layers == [("0", 28), ("2", 10)]
    np.testing.assert_allclose(norms, expected, rtol=1e-5)
    assert other[1] is None
