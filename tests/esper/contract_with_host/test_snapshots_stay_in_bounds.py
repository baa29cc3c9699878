"""D9: snapshots stay inside a stated bound, outside the device, and cost no hashing in the loop."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper import Session
from esper.exceptions import ConfigurationError, UndoError
from esper.grafting import digest
from esper.grafting.tensors import digests
from esper.grafting.tensors.saved_values import all_same_bits, differs
from esper.sdk.snapshot_limit import GIB, VARIABLE, memory_bytes, snapshot_limit

KIB = 1 / (1 << 20)  # in GiB
LAYERS = ("0", "2", "4", "6")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    pairs = [(nn.Linear(16, 16), nn.ReLU()) for _ in LAYERS]
    return nn.Sequential(*(module for pair in pairs for module in pair))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, session: Session | None) -> None:
    device = next(model.parameters()).device
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(device)
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), x)
    torch.autograd.backward(loss)
    optimizer.step()
    if session is not None:
        session.step(loss)


def start(memory: float | None) -> tuple[nn.Module, torch.optim.Optimizer, Session]:
    model = perceptron()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    session = esper.attach(model, optimizer, snapshot_memory=memory)
    for _ in range(12):
        step(model, optimizer, session)
    return model, optimizer, session


@pytest.mark.parametrize(("kib", "kept"), [(1000, 3), (50, 2), (25, 1), (4, 0)])
def test_the_window_is_as_long_as_the_memory_allows(kib: float, kept: int) -> None:
    """A snapshot of this model takes 17 KiB and more with each graft."""
    model, optimizer, session = start(kib * KIB)
    receipts = []
    for layer in LAYERS:
        receipts.append(session.graft(layer, "proj_ia3"))
        step(model, optimizer, session)
    assert [r.can_undo_hard for r in receipts] == [False] * (4 - kept) + [True] * kept
    assert sum(r.snapshot_bytes for r in receipts) <= kib * 1024
    told = [f for f in session.findings() if "a snapshot takes" in f.observed]
    assert len(told) == (kept < 3)
    if kept:
        assert session.undo(receipts[-1]).exact
        return
    assert "keeps what the model has learned" in told[0].observed
    with pytest.raises(UndoError, match="only a soft undo"):
        session.undo(receipts[-1])
    session.undo(receipts[-1], hard=False)


def test_the_guard_takes_a_graft_out_without_a_snapshot() -> None:
    model, optimizer, session = start(0)
    receipt = session.graft("0", "proj_ia3")
    step(model, optimizer, session)
    session.step(float("nan"))
    assert not receipt.present


def test_the_limit_comes_from_the_argument_the_environment_or_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert snapshot_limit(None) == memory_bytes() // 4
    assert snapshot_limit(1.5) == GIB * 3 // 2
    monkeypatch.setenv(VARIABLE, "2")
    assert snapshot_limit(None) == 2 * GIB
    assert snapshot_limit(0) == 0


@pytest.mark.parametrize("wrong", ["much", -1, float("nan"), True])
def test_a_wrong_limit_is_refused_at_attach(wrong: float) -> None:
    model = perceptron()
    with pytest.raises(ConfigurationError, match="snapshot_memory must be"):
        esper.attach(model, torch.optim.SGD(model.parameters(), 0.1), snapshot_memory=wrong)


def test_a_forgotten_snapshot_is_freed_and_its_digest_stays() -> None:
    model, optimizer, session = start(None)
    before = digest(model)
    receipt = session.graft("0", "proj_lora_64")
    assert receipt._snapshot is not None
    value = weakref.ref(receipt._snapshot.tensors[0].value)
    step(model, optimizer, session)
    assert session.undo(receipt).digest == before == receipt.digest_before
    deadline = time.monotonic() + 600.0
    while value() is not None and time.monotonic() < deadline:
        gc.collect()  # the thread that computed the digest may end a little later
    assert value() is None


def test_an_undo_hashes_nothing_in_the_training_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, session = start(None)
    receipt = session.graft("0", "proj_lora_64")
    step(model, optimizer, session)
    threads, real = [], digests._digest_of

    def noting(entries: object) -> str:
        threads.append(threading.current_thread())
        return real(entries)  # type: ignore[arg-type]

    monkeypatch.setattr(digests, "_digest_of", noting)
    undone = session.undo(receipt)
    assert threading.current_thread() not in threads
    assert undone.digest == digest(model)


# -- the comparison on a device -------------------------------------------------------------------

NAN, ZERO = float("nan"), 0.0


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128])
def test_bits_are_compared_not_numbers(dtype: torch.dtype) -> None:
    """As on a GPU, where one flag is read for all tensors."""
    values = torch.tensor([[NAN, 1.0], [ZERO, -2.0]]).to(dtype)
    assert not differs(values, values.clone())
    assert not differs(values.t(), values.t().contiguous())
    other = values.clone()
    other[1, 0] = -other[1, 0] if not dtype.is_complex else complex(-0.0, 0.0)
    assert differs(values, other)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_other_dtypes_are_compared_too(dtype: torch.dtype) -> None:
    values = torch.tensor([1, 0, 1]).to(dtype)
    other = torch.tensor([1, 1, 1]).to(dtype)
    assert not differs(values, values.clone())
    assert differs(values, other)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_one_wrong_tensor_among_many_is_found(device: str) -> None:
    def pairs(wrong: int) -> list[tuple[Tensor, Tensor]]:
        made = [torch.full((5,), float(i), device=device) for i in range(20)]
        return [(t, t.cpu() + (i == wrong)) for i, t in enumerate(made)]

    assert all_same_bits(pairs(-1))
    assert not all_same_bits(pairs(17))
    assert all_same_bits([])
