"""D8: a model is compiled as without Esper, and observing it changes nothing, to the bit."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.nn.utils.parametrizations import spectral_norm

import esper
from esper.contracts import SIGNAL_INDEX, Signal
from esper.grafting.layers.eager_pass import SideEffectError, run_copy
from tests.esper.contract_with_host.failed_parts import failed_parts

# torch hides this warning of its own; only "error" brings it out.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

LONG_ENOUGH = 130  # steps: activations were measured at least twice
CALLS: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 16)
        self.drop = nn.Dropout(0.1)
        self.narrow = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.drop(torch.relu(self.wide(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def whole(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


def regional(model: Any, backend: Any) -> Any:
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return model


def wrapped_blocks(model: Any, backend: Any) -> Any:
    for place, block in enumerate(model.blocks):
        model.blocks[place] = torch.compile(block, backend=backend, fullgraph=True)
    return model


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "whole": whole,
    "in_place": in_place,
    "regional": regional,
    "wrapped_blocks": wrapped_blocks,
}


def train(model: Any, steps: int, session: Any = None) -> list[float]:
    """Losses of a short training; ``model`` is what the loop calls."""
    torch.manual_seed(1)
    if session is None:
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    else:
        (optimizer,) = session._parts.surgery.subject.surroundings.optimizers
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(16, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if session is not None:
            session.step(loss)
    return losses


def attach(
    model: Any, parameters: Any, mode: Literal["observe", "supervised"] = "observe"
) -> esper.sdk.Session:
    return esper.attach(model, torch.optim.SGD(parameters, lr=0.01), mode=mode)


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("mode", ["observe", "supervised"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_watched_code_is_compiled_as_often_as_without(
    way: str, when: str, mode: Literal["observe", "supervised"]
) -> None:
    torch.manual_seed(0)
    alone = Net()
    watched = copy.deepcopy(alone)
    counter = CompileCounter()
    expected = train(WAYS[way](alone, counter), LONG_ENOUGH)
    graphs = counter.frame_count
    torch.compiler.reset()

    counter = CompileCounter()
    if when == "before":
        compiled = WAYS[way](watched, counter)
        session = attach(compiled, watched.parameters(), mode)
    else:
        session = attach(watched, watched.parameters(), mode)
        compiled = WAYS[way](watched, counter)
    losses = train(compiled, LONG_ENOUGH, session)
    assert losses == expected, "random streams and weights are those of a run alone"
    assert counter.frame_count == graphs
    assert not counters["graph_break"]
    assert session.findings() == []
    layers = {layer.name: layer for layer in session.layers}
    assert all(layer.in_shape[0] == 16 for layer in layers.values()), "seen with the whole batch"
    frame = session.frame()
    assert frame is not None
    session.close()
    assert not any(module._forward_hooks for module in watched.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
@pytest.mark.cover(values=1)
@pytest.mark.parametrize("mode", ["observe", "supervised"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_compiled_step_of_the_optimizer_is_compiled_as_without(
    kind: Any, mode: Literal["observe", "supervised"]
) -> None:
    def trained(watched: bool) -> tuple[list[float], int]:
        torch.compiler.reset()
        torch.manual_seed(0)
        model, counter = (
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)),
            CompileCounter(),
        )
        optimizer = kind(model.parameters(), torch.tensor(0.01))
        session = esper.attach(model, optimizer, mode=mode, verbose=False) if watched else None
        step = torch.compile(lambda: optimizer.step(), backend=counter)
        losses = []
        for _ in range(60):
            loss = model(torch.randn(16, 8)).square().mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            step()
            losses.append(loss.item())
            if session is not None:
                session.step(loss)
        if session is not None:
            assert not [f for f in session.findings() if "made no step" in f.observed]
            assert not failed_parts(session)
        return losses, counter.frame_count

    losses, graphs = trained(watched=False)
    watched, compiled = trained(watched=True)
    assert watched == losses
    # Supervised, a hook keeps the weights before the first step, and goes.
    assert compiled <= graphs + (mode == "supervised")


def test_other_compiled_models_of_the_process_are_left_alone() -> None:
    counter = CompileCounter()
    teacher = torch.compile(Net(), backend=counter)
    teacher(torch.randn(4, 8))
    assert counter.frame_count == 1
    student = Net()
    session = attach(whole(student, "eager"), student.parameters())
    train(student, 3, session)
    teacher(torch.randn(4, 8))
    assert counter.frame_count == 1
    session.close()


@pytest.mark.parametrize("way", ["eager", *WAYS])
def test_activations_are_measured_wherever_a_layer_runs(way: str) -> None:
    torch.manual_seed(0)
    model = Net()
    called = WAYS[way](model, "eager") if way in WAYS else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    row = torch.randn(1, 8)
    rows = row.expand(16, 8)  # some of them have the statistics of all
    for block in model.modules():
        if isinstance(block, nn.Dropout):
            block.p = 0.0
    with torch.no_grad():
        expected = model.first(row).std(correction=0)
    measured: list[Any] = []
    with esper.attach(called, optimizer, sampling=10) as session:
        for _ in range(LONG_ENOUGH):
            optimizer.zero_grad()
            loss = called(rows).square().mean()
            loss.backward()
            optimizer.step()
            session.step(loss)
            frame = session.frame()
            if frame is not None and frame.values[0, SIGNAL_INDEX[Signal.ACT_STD]] > 0:
                measured.append(frame.values[:, SIGNAL_INDEX[Signal.ACT_STD]])
        names = [layer.name.replace("_orig_mod.", "") for layer in session.layers]
    assert names[0] == "first"
    assert len(names) == 11
    assert measured
    assert measured[0][0] == pytest.approx(expected.item(), rel=1e-5)
    assert (measured[0] > 0).all()


def test_a_model_inside_a_compiled_function_is_said_to_be_unseen() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    session = esper.attach(model, optimizer)
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def loss_of(x: Tensor) -> Tensor:
        return model(x).square().mean()

    for _ in range(4):
        optimizer.zero_grad()
        loss = loss_of(torch.randn(16, 8))
        loss.backward()
        optimizer.step()
        session.step(loss)
    assert counter.frame_count == 1
    (finding,) = session.findings()
    assert "Compile the model itself" in finding.observed + finding.remedy + finding.limit
    session.close()


def test_many_grafts_do_not_reach_the_recompile_limit() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    counter = CompileCounter()
    compiled = whole(model, counter)
    session = attach(compiled, model.parameters(), "supervised")
    with torch._dynamo.config.patch(recompile_limit=3):
        train(compiled, 2, session)
        for place in range(4):
            session.graft(f"{place}", "proj_ia3")
            train(compiled, 1, session)
    assert counter.frame_count == 5
    assert not [f for f in session.findings() if "gave up" in f.observed]
    session.close()


# -- a pass of a copy changes nothing --------------------------------------------------------------


class Counting(nn.Module):
    """A buffer that is written in place, and one that is replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total = self.total + x.detach().mean(0)
        return x


