"""D1: nothing of Esper raises into the user's loop; what fails is switched off, and said once."""

from __future__ import annotations

import gc
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper import Session
from esper.console import write_line
from esper.contracts import Finding, Signal, ViolationRule
from esper.fail_closed import FailClosed, Failure
from esper.grafting import LayerRecorder, non_finite_gradients, remove_slots, trace_layers
from esper.grafting.layers import graph as graph_module
from esper.health import activations as activations_module
from esper.sdk.ending import patience_for
from tests.esper.contract_with_host.failed_parts import failed_parts

STEPS = 56  # past the first sample of activations


@dataclass
class Answer:
    hidden: Tensor


class Aside(nn.Module):
    """A layer with a parameter, whose output has an odd kind; the loss does not depend on it."""

    def __init__(self, odd: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.odd = odd

    def forward(self, x: Tensor) -> Any:
        return self.odd(x)


class Model(nn.Module):
    def __init__(self, aside: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.aside = aside
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        self.aside(h)
        out: Tensor = self.last(h)
        return out


class Packed(torch.Tensor):
    """A quantised weight: integers and a scale inside, and its own few operations."""

    _inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        made: Packed = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, dtype=torch.float32, requires_grad=False
        )
        made._inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["_inner"], None

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten = torch.ops.aten
        if function in (aten.detach.default, aten.alias.default):
            return Packed(args[0]._inner)
        raise NotImplementedError(f"{function} is not there for packed weights")


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        inner = torch.ones(4, 4, dtype=torch.int8)
        self.weight = nn.Parameter(Packed(inner), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight._inner.float()  # type: ignore[operator, union-attr]


class OnMeta(nn.Module):
    """Its weights are elsewhere, and come only for the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.ones(4, 4)


class Hookless(nn.Linear):
    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("this layer takes no hooks")


OUTPUTS: dict[str, Callable[[Tensor], Any]] = {
    "nested": lambda x: torch.nested.nested_tensor([x[:1].detach(), x[1:].detach()]),
    "jagged": lambda x: torch.nested.nested_tensor(
        [x[:1].detach(), x[1:].detach()], layout=torch.jagged
    ),
    "sparse": lambda x: x.detach().to_sparse(),
    "sparse rows": lambda x: x.detach().to_sparse_csr(),
    "quantised": lambda x: torch.quantize_per_tensor(x.detach(), 0.1, 0, torch.qint8),
    "nothing": lambda x: None,
    "a dict": lambda x: {"hidden": x},
    "a dataclass": Answer,
    "a list of nothing": lambda x: [None, None],
    "a tuple with text": lambda x: ("text", x),
    "complex": lambda x: torch.complex(x, x),
    "integers": lambda x: x.long(),
    "a scalar": lambda x: x.sum(),
    "empty": lambda x: x[:0],
    "on meta": lambda x: x.to("meta"),
    "float8": lambda x: x.detach().to(torch.float8_e4m3fn),
}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(nn.Linear(4, 4)),
    "scripted, with parts": lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())),
    "quantised": Quantised,
    "on meta": OnMeta,
    "hookless": lambda: Hookless(4, 4),
    "lazy": lambda: nn.LazyLinear(4),
    "float8 weights": lambda: Aside(lambda x: x).to(torch.float8_e4m3fn),
    "float64 and complex": lambda: Aside(lambda x: x).to(torch.complex64),
}
KINDS: dict[str, Callable[[], nn.Module]] = {
    **{f"output: {name}": (lambda odd=odd: Aside(odd)) for name, odd in OUTPUTS.items()},
    **{f"layer: {name}": make for name, make in LAYERS.items()},
}


def train(model: nn.Module, session: Session | None, steps: int = STEPS) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    optimizer = session._parts.setup.surroundings.optimizers[0] if session else optimizer_of(model)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        loss = F.cross_entropy(model(x), (x[:, 0] > 0).long())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        if session is not None:
            session.step(loss)
        losses.append(loss.item())
    return losses


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    named = model.named_parameters()
    return torch.optim.SGD([p for name, p in named if not name.startswith("aside")], lr=0.1)


def attached(model: nn.Module, **options: Any) -> Session:
    return esper.attach(model, optimizer_of(model), **options)


def switched_off_in(session: Session) -> list[Finding]:
    return [f for f in session.findings() if f.rule == ViolationRule.MISSING_TELEMETRY]


@pytest.mark.cover(values=1)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["observe", "automatic"])
def test_a_model_with_an_odd_layer_trains_as_without_esper(kind: str, mode: str) -> None:
    alone = train(Model(KINDS[kind]()), None)
    model = Model(KINDS[kind]())
    with attached(model, mode=mode) as session:
        losses = train(model, session)
        frame = session.frame()
        assert losses == alone or session.adaptations
        assert mode == "automatic" or not session._parts.failures.counts, (
            "no part of a step has failed"
        )
        assert frame is not None
        known = dict(zip(frame.layers, frame.column(Signal.GRAD_NORM).tolist(), strict=True))
        assert known["first"] > 0
        assert known["last"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_graft_beside_an_odd_layer_goes_in_and_out(kind: str) -> None:
    model = Model(KINDS[kind]())
    with attached(model) as session:
        train(model, session, 2)
        receipt = session.graft("first", "proj_lora_64")
        train(model, session, 3)
        assert session.undo(receipt).exact


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_a_padded_encoder_is_evaluated_before_it_trains(layers: int, grad: bool) -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(block, layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 16)
    with esper.attach(model, optimizer) as session:
        model.eval()
        for _ in range(3):
            with torch.set_grad_enabled(grad):
                assert model(x, src_key_padding_mask=padded).shape == x.shape
        model.train()
        for _ in range(STEPS):
            loss = model(x, src_key_padding_mask=padded).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.step(loss)
        assert not session._parts.failures.counts
        assert not switched_off_in(session)
        shapes = {layer.name: layer.in_shape for layer in session.layers}
        assert shapes["layers.0.linear1"] == (2, 5, 16), "the first pass that trains shows it"


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_model_that_is_scripted_as_a_whole_is_trained_and_named() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    with attached(scripted) as session:
        train(scripted, session, 3)
        sampler = session._parts.surgery.sampler
        train(scripted, session, 3)
        assert session._parts.surgery.sampler is sampler, "it is opened once"
        assert session.layers == ()
        assert any("recorder" in finding.observed for finding in session.findings())


def test_a_watcher_that_fails_is_switched_off_for_its_layer_and_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[Tensor] = []

    def fails(y: Tensor, channel_axis: int) -> Tensor:
        calls.append(y)
        raise ZeroDivisionError("no such\nstatistics")

    monkeypatch.setattr(activations_module, "activation_statistics", fails)
    model = Model(nn.Identity())
    with attached(model) as session:
        for _ in range(2):
            train(model, session, 2)
            assert session._parts.surgery.sampler is not None
            session._parts.surgery.sampler._activations.arm()
        train(model, session, 2)
        found = switched_off_in(session)
    assert sorted(finding.layer for finding in found) == ["first", "last"]
    assert "ZeroDivisionError: no such" in found[0].observed
    assert "activations are not measured" in found[0].remedy
    assert len(calls) == 2


def test_a_recorder_that_fails_leaves_the_layer_out(monkeypatch: pytest.MonkeyPatch) -> None:
    look = graph_module._look

    def fails(args: Any, kwargs: Any, output: Any) -> Any:
        if output.shape[-1] == 2:
            raise ZeroDivisionError("no shape")
        return look(args, kwargs, output)

    monkeypatch.setattr(graph_module, "_look", fails)
    model = Model(nn.Identity())
    with attached(model) as session:
        train(model, session)
        found = switched_off_in(session)
        graftable = {layer.name: layer.graftable for layer in session.layers}
    assert [finding.layer for finding in found] == ["last"]
    assert graftable == {"first": True, "last": False}


def test_a_layer_that_takes_no_hook_is_named() -> None:
    model = Model(Hookless(4, 4))
    with attached(model) as session:
        found = [finding for finding in session.findings() if finding.layer == "aside"]
        assert "this layer takes no hooks" in found[0].observed


def test_a_graft_that_fails_on_an_input_is_left_out_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(nn.Identity())
    x = torch.randn(8, 4)
    before = model(x)
    with attached(model) as session:
        train(model, session, 2)
        before = model(x)
        receipt = session.graft("first", "proj_lora_64")
        assert receipt._graft is not None

        def fails(*_: Any) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        monkeypatch.setattr(receipt._graft, "forward", fails)
        assert torch.equal(model(x), before)
        train(model, session, 3)
        assert any("left out" in finding.observed for finding in session.findings())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.SparseAdam])
def test_the_guard_works_beside_sparse_gradients(kind: Any) -> None:
    torch.manual_seed(0)
    embedding, head = nn.Embedding(20, 4, sparse=True), nn.Linear(4, 8)
    model = nn.Sequential(embedding, head)
    sparse, dense = kind(embedding.parameters(), lr=0.1), torch.optim.SGD(head.parameters(), 0.1)
    with esper.attach(model, [sparse, dense]) as session:
        for step in range(STEPS):
            ids = torch.randint(0, 20, (8,))
            loss = F.cross_entropy(model(ids), ids % 2)
            sparse.zero_grad()
            dense.zero_grad()
            loss.backward()
            assert non_finite_gradients(model) == ()
            sparse.step()
            dense.step()
            session.step(loss)
            if step == 3:
                receipt = session.graft("1", "proj_lora_64")
        assert not session._parts.failures.counts
        assert session.undo(receipt).exact
    embedding.weight.grad = torch.sparse_coo_tensor(
        [[1]], [[float("nan")] * 4], (20, 4), check_invariants=False
    )
    assert non_finite_gradients(model) == ("0.weight",)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_layers_are_traced_where_some_take_no_graft() -> None:
    model = Model(torch.jit.script(nn.Linear(4, 4)))
    assert [layer.name for layer in trace_layers(model)] == ["first", "last"]
    recorder = LayerRecorder(model)
    model(torch.randn(2, 4))
    assert recorder.done
    assert remove_slots(model) == ()


def test_the_end_of_a_run_does_all_its_parts_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model(nn.Identity())
    session = attached(model)
    train(model, session, 2)
    closed: list[bool] = []
    sampler = session._parts.surgery.sampler
    assert sampler is not None
    monkeypatch.setattr(session._parts.ledger, "close", lambda: 1 / 0)
    monkeypatch.setattr(sampler, "close", lambda: closed.append(True))
    session.close()
    assert closed == [True]


def test_a_failure_is_reported_once_and_a_listener_that_fails_is_ignored() -> None:
    seen: list[Failure] = []

    def report(failure: Failure) -> None:
        seen.append(failure)
        raise ZeroDivisionError

    closed = FailClosed(report)
    hook = closed.wrap(lambda: 1 / 0, part="hook", layer="a", unmeasured="Nothing is.")
    assert hook() is None
    assert hook() is None
    assert closed.run(lambda: 1 / 0, part="hook", layer="b", unmeasured="Nothing is.") is None
    assert [failure.layer for failure in seen] == ["a", "b"]
    assert seen[0].error == "ZeroDivisionError: division by zero"


def over(*_: Any) -> None:
    raise TimeoutError("the script's time is over")


def interrupted(*_: Any, **__: Any) -> None:
    """A signal comes right after ``torch.no_grad()`` has begun, before its block."""
    torch.set_grad_enabled(False)
    signal.raise_signal(signal.SIGUSR1)


@pytest.mark.parametrize("handler", [over, partial(over), SimpleNamespace(call=over).call])
@pytest.mark.parametrize(
    "place",
    [
        "esper.diagnosis.forward_probe.rows_of",
        "esper.diagnosis.gradient_probe.GradientProbe.remember",
        "esper.diagnosis.gradient_probe.GradientProbe.read",
        "esper.sdk.findings.LedgerWatch.on_step",
    ],
)
def test_a_time_limit_of_the_script_ends_it_wherever_it_comes(
    place: str, handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = signal.signal(signal.SIGUSR1, handler)

    def train() -> None:
        loss = model(torch.ones(2, 4)).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)

    try:
        with esper.attach(model, optimizer, verbose=False) as session:
            with monkeypatch.context() as patched:
                patched.setattr(place, interrupted)
                with pytest.raises(TimeoutError, match="time is over"):
                    [train() for _ in range(20)]
            assert torch.is_grad_enabled()
            [train() for _ in range(20)]
            assert not failed_parts(session)
            assert not [f for f in session.findings() if "switched off" in str(f)]
    finally:
        torch.set_grad_enabled(True)
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(
    "place",
    [
        "esper.grafting.slot.Slot.run",
        "esper.grafting.companions.companion.Companion.step",
        "esper.diagnosis.rules.plateau.Plateau.check",
        "esper.health.optimizer_steps.OptimizerSteps._read",
    ],
)
def test_a_time_limit_of_the_script_costs_no_part_of_esper(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graft stays and learns on, a rule is checked on, wherever the limit came."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = signal.signal(signal.SIGUSR1, over)

    def train() -> None:
        loss = (model(torch.randn(8, 16)) - 1.0).square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)

    try:
        with esper.attach(model, optimizer, verbose=False) as session:
            [train() for _ in range(5)]
            receipt = session.graft("0", "proj_lora_64", rank=2)
            with monkeypatch.context() as patched:
                patched.setattr(place, lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
                with pytest.raises(TimeoutError, match="time is over"):
                    [train() for _ in range(120)]
            old = [p.detach().clone() for p in receipt.graft.parameters()]
            [train() for _ in range(120)]
            assert receipt.present
            assert not all(map(torch.equal, old, receipt.graft.parameters()))
            assert not failed_parts(session)
            diagnosis = session._parts.diagnosis
            assert diagnosis is not None
            assert diagnosis.diagnosis.failed == {}
            assert not [f for f in session.findings() if f.severity == "serious"]
    finally:
        signal.signal(signal.SIGUSR1, before)


class Loud:
    """A console on which each line takes until the time is over."""

    def write(self, _: str) -> None:
        signal.raise_signal(signal.SIGUSR1)

    def flush(self) -> None:
        pass


def shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 4)
    with esper.attach(model, torch.optim.SGD(model.parameters()), verbose=False) as session:
        monkeypatch.setattr(session, "_summary", partial(signal.raise_signal, signal.SIGUSR1))
        str(session)


def said_on_the_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Loud())
    write_line("a finding")


def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    state = model.state_dict()
    esper.graft(model, "0", "proj_lora_64", rank=2)
    place = "esper.grafting.state_dicts.compare"
    monkeypatch.setattr(place, lambda *_, **__: signal.raise_signal(signal.SIGUSR1))
    model.load_state_dict(state)


@pytest.mark.parametrize("act", [shown_as_text, said_on_the_console, loaded])
def test_a_time_limit_goes_through_where_errors_are_left_out(
    act: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGUSR1, over)
    try:
        with monkeypatch.context() as patched, pytest.raises(TimeoutError, match="time is over"):
            act(patched)
    finally:
        signal.signal(signal.SIGUSR1, before)


LIMIT_SECONDS = 120.0  # of a lookup that does not end; a busy machine is slow, too


@pytest.mark.parametrize("server", ["unreachable", "failing name", "slow name"])
def test_ctrl_c_without_a_server_is_quick_and_prints_one_line_at_most(
    server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lookups: list[str] = []
    ended = threading.Event()

    def look_up(host: Any, *_: Any, **__: Any) -> Any:
        lookups.append(str(host))
        ended.wait(LIMIT_SECONDS if server == "slow name" else 0.0)
        raise socket.gaierror(-2, "Name or service not known")

    if server != "unreachable":
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
    address = "http://127.0.0.1:9" if server == "unreachable" else "http://no-such-host.invalid"
    model = Model(nn.Identity())
    session = attached(model, server=address, token="esp_x")
    with pytest.raises(KeyboardInterrupt), session:  # noqa: PT012
        train(model, session, 4)
        deadline = time.monotonic() + LIMIT_SECONDS
        while server != "slow name" and not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        interrupted = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - interrupted < patience_for(None), "as long as at another end"
    assert session._parts.server is not None
    thread = session._parts.server._transport._thread
    assert thread is not None
    assert not thread.is_alive()
    said = [record for record in caplog.records if record.levelname != "INFO"]
    assert len(said) == 1, [record.getMessage() for record in said]
    assert "\n" not in said[0].getMessage()
    assert said[0].exc_info is None
    assert bool(lookups) == (server != "unreachable")
    ended.set()


class OutOfMemory(nn.Module):
    """Raises behind a layer."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of memory")


class Saved:
    """What the graph of the gradient keeps for one operation."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_by_a_failed_pass(*, watched: bool) -> int:
    """How many saved tensors outlive a forward pass that raised."""
    kept: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        kept.append(weakref.ref(saved))
        return saved

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), OutOfMemory())
    with attached(model) if watched else nullcontext():
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor)
        with hooks, suppress(RuntimeError):
            model(torch.randn(8, 4))
        gc.collect()
        assert kept
        return sum(reference() is not None for reference in kept)


def test_a_forward_pass_that_raised_leaves_no_activation_behind() -> None:
    """A script that catches it and goes on with a smaller batch has its memory back."""
    assert kept_by_a_failed_pass(watched=True) == kept_by_a_failed_pass(watched=False)
