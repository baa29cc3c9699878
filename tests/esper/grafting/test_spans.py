"""Grafts that read the input of an earlier layer and add to the output of a later one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import esper
from esper.exceptions import IncompatibleLayerError, UnknownLayerError
from esper.grafting import LayerRecorder, apply_graft, span_of, trace_layers
from esper.grafting.slot import slot_of


class Perceptron(nn.Module):
    """Six inputs, a hidden layer of four units, three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 4)
        self.fc2 = nn.Linear(4, 3)
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.fc1(x))
        if self.fail:
            raise RuntimeError("between the two layers")
        return self.fc2(hidden)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    """Two residual blocks; ``how`` says which parts activation checkpointing recomputes."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "all":
            return self.head(checkpoint(self._body, x, use_reentrant=False))
        for block in self.blocks:
            each = self.how == "each"
            x = checkpoint(block, x, use_reentrant=False) if each else block(x)
        return self.head(x)

    def _body(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def convolutions() -> nn.Module:
    strided = nn.Conv2d(5, 4, 3, stride=2, padding=1)
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), strided, nn.Flatten())


# (model, input, earlier layer, later layer, blueprint)
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, str, str]] = {
    "perceptron": (Perceptron, (5, 6), "fc1", "fc2", "widen_hidden"),
    "one unit": (Perceptron, (5, 6), "fc1", "fc2", "mlp_gelu_2048"),
    "gated": (Perceptron, (5, 6), "fc1", "fc2", "mlp_swiglu_4096"),
    "two blocks": (Blocks, (2, 5, 8), "blocks.0.norm", "blocks.1.down", "widen_hidden"),
    "attention over a block": (Blocks, (2, 5, 8), "blocks.0.norm", "blocks.0.down", "attn_std"),
    "strided convolutions": (convolutions, (2, 3, 8, 8), "0", "2", "widen_hidden"),
}


def made(kind: str) -> tuple[nn.Module, Tensor, str, str, str]:
    make, shape, since, layer, blueprint = KINDS[kind]
    torch.manual_seed(3)
    return make(), torch.randn(shape), since, layer, blueprint


def grafted(model: nn.Module, x: Tensor, **others: Any) -> Any:
    return esper.graft(
        model, "fc2", "widen_hidden", since="fc1", hidden=7, optimizer=None, sample=x, **others
    )


def awake(model: nn.Module) -> None:
    """Fills the projections that start at zero, so that the grafts change the output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".esper." in name and not parameter.any():
                parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))


def carrier_of(model: nn.Module) -> Any:
    slot = slot_of(model.get_submodule("fc2"))
    assert slot is not None
    return slot.carriers["widen_hidden"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_nothing_at_first_learns_and_is_undone_to_the_bit(kind: str) -> None:
    model, x, since, layer, blueprint = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(x).detach()
    config = {"hidden": 1} if kind == "one unit" else {}

    receipt = esper.graft(
        model, layer, blueprint, since=since, optimizer=optimizer, sample=x, **config
    )

    assert receipt.certificate.passed
    assert torch.equal(model(x), before)
    assert f"{since!r} … {layer!r}" in str(receipt)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.any() for p in receipt.graft.parameters())
    report = receipt.undo()
    assert report.exact
    assert torch.equal(model(x), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_branch_reads_the_earlier_input_and_a_soft_undo_leaves_the_host() -> None:
    model, x = Perceptron(), torch.randn(5, 6)
    receipt = grafted(model, x)
    awake(model)
    graft = receipt.graft
    assert graft.activation == "relu"  # as between the layers of the host
    plain = model.fc2(torch.relu(model.fc1(x)))
    branch = torch.relu(x @ graft.weight_in.T + graft.bias_in) @ graft.weight_out.T
    torch.testing.assert_close(model(x), plain + branch)
    receipt.undo(hard=False)
    assert torch.equal(model(x), plain)
    assert not any("_to_" in name for name, _ in model.named_modules())


def test_no_input_is_held_after_a_pass_whether_it_ends_or_raises() -> None:
    model, x = Perceptron(), torch.randn(5, 6)
    grafted(model, x)
    awake(model)
    carrier = carrier_of(model)
    with torch.no_grad():
        model(x)
    assert carrier.is_empty
    model.fail = True
    with pytest.raises(RuntimeError, match="between"):
        model(x)
    assert carrier.is_empty


def test_a_later_layer_that_is_called_alone_gets_no_older_input() -> None:
    model, x = Perceptron(), torch.randn(5, 6)
    grafted(model, x)
    awake(model)
    hidden = torch.relu(model.fc1(x))  # outside a forward pass of the model
    expected = nn.functional.linear(hidden, model.fc2.weight, model.fc2.bias)
    assert torch.equal(model.fc2(hidden), expected)
    slot = slot_of(model.fc2)
    assert slot is not None
    assert "did not run before it" in slot.failure


def test_an_input_that_is_written_to_meanwhile_is_not_used() -> None:
    class Overwriting(Perceptron):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.fc1(x))
            x.mul_(2)
            return self.fc2(hidden)

    model = Overwriting()
    grafted(model, torch.randn(5, 6))
    awake(model)
    with torch.no_grad():
        model(torch.randn(5, 6))
    slot = slot_of(model.fc2)
    assert slot is not None
    assert "changed in place" in slot.failure


