"""torch.compile: grafts take effect and cost one graph, undo and graft again cost none.

Three ways to compile, all with ``fullgraph=True``, slots before and after the first compiled run,
and a counting backend. Nothing falls back to eager unseen.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import blueprints
from esper.blueprints import Blueprint
from esper.contracts import ViolationRule
from esper.grafting import Receipt, apply_graft, prepare_slots, slot, trace_layers
from esper.sdk.compiler_watch import CompilerWatch
from tests.esper.grafting.layer_kinds import described, make_subject
from tests.esper.tiny_models import meet_requirements

# torch hides this warning of its own; only "error" brings it out.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


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
    return torch.compile(model, backend=backend, fullgraph=True)


def in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend, fullgraph=True)
    return model


def regional(model: Net, backend: Any) -> Any:
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    return model


WAYS = {"whole": whole, "in_place": in_place, "regional": regional}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def make_net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(4, 8)


def open_up(receipt: Receipt) -> None:
    """Gives a newborn graft something to say."""
    with torch.no_grad():
        for parameter in receipt.graft.parameters():
            parameter.fill_(0.2)


@pytest.mark.cover(values=1)
@pytest.mark.parametrize("slots", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_grafts_take_effect_and_are_compiled_once(way: str, slots: str) -> None:
    model, x = make_net()
    x.requires_grad_()  # the first block is compiled for an input like that of the second
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
    assert graphs == (1 if slots == "before" else 2)

    wanted = {"blocks.0.wide": "mlp_gelu_2048", "blocks.1.norm": "ln_rms"}
    receipts = [
        apply_graft(model, infos[layer], blueprints.get_blueprint(slug))
        for layer, slug in wanted.items()
    ]
    assert torch.equal(compiled(x), plain)
    assert backend.graphs == graphs + (2 if way == "regional" else 1), "one for each changed part"
    graphs = backend.graphs
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
    again = [
        apply_graft(model, infos[layer], blueprints.get_blueprint(slug))
        for layer, slug in wanted.items()
    ]
    open_up(again[0])
    torch.testing.assert_close(compiled(x), eager(model, x), atol=1e-6, rtol=1e-5)
    assert backend.graphs == graphs, "a new α, an undo and the same grafts again cost none"


def test_equal_blocks_share_one_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(14)))
    x = torch.randn(4, 8, requires_grad=True)
    infos = {info.name: info for info in trace_layers(model, lambda: model(x))}
    prepare_slots(model, infos)
    backend = CountingBackend()
    for block in model:
        block.compile(backend=backend, fullgraph=True)
    model(x).sum().backward()
    assert backend.graphs == 1, "a slot holds nothing that differs from block to block"
    receipts = []
    for name in ("3.wide", "7.wide", "13.wide"):
        lora = blueprints.get_blueprint("proj_lora_64")
        receipts.append(apply_graft(model, infos[name], lora))
        model(x).sum().backward()
    assert backend.graphs == 2, "equal grafts at equal places share one graph too"
    for receipt in reversed(receipts):
        receipt.undo()
    model(x).sum().backward()
    assert backend.graphs == 2


def eager(model: nn.Module, x: Tensor) -> Tensor:
    with torch.compiler.set_stance("force_eager"):
        return model(x)


# One for each way to call a layer or to lay out its channels: each graph takes a second.
COMPILED_KINDS = [
    "linear_2d",
    "linear_3d",
    "linear_called_twice",
    "linear_weight_norm",
    "conv2d",
    "layer_norm",
    "batch_norm2d",
    "multihead_attention",
    "embedding",
    "lstm",
    "lstm_packed",
    "own_class",
]


# torch.compile itself cannot make one graph of these.
SPLIT_BY_TORCH = {"lstm", "lstm_packed"}


def fitting(kind: str) -> list[Blueprint]:
    return [each for each in blueprints.list_blueprints() if not each.supports(described(kind))]


@cache
def met() -> set[tuple[str, str]]:
    """Kinds and blueprints that ``./check`` lets meet: each of both, and each blueprint twice."""
    chosen: set[tuple[str, str]] = set()
    for place, blueprint in enumerate(blueprints.list_blueprints()):
        kinds = [kind for kind in COMPILED_KINDS if blueprint in fitting(kind)]
        chosen |= {(kinds[(place + step) % len(kinds)], blueprint.slug) for step in (0, 5) if kinds}
    for kind in COMPILED_KINDS:
        if kind not in {each for each, _ in chosen}:
            chosen.add((kind, fitting(kind)[0].slug))
    return chosen


@pytest.mark.parametrize("part", ["cover", pytest.param("rest", marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", COMPILED_KINDS)
def test_every_blueprint_is_one_graph_with_every_kind_of_compiled_layer(
    kind: str, part: str
) -> None:
    subject = make_subject(kind)
    model, x = subject.model.eval(), subject.x
    prepare_slots(model, [subject.info.name] if subject.info.graftable else [])
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=kind not in SPLIT_BY_TORCH)
    with torch.no_grad():
        plain = compiled(x)
        for blueprint in fitting(kind):
            if ((kind, blueprint.slug) in met()) != (part == "cover"):
                continue
            graphs = backend.graphs
            needed = meet_requirements(model, subject.info, blueprint)
            receipt = apply_graft(model, subject.info, blueprint)
            assert torch.equal(compiled(x), plain), blueprint.slug
            for each in (*needed, receipt):
                open_up(each)
            for _ in range(2):  # schedules and counters move
                torch.testing.assert_close(compiled(x), eager(model, x), msg=blueprint.slug)
                for each in (*needed, receipt):
                    each.graft.on_step()
            assert backend.graphs - graphs <= 1, blueprint.slug
            (*needed, receipt)[0].undo()
            assert torch.equal(compiled(x), plain), blueprint.slug
            assert backend.graphs - graphs <= 1, blueprint.slug


@pytest.mark.parametrize("slug", ["router_top2", "router_moe_auxloss", "moe_top2_balanced"])
def test_a_compiled_router_learns_as_the_eager_one(slug: str) -> None:
    """Compiled, every expert runs at every position; the gradients are the same."""
    subject = make_subject("linear_3d")
    model, x = subject.model.train(), subject.x
    model.drop.p = 0.0
    receipt = apply_graft(model, subject.info, blueprints.get_blueprint(slug))
    open_up(receipt)
    receipt.graft.on_step()
    gradients = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        state = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in receipt.graft.parameters()])
        for name, buffer in model.named_buffers():
            buffer.copy_(state[name])
    # Some sum to zero, and what is left of them by rounding depends on the processor.
    rounding = 1e-6 * max(float(gradient.abs().max()) for gradient in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=rounding, rtol=1e-4)


def test_the_gradient_clamp_works_in_compiled_code() -> None:
    model, x = make_net()
    infos = {info.name: info for info in trace_layers(model, lambda: model(x))}
    clamp = blueprints.get_blueprint("clamp_grad_norm")
    apply_graft(model, infos["head"], clamp, config={"max_norm": 0.25})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    (100 * compiled(x)).square().sum().backward()
    total = torch.stack([p.grad.norm() for p in model.head.parameters()]).norm()
    assert total.item() == pytest.approx(0.25, rel=1e-4)


def test_statistics_are_measured_in_compiled_code_as_often_as_asked() -> None:
    model, x = make_net()
    infos = {info.name: info for info in trace_layers(model, lambda: model(x))}
    monitor = blueprints.get_blueprint("mon_act_stats")
    graft = apply_graft(model, infos["head"], monitor, config={"every": 2}).graft
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    seen = []
    for scale in (1, 2, 3):
        y = compiled(scale * x)
        seen.append((graft.signals()["act_mean"], y.mean().item()))
    assert seen[0][0] == pytest.approx(seen[0][1], abs=1e-6)
    assert seen[1][0] == seen[0][0], "only every second call is measured"
    assert seen[2][0] == pytest.approx(seen[2][1], abs=1e-6)
    assert backend.graphs == 1


def test_a_graft_that_cannot_run_on_another_form_of_input_is_left_out_there() -> None:
    model, _ = make_net()
    x = torch.randn(2, 5, 8)
    infos = {info.name: info for info in trace_layers(model, lambda: model(x))}
    receipt = apply_graft(model, infos["head"], blueprints.get_blueprint("attn_std"))
    open_up(receipt)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), eager(model, x))
    other = torch.randn(4, 8)  # no sequence to attend over
    assert torch.equal(compiled(other), eager(model, other))
    assert slot.slot_of(model.head).failure


@pytest.mark.cover(values=1)
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
        plain = compiled(x)
        open_up(session.graft("blocks.0.wide", "mlp_gelu_2048"))
        assert not torch.equal(compiled(x), plain)


def train_step(model: Any, x: Tensor, optimizer: torch.optim.Optimizer, session: Any) -> None:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    session.step(loss)


def test_layers_without_a_slot_are_compiled_once() -> None:
    model, x = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    backend = CountingBackend()
    compiled = torch.compile(model, backend=backend)
    with esper.attach(compiled, optimizer, slots=[]) as session:
        for _ in range(3):
            train_step(compiled, x, optimizer, session)
        assert backend.graphs == 1


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


def test_a_graft_in_a_model_that_is_warm_costs_one_recompilation() -> None:
    model, x = make_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compiled = torch.compile(model, backend="eager")
    with esper.attach(compiled, optimizer, mode="supervised") as session:
        train_step(compiled, x, optimizer, session)
        watch = CompilerWatch()
        receipt = session.graft("head", "proj_ia3")
        train_step(compiled, x, optimizer, session)
        assert watch.recompiles() == 1
        session.undo(receipt)
        train_step(compiled, x, optimizer, session)
        session.graft("head", "proj_ia3")
        train_step(compiled, x, optimizer, session)
        assert watch.recompiles() == 1
        assert watch.finding() is None
        assert [f for f in session.findings() if f.rule == ViolationRule.LATENCY] == []


INDUCTOR = """
import torch
from torch import nn
from esper import blueprints
from esper.grafting import apply_graft, prepare_slots, trace_layers

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(4, 8)
infos = trace_layers(model, lambda: model(x))
prepare_slots(model, [info.name for info in infos])
compiled = torch.compile(model, fullgraph=True)
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
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
assert not torch._dynamo.utils.counters["graph_break"]
"""


@pytest.mark.process
@pytest.mark.timeout(900)  # a cold compiler on a busy machine
def test_inductors_code_takes_a_graft_too() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INDUCTOR], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
