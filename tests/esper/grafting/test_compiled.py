"""torch.compile: grafts take effect, cost no new graph, and nothing falls back to eager unseen.

Three ways to compile, slots before and after the first compiled run, and a counting backend.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import blueprints
from esper.contracts import ViolationRule
from esper.exceptions import ConfigurationError
from esper.grafting import Receipt, apply_graft, prepare_slots, slot, trace_layers
from esper.sdk.compiler_watch import CompilerWatch
from tests.esper.grafting.layer_kinds import KINDS, described, make_subject
from tests.esper.tiny_models import meet_requirements

# torch hides this warning of its own; only "error" brings it out.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

Backend = Callable[[torch.fx.GraphModule, list[Tensor]], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 16)
        self.narrow = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.relu(self.wide(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class CountingBackend:
    """Runs graphs as they are, and counts how many were made."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


def whole(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def regional(model: Net, backend: Any) -> Any:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


WAYS = {"whole": whole, "in_place": in_place, "regional": regional}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


def make_net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(4, 8)


def open_up(receipt: Receipt) -> None:
    """Gives a newborn graft something to say."""
    with torch.no_grad():
        for parameter in receipt.graft.parameters():
            parameter.fill_(0.2)


@pytest.mark.parametrize("slots", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_a_graft_and_its_undo_take_effect_and_make_no_graph(way: str, slots: str) -> None:
    model, x = make_net()
    infos = {info.name: info for info in trace_layers(model, lambda: model(x))}
    backend = CountingBackend()
    if slots == "before":
        prepare_slots(model, infos)
    compiled = WAYS[way](model, backend)
    plain = compiled(x)
    assert torch.equal(plain, Net.forward(model, x)) or way == "whole"
    prepare_slots(model, infos)  # after: torch would run the old code for ever
    assert torch.equal(compiled(x), plain)
    graphs = backend.graphs
    assert graphs

    receipts = [
        apply_graft(model, infos["blocks.0.wide"], blueprints.get_blueprint("mlp_gelu_2048")),
        apply_graft(model, infos["blocks.1.norm"], blueprints.get_blueprint("ln_rms")),
    ]
    assert torch.equal(compiled(x), plain)
    open_up(receipts[0])
    outputs = [compiled(x)]
    for _ in range(3):  # α moves
        receipts[1].graft.on_step()
        outputs.append(compiled(x))
    assert all(not torch.equal(a, b) for a, b in zip([plain, *outputs], outputs, strict=False)), (
        "each of them changes what the compiled model computes"
    )
    torch.testing.assert_close(outputs[-1], eager(model, x), atol=1e-6, rtol=1e-5)
    outputs[-1].sum().backward()
    assert all(p.grad is not None for p in receipts[0].graft.parameters())
    for receipt in reversed(receipts):
        assert receipt.undo().exact
    assert torch.equal(compiled(x), plain)
    assert backend.graphs == graphs, "a graft, an undo and α cost no compilation"


def eager(model: nn.Module, x: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return model(x)


# Layers inside whole models are the same modules, and a whole model takes seconds to compile.
COMPILED_KINDS = [k for k in KINDS if not k.startswith(("gpt2_", "llama_", "bert_"))]


@pytest.mark.parametrize("kind", [*COMPILED_KINDS, "llama_value"])
def test_every_blueprint_works_beside_every_kind_of_compiled_layer(kind: str) -> None:
    subject = make_subject(kind)
    model, x = subject.model.eval(), subject.x
    prepare_slots(model, [subject.info.name] if subject.info.graftable else [])
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        plain = compiled(x)
        graphs = backend.graphs
        for blueprint in blueprints.list_blueprints():
            if blueprint.supports(described(kind)):
                continue
            needed = meet_requirements(model, subject.info, blueprint)
            receipt = apply_graft(model, subject.info, blueprint)
            assert torch.equal(compiled(x), plain), blueprint.slug
            for each in (*needed, receipt):
                open_up(each)
            torch.testing.assert_close(compiled(x), eager(model, x), msg=blueprint.slug)
            (*needed, receipt)[0].undo()
            assert torch.equal(compiled(x), plain), blueprint.slug
    assert backend.graphs == graphs


@pytest.mark.parametrize("mode", ["observe", "supervised"])
@pytest.mark.parametrize("way", WAYS)
def test_attaching_to_a_model_that_ran_compiled_already_is_not_too_late(
    way: str, mode: Literal["observe", "supervised"]
) -> None:
    model, x = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    backend = CountingBackend()
    compiled = WAYS[way](model, backend)
    compiled(x)
    with esper.attach(compiled, optimizer, mode=mode) as session:
        for _ in range(2):
            train_step(compiled, x, optimizer, session)
        assert all(layer.in_shape for layer in session.layers), "every layer was seen to run"
        graphs, plain = backend.graphs, compiled(x)
        open_up(session.graft("blocks.0.wide", "mlp_gelu_2048"))
        assert not torch.equal(compiled(x), plain)
        # Observing keeps no slot ready, so its first graft is compiled.
        assert (backend.graphs == graphs) is (mode == "supervised")


def train_step(model: Any, x: Tensor, optimizer: torch.optim.Optimizer, session: Any) -> None:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    session.step(loss)


def test_layers_without_a_slot_are_compiled_as_one_graph_after_the_first_step() -> None:
    model, x = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    with esper.attach(compiled, optimizer, slots=[]) as session:
        train_step(compiled, x, optimizer, session)
        split = backend.graphs
        train_step(compiled, x, optimizer, session)
        assert backend.graphs == split + 1
        train_step(compiled, x, optimizer, session)
        assert backend.graphs == split + 1


class Fickle(nn.Module):
    """Each call has a new Python number in it, so each call is compiled anew."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.mode = "0"

    def forward(self, x: Tensor) -> Tensor:
        self.mode = str(int(self.mode) + 1)
        return self.layer(x) if self.mode else x


def test_a_compiler_that_gives_up_is_a_finding_even_in_observe_mode() -> None:
    model, x = nn.Sequential(Fickle()), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="eager")
    with esper.attach(compiled, optimizer, mode="observe") as session:
        seen = []
        for _ in range(12):
            train_step(compiled, x, optimizer, session)
            seen.append([f for f in session.findings() if f.rule == ViolationRule.LATENCY])
        assert not seen[0]
        (finding,) = seen[-1]
        assert "runs eagerly" in finding.observed
        frame = session.frame()
        assert frame is not None
        assert frame.metrics["recompiles"] >= 7


def test_grafts_in_a_model_that_is_warm_cost_no_recompilation() -> None:
    model, x = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="eager")
    with esper.attach(compiled, optimizer, mode="supervised") as session:
        train_step(compiled, x, optimizer, session)
        watch = CompilerWatch()
        receipt = session.graft("head", "proj_ia3")
        train_step(compiled, x, optimizer, session)
        session.undo(receipt)
        train_step(compiled, x, optimizer, session)
        assert watch.recompiles() == 0
        assert watch.finding() is None
        assert [f for f in session.findings() if f.rule == ViolationRule.LATENCY] == []


@pytest.mark.parametrize("way", ["whole", "in_place", "block"])
def test_one_graph_for_all_leaves_no_room_and_attach_says_so(way: str) -> None:
    model, _ = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target: Any = model
    if way == "whole":
        target = torch.compile(model, backend="eager", fullgraph=True)
    elif way == "in_place":
        model.compile(backend="eager", fullgraph=True)
    else:
        model.blocks[1].compile(backend="eager", fullgraph=True)
    with pytest.raises(ConfigurationError, match="fullgraph=True, which leaves no room"):
        esper.attach(target, optimizer)
    assert not any("esper" in name.split(".") for name, _ in model.named_modules())
    if way == "block":
        esper.attach(model, optimizer, slots=["head", "blocks.0.wide"]).close()


def test_one_graph_for_all_after_attach_is_refused_by_torch_in_our_words() -> None:
    model, x = make_net()
    prepare_slots(model, ["head"])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="an Esper slot splits the graph"):
        torch.compile(model, backend="eager", fullgraph=True)(x)


def test_torchs_private_skip_still_hides_the_hook_from_the_compiler() -> None:
    """``torch._dynamo.decorators.skip`` is private: this is what we need of it."""
    assert slot.run_slot._torchdynamo_disable is True
    assert slot.run_slot.__code__.co_name == "run_slot", "no wrapper, which costs 28 µs a call"


INDUCTOR = """
import torch
from torch import nn
from esper import blueprints
from esper.grafting import apply_graft, prepare_slots, trace_layers

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(4, 8)
infos = trace_layers(model, lambda: model(x))
prepare_slots(model, [info.name for info in infos])
compiled = torch.compile(model)
plain = compiled(x)
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
receipt = apply_graft(model, infos[0], blueprints.get_blueprint("mlp_gelu_2048"))
assert torch.equal(compiled(x), plain)
with torch.no_grad():
    receipt.graft.weight_out.fill_(0.3)
torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
assert not torch.equal(compiled(x), plain)
compiled(x).sum().backward()
receipt.undo()
assert torch.equal(compiled(x), plain)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
"""


@pytest.mark.process
@pytest.mark.timeout(900)  # a cold compiler on a busy machine
def test_inductors_code_takes_a_graft_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