def test_threads_and_several_passes_before_backward_keep_their_inputs_apart() -> None:
    model, xs = Perceptron(), torch.randn(6, 5, 6).unbind()
    grafted(model, xs[0])
    awake(model)
    expected = [model(x).detach() for x in xs]
    meeting = threading.Barrier(2)

    def meet(*_: Any) -> None:
        meeting.wait(600)

    model.fc2.register_forward_pre_hook(meet)
    found: dict[int, Tensor] = {}

    def run(place: int) -> None:
        found[place] = model(xs[place]).detach()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[place], expected[place]) for place in range(2))


def test_a_copy_and_a_pickle_have_a_carrier_of_their_own() -> None:
    model, x = Perceptron(), torch.randn(5, 6)
    grafted(model, x)
    awake(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own
        assert torch.equal(other(x), model(x))
        assert carrier_of(other) is not carrier_of(model)


@pytest.mark.parametrize("how", ["all", "each"])
def test_activation_checkpointing_gives_the_same_gradients(how: str) -> None:
    torch.manual_seed(0)
    plain, recomputed, x = Blocks(), Blocks(how), torch.randn(2, 5, 8)
    recomputed.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, recomputed):
        esper.graft(
            model, "blocks.1.down", "widen_hidden", since="blocks.1.up", hidden=3,
            optimizer=None, sample=x,
        )  # fmt: skip
        awake(model)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        slot = slot_of(model.get_submodule("blocks.1.down"))
        assert slot is not None
        assert slot.carriers["widen_hidden"].is_empty
        assert not slot.failure
    torch.testing.assert_close(*gradients)


def test_checkpoints_that_part_the_layers_are_refused_or_leave_the_graft_out() -> None:
    x = torch.randn(2, 5, 8)
    place = {"since": "blocks.0.up", "optimizer": None}
    model = Blocks("each")
    recorder = LayerRecorder(model)
    model(x)
    layers = {layer.name: layer for layer in recorder.layers()}
    with pytest.raises(IncompatibleLayerError, match="recomputes"):
        span_of(layers, "blocks.0.up", "blocks.1.down", "widen_hidden")
    model = Blocks()
    esper.graft(model, "blocks.1.down", "widen_hidden", sample=x, **place)
    awake(model)
    plain = Blocks("each")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".esper." not in k})
    model.how = "each"  # the script turns it on later
    for net in (model, plain):
        net(x).square().sum().backward()
    torch.testing.assert_close(model.head.weight.grad, plain.head.weight.grad)
    slot = slot_of(model.get_submodule("blocks.1.down"))
    assert slot is not None
    assert "checkpointing" in slot.failure