class Remembering(nn.Module):
    """Python attributes: a number, a list, a dict, its last output, a class attribute."""

    shared = 0

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen: list[int] = []
        self.counts = {"forward": 0}
        self.last: Tensor | None = None
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.counts["forward"] += 1
        self.last = self.layer(x)
        return self.last


class Drawing(nn.Module):
    """Draws from Python's and torch's global streams."""

    def forward(self, x: Tensor) -> Tensor:
        return x * random.random() + torch.randn_like(x) + torch.rand(())


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        random.random()
        raise RuntimeError("this pass fails")


UNTOUCHED: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.5),
    "batch_norm": lambda: nn.BatchNorm1d(8),
    "batch_norm_without_momentum": lambda: nn.BatchNorm1d(8, momentum=None),
    "spectral_norm": lambda: spectral_norm(nn.Linear(8, 8)),
    "spectral_norm_by_hook": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
    "counting_buffer": Counting,
    "python_attributes": Remembering,
    "random_streams": Drawing,
    "block": Block,
    "raising": Raising,
}


def state_of(model: nn.Module) -> dict[str, Any]:
    """Tensors by value and identity, Python attributes, random streams, gradients."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    attributes = {
        name: copy.deepcopy(
            {
                key: value
                for key, value in vars(module).items()
                if not (key.startswith("_") or isinstance(value, Tensor))
            }
        )
        for name, module in model.named_modules()
    }
    return {
        "values": [(name, id(tensor), tensor.detach().clone()) for name, tensor in tensors],
        "versions": [tensor._version for _, tensor in tensors],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "attributes": attributes,
        "shared": Remembering.shared,
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "calls": dict(CALLS),
    }


def assert_same(before: Any, after: Any) -> None:
    for key in ("versions", "attributes", "shared", "python", "calls", "gradients"):
        assert before[key] == after[key], key
    assert torch.equal(before["torch"], after["torch"])
    for (name, key, value), (_, now, current) in zip(
        before["values"], after["values"], strict=True
    ):
        assert key == now, f"{name} is another tensor"
        assert torch.equal(value, current), name


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", UNTOUCHED)
def test_a_pass_of_a_copy_leaves_the_original_as_it_is(kind: str, gradients: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), UNTOUCHED[kind](), nn.Linear(8, 3))
    if kind != "raising":
        model(torch.randn(16, 8)).sum().backward()  # buffers and attributes are in use
    x = torch.randn(16, 8)
    given, before, outputs = x.clone(), state_of(model), []

    def look(copied: Any) -> None:
        copied[0].register_forward_hook(lambda *call: outputs.append(call[2]))

    if kind == "raising":
        with pytest.raises(RuntimeError, match="this pass fails"):
            run_copy(model, (x,), {}, look, gradients=gradients)
    else:
        run_copy(model, (x,), {}, look, gradients=gradients)
        assert outputs[0].shape == (2, 8), "some rows of the batch"
    assert_same(before, state_of(model))
    assert torch.equal(x, given)


class WritesWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.clamp_(max=0.5)
        return x * self.weight


class WritesClass(Remembering):
    def forward(self, x: Tensor) -> Tensor:
        type(self).shared += 1
        Remembering.shared += 1
        return x


class WritesGlobal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        note_a_call()
        return x


def note_a_call() -> None:
    CALLS["forward"] += 1


class OwnGenerator(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.draw = lambda x: torch.rand(x.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(x)


def with_hook() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda *_: note_a_call())
    return layer


def with_closure() -> nn.Module:
    inner = nn.BatchNorm1d(8)
    layer = nn.Identity()
    layer.helper = lambda x: inner(x)
    return layer


def with_list_around() -> nn.Module:
    seen: list[int] = []

    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            assert len(seen) == 1, "put back each time"
            return x

    return Noting()


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "writes_weight": WritesWeight,
    "writes_class": WritesClass,
    "writes_global": WritesGlobal,
    "own_generator": lambda: OwnGenerator(torch.Generator()),
    "hook": with_hook,
    "closure": with_closure,
    "list_around": with_list_around,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_pass_with_side_effects_is_refused_and_leaves_no_trace(kind: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), REFUSED[kind](), nn.Linear(8, 3))
    x = torch.randn(16, 8)
    before = state_of(model)
    for _ in range(2):
        with pytest.raises(SideEffectError):
            run_copy(model, (x,), {}, lambda copied: None)
    assert_same(before, state_of(model))


def test_what_cannot_be_measured_is_a_finding_and_training_goes_on() -> None:
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(8, 8), WritesWeight(), nn.Linear(8, 3))
    watched = copy.deepcopy(alone)
    expected = train(torch.compile(alone, backend="eager"), 20)
    compiled = torch.compile(watched, backend="eager")
    session = attach(compiled, watched.parameters())
    assert train(compiled, 20, session) == expected
    (finding,) = session.findings()
    assert "compiled layers" in finding.observed + finding.remedy + finding.limit
    session.close()
