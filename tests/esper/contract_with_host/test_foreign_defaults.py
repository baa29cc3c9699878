"""Esper's own tensors do not depend on what the script has set as torch's defaults and modes.

A tensor that is made without a device lies on the script's default device: on a GPU, beside a
generator of the CPU, torch raises. One without a dtype has the script's default dtype.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import esper
from esper import Session
from esper.grafting.manifest import MANIFEST_KEY

PACKAGE = str(Path(esper.__file__).parent)
GRAFTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("up", "proj_lora_64", {}),
    ("down", "mlp_gelu_2048", {}),
    ("down", "widen_hidden", {"since": "up", "hidden": 3}),
    ("norm", "ln_rms", {}),
    ("up", "proj_ia3", {}),
    ("head", "mon_act_stats", {}),
    ("head", "clamp_grad_norm", {}),
    ("mix", "attn_std", {}),
    ("mix", "attn_split_qk", {}),
)
MIXTURE = ("expert_mlp_1d", "router_moe_auxloss", "load_bal_ema", "cap_fuse_hffn")


class Model(nn.Module):
    """A sequence model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.tokens(x)))
        h = h + self.down(torch.relu(self.up(self.norm(h))))
        out: Tensor = self.head(h)
        return out


class Script:
    """Attaches, trains, changes the model and saves it; ``seen`` is all that it was told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.manual_seed(0)
        with torch.device("cpu"):
            self.model = Model().float()
            self.x = torch.arange(24).reshape(4, 6) * 7 % 12
        # Without a step counter, which torch itself would put on the default device.
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05, momentum=0.9)
        self.seen: list[Any] = []

    def attach(self, mode: str, **options: Any) -> Session:
        given: Any = {"mode": mode, "sampling": [(0, 2, 4)], **options}
        return esper.attach(self.model, self.optimizer, verbose=False, **given)

    def train(self, session: Session, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(self.x).flatten(0, 1), self.x.flatten())
            torch.autograd.backward(loss)
            self.optimizer.step()
            session.step(loss)
            self.seen.append(loss.item())

    def look(self, session: Session) -> None:
        frame = session.frame()
        assert frame is not None
        self.seen += [frame.step, frame.values.tobytes(), *map(str, session.findings())]
        assert len(str(session)) + len(str(session.why()))

    def graft(self, session: Session, layer: str, blueprint: str, **config: Any) -> Any:
        receipt = session.graft(layer, blueprint, **config)
        certificate = receipt.certificate
        self.seen += [blueprint, certificate.max_abs_diff, certificate.parameters]
        self.train(session, 2)
        return receipt

    def keep(self) -> None:
        """Where its tensors are, and their values."""
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, Tensor) and MANIFEST_KEY not in name:  # it has measured times
                self.seen += [name, str(tensor.device), str(tensor.dtype), tensor.tolist()]


def observes(script: Script) -> None:
    with script.attach("observe") as session:
        script.train(session, 20)
        script.look(session)


def acts_by_itself(script: Script) -> None:
    with script.attach("automatic", evaluate=lambda: 1.0) as session:
        script.train(session, 60)
        script.look(session)
    script.keep()


def asks(script: Script) -> None:
    with script.attach("supervised") as session:
        script.train(session, 30)
        script.seen += map(str, session.waiting)
        script.look(session)


def grafts(script: Script) -> None:
    with script.attach("observe", snapshot_memory=1 << 30) as session:
        script.train(session, 3)
        for layer, blueprint, config in GRAFTS:
            receipt = script.graft(session, layer, blueprint, **config)
            script.keep()
            script.seen.append(session.undo(receipt).exact)
            script.train(session, 2)
        for blueprint in MIXTURE:
            script.graft(session, "up", blueprint)
        script.look(session)
    script.keep()


def saves(script: Script) -> None:
    with script.attach("observe", snapshot_memory=0, snapshot_folder=script.folder) as session:
        script.train(session, 3)
        receipt = script.graft(session, "down", "mlp_gelu_2048")
        script.seen.append(session.undo(receipt).exact)
        script.graft(session, "up", "proj_lora_64")
        script.graft(session, "down", "attn_std")
        torch.save((session.state_dict(), script.model.state_dict()), script.folder / "state.pt")
        plain = esper.export(script.model, script.folder / "exported")
        script.seen += [plain(script.x).tolist(), str(esper.export(script.model)(script.x).device)]
    other = Script(script.folder)
    with other.attach("observe") as session:
        saved = torch.load(script.folder / "state.pt", map_location="cpu", weights_only=True)
        session.load_state_dict(saved[0])
        other.model.load_state_dict(saved[1])
        other.train(session, 3)
    other.keep()
    script.seen += other.seen


def remedies(script: Script) -> None:
    script.train(session := script.attach("automatic"), 60)
    for name, layer, config in (
        ("set_lr", "up", {"factor": 0.5}),
        ("clip_layer", "down", {}),
        ("match_updates", "", {}),
        ("recycle", "up", {"next_layer": "down", "sample": script.x}),
        ("repair_scale", "", {"sample": script.x}),
        ("rewind", "", {}),
        ("restore_best", "", {}),
    ):
        try:
            receipt: Any = session.remedy(name, layer, **config)
        except esper.exceptions.EsperError as error:
            script.seen += [name, str(error)]
            continue
        script.seen.append(str(receipt))
        script.train(session, 3)
        session.undo(receipt)
    script.look(session)
    session.close()
    script.keep()


ACTS = (observes, acts_by_itself, asks, grafts, saves, remedies)


# -- what a script sets ---------------------------------------------------------------------------


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# A tensor on "meta" has no values: reading one of Esper's raises.
DEFAULTS: dict[str, tuple[Callable[[], Any], ...]] = {
    "another device, float64, deterministic": (
        lambda: default_device("meta"),
        lambda: default_dtype(torch.float64),
        deterministic,
    ),
    "a device in a block, bfloat16, anomalies, warnings": (
        lambda: torch.device("meta"),
        lambda: default_dtype(torch.bfloat16),
        lambda: torch.autograd.set_detect_anomaly(True),
        warnings_as_errors,
    ),
}


class WithoutDevice(TorchFunctionMode):
    """Notes the lines of Esper that make a tensor on the default device."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        if function in _device_constructors() and given.get("device") is None:
            self._look(function)
        return function(*args, **given)

    def _look(self, function: Any) -> None:
        frame = sys._getframe(2)
        while frame.f_back is not None and "/torch/" in frame.f_code.co_filename:
            if "/torch/optim/" in frame.f_code.co_filename:
                return  # a graft's optimizer keeps its step counter where the script's does
            frame = frame.f_back
        if frame.f_code.co_filename.startswith(PACKAGE):
            self.lines.add(f"{frame.f_code.co_filename}:{frame.f_lineno} {function.__name__}")


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], tuple[list[Any], set[str]]]:
    """What a script sees without any of it, and the lines that would depend on the device."""

    @functools.cache
    def run(act: Callable[[Script], None]) -> tuple[list[Any], set[str]]:
        script = Script(tmp_path_factory.mktemp("usual"))
        with WithoutDevice() as mode:
            act(script)
        return script.seen, mode.lines

    return run


@pytest.mark.parametrize("act", ACTS)
def test_every_tensor_of_esper_is_made_on_a_device_of_its_own_choice(act: Any, usual: Any) -> None:
    assert not usual(act)[1]


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("act", ACTS)
def test_a_run_is_the_same_to_the_bit_whatever_the_defaults(
    act: Any, kind: str, usual: Any, tmp_path: Path
) -> None:
    script = Script(tmp_path)
    with ExitStack() as stack:
        for setting in DEFAULTS[kind]:
            stack.enter_context(setting())
        act(script)
    assert repr(script.seen) == repr(usual(act)[0])