# torch hides this warning of its own; only "error" brings it out.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("whole", [True, False])
def test_torch_compile_traces_it_without_a_break(whole: bool) -> None:
    torch.manual_seed(0)
    eager, x = Blocks(), torch.randn(2, 5, 8)
    model = copy.deepcopy(eager)
    run: Any = model
    if whole:
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:  # the earlier layer in one compiled part, the later one in another
        for block in model.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    bare = run(x)
    layers = {layer.name: layer for layer in trace_layers(eager, lambda: eager(x))}
    place = span_of(layers, "blocks.0.up", "blocks.1.down", "widen_hidden")
    receipts = [
        apply_graft(each, place, esper.blueprints.get("widen_hidden"), config={"hidden": 3})
        for each in (eager, model)
    ]
    torch.testing.assert_close(run(x), bare)
    for each in (eager, model):
        awake(each)
    for _ in range(2):
        expected, out = eager(x), run(x)
        torch.testing.assert_close(out, expected)
        for each in (out, expected):
            each.square().sum().backward()
    torch.testing.assert_close(*([p.grad for p in net.parameters()] for net in (model, eager)))
    slot = slot_of(model.get_submodule("blocks.1.down"))
    assert slot is not None
    assert slot.carriers["widen_hidden"].is_empty
    receipts[1].undo(hard=False)
    torch.testing.assert_close(run(x), bare)


def test_a_state_builds_the_span_again_and_a_state_without_it_takes_it_out() -> None:
    model, x = Perceptron(), torch.randn(5, 6)
    plain = copy.deepcopy(model.state_dict())
    grafted(model, x)
    awake(model)
    fresh = Perceptron()
    esper.load_state_dict(fresh, model.state_dict())
    assert torch.equal(fresh(x), model(x))
    fresh.load_state_dict(plain)
    assert not any(module._forward_pre_hooks for module in fresh.modules())
    assert "_to_" not in "".join(name for name, _ in fresh.named_modules())


def test_a_session_saves_and_resumes_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)

    def attached() -> tuple[Any, Any, Any]:
        model = Perceptron()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, esper.attach(model, optimizer, mode="supervised")

    def train(model: Any, optimizer: Any, session: Any, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            session.step(loss.item())

    model, optimizer, session = attached()
    train(model, optimizer, session, 2)
    receipt = session.graft("fc2", "widen_hidden", since="fc1", hidden=2)
    assert receipt.config == {"hidden": 2, "activation": "relu"}
    train(model, optimizer, session, 3)
    saved, weights = session.state_dict(), model.state_dict()
    other, _, resumed = attached()
    resumed.load_state_dict(saved)
    other.load_state_dict(weights)
    assert torch.equal(other(x), model(x))
    assert "'fc1' … 'fc2'" in str(resumed.adaptations[0])
    for each in (session, resumed):
        each.close()


class Odd(nn.Module):
    """Layers between which no graft can span."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.twice = nn.Linear(4, 4)
        self.pooled = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(self.twice(self.first(self.tokens(tokens))))
        return self.pooled(x.mean(1))


@pytest.mark.parametrize(
    ("since", "layer", "words"),
    [
        ("twice", "first", "runs 2 times"),
        ("pooled", "first", "runs after"),
        ("first", "first", "earlier layer"),
        ("tokens", "first", "token numbers"),
        ("first", "pooled", "axes"),
    ],
)
def test_an_impossible_span_is_refused_in_a_sentence(since: str, layer: str, words: str) -> None:
    model, tokens = Odd(), torch.zeros(2, 3, dtype=torch.long)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(IncompatibleLayerError, match=words):
        esper.graft(model, layer, "widen_hidden", since=since, optimizer=None, sample=tokens)
    assert [name for name, _ in model.named_modules()] == names


def test_what_spans_nothing_and_names_that_do_not_exist_are_said() -> None:
    model, x = Perceptron(), torch.randn(5, 6)
    with pytest.raises(UnknownLayerError, match=r"did you mean .*'fc1'"):
        esper.graft(model, "fc2", "widen_hidden", since="fc", optimizer=None, sample=x)
    with pytest.raises(IncompatibleLayerError, match="cannot span"):
        esper.graft(model, "fc2", "proj_lora_64", since="fc1", optimizer=None, sample=x)
    with pytest.raises(IncompatibleLayerError, match="since="):
        esper.graft(model, "fc2", "widen_hidden", optimizer=None, sample=x)
    with pytest.raises(IncompatibleLayerError, match="sample="):
        esper.graft(model, "fc2", "widen_hidden", since="fc1", optimizer=None)
