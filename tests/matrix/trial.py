"""One model under test: watched, grafted, trained, undone, and compared with an unchanged copy.

No check relies on Esper's own answer: weights, optimizer and random streams are hashed here, and
losses are compared with those of a model without Esper.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import esper
from esper import blueprints
from esper.blueprints import Blueprint
from esper.contracts import LayerInfo, Severity
from esper.exceptions import CertificateError, IncompatibleLayerError
from esper.grafting import Receipt
from esper.sdk.session import Session
from tests.matrix.zoo import Specimen

WARM_STEPS = 3
SEED = 11


@dataclass
class Training:
    """A user's training loop."""

    specimen: Specimen
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: list[Any]
    loss: Callable[[Any, Any], Tensor]
    session: Session | None = None
    taken: int = 0

    @classmethod
    def begin(cls, specimen: Specimen, *, attached: bool) -> Training:
        random.seed(SEED)
        numpy.random.seed(SEED)
        torch.manual_seed(SEED)
        model, batches, loss = specimen.make()
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        training = cls(specimen, model, optimizer, batches, loss)
        if attached:
            training.session = esper.attach(model, optimizer, mode="observe")
        return training

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(self.model, self.batches[self.taken % len(self.batches)])
        loss.backward()
        self.optimizer.step()
        self.taken += 1
        if self.session is not None:
            self.session.step(loss)
        return loss.item()

    def run(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]

    def evaluated(self) -> Tensor:
        """The loss of one batch in eval mode, without gradients."""
        self.model.eval()
        with torch.no_grad():
            loss = self.loss(self.model, self.batches[0])
        self.model.train()
        return loss

    def close(self) -> None:
        if self.session is not None:
            self.session.close()


@dataclass
class Outcome:
    """One blueprint at one layer: grafted, or refused with a reason.

    Attributes:
        equal_losses: after the undo, before the first that differs from the unchanged run's.
        faults: failed checks, as sentences.
    """

    layer: str
    kind: str
    blueprint: str
    refused: str = ""
    equal_losses: int = 0
    faults: list[str] = field(default_factory=list)


def fingerprint(training: Training) -> str:
    """Hex SHA-256 over tensors, ties, flags, gradients, optimizer and random streams."""
    total = hashlib.sha256()
    for entry in (*_model_entries(training.model), *_optimizer_entries(training.optimizer)):
        total.update(pickle.dumps(entry))
    streams = (torch.get_rng_state().tolist(), numpy.random.get_state(), random.getstate())
    total.update(pickle.dumps(streams))
    return total.hexdigest()


def _model_entries(model: nn.Module) -> Iterator[Any]:
    first: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        yield prefix, type(module).__name__, module.training
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                yield prefix, name, None
                continue
            tie = first.setdefault(id(tensor), f"{prefix}.{name}")
            gradient = None if tensor.grad is None else _bytes(tensor.grad)
            yield prefix, name, tie, tensor.requires_grad, _bytes(tensor), gradient


def _optimizer_entries(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    saved = optimizer.state_dict()
    yield saved["param_groups"]
    for place, state in sorted(saved["state"].items()):
        yield place, {k: _bytes(v) if isinstance(v, Tensor) else v for k, v in state.items()}


def _bytes(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
    return str(tensor.dtype), tuple(tensor.shape), flat.detach().numpy().tobytes()


def unchanged_losses(specimen: Specimen) -> tuple[list[float], Tensor]:
    """Of a run without Esper, the first ``WARM_STEPS`` included, and what eval mode gives then."""
    training = Training.begin(specimen, attached=False)
    return training.run(WARM_STEPS + specimen.steps), training.evaluated()


def watched_losses(specimen: Specimen) -> tuple[list[float], Tensor, list[Any]]:
    """Of a run that is attached and only observed; with its findings."""
    training = Training.begin(specimen, attached=True)
    losses = training.run(WARM_STEPS + specimen.steps), training.evaluated()
    assert training.session is not None
    findings = training.session.findings()
    training.close()
    return *losses, findings


def seen_layers(specimen: Specimen) -> tuple[LayerInfo, ...]:
    training = Training.begin(specimen, attached=True)
    training.run(1)
    assert training.session is not None
    training.close()
    return training.session.layers


def representatives(layers: tuple[LayerInfo, ...], count: int) -> list[LayerInfo]:
    """The first and the last of each kind of layer; those called several times count apart, as do
    those whose output a cache keeps."""
    kinds: dict[Any, list[LayerInfo]] = {}
    for layer in layers:
        why_not = not layer.graftable and layer.reason
        keeps = bool(layer.cached_channels)  # keys or values, which kv_cache_8bit rounds
        key = (layer.kind, layer.calls > 1, keeps, layer.graftable, why_not)
        kinds.setdefault(key, []).append(layer)
    return [layer for same in kinds.values() for layer in [*same[: count - 1], same[-1]][:count]]


def refusals(specimen: Specimen, pairs: Sequence[tuple[str, str]]) -> list[str]:
    """The reasons why these blueprints, given as (layer, slug), are not grafted.

    Raises:
        AssertionError: one of them was, or left a trace.
    """
    training = Training.begin(specimen, attached=True)
    training.run(1)
    assert training.session is not None
    before = fingerprint(training)
    reasons = []
    for layer, slug in pairs:
        try:
            training.session.graft(layer, slug)
        except IncompatibleLayerError as error:
            reasons.append(error.reason)
        else:
            raise AssertionError(f"{slug} was grafted into {layer}")
    assert fingerprint(training) == before
    training.close()
    return reasons


def examine(
    specimen: Specimen,
    expected: list[float],
    layer: LayerInfo,
    blueprint: Blueprint,
    *,
    steps: int | None = None,
) -> Outcome:
    """Grafts, trains on, undoes, and trains again beside what the unchanged run did.

    Args:
        expected: losses of the unchanged run from its first step on.
        steps: fewer than the specimen's own.
    """
    steps = specimen.steps if steps is None else steps
    outcome = Outcome(layer.name, layer.kind, blueprint.slug)
    training = Training.begin(specimen, attached=True)
    try:
        _examine(training, outcome, expected[WARM_STEPS : WARM_STEPS + steps], blueprint)
    except Exception as error:
        outcome.faults.append(f"{type(error).__name__}: {error}")
    finally:
        training.close()
    return outcome


def _examine(
    training: Training, outcome: Outcome, expected: list[float], blueprint: Blueprint
) -> None:
    session = training.session
    assert session is not None
    training.run(WARM_STEPS)
    before = fingerprint(training)
    try:
        needed = [session.graft(outcome.layer, slug) for slug in sorted(blueprint.requires)[-1:]]
        receipt = session.graft(outcome.layer, blueprint.slug)
    except (IncompatibleLayerError, CertificateError) as error:
        outcome.refused = getattr(error, "reason", "") or str(error)
        if isinstance(error, CertificateError):
            outcome.faults.append(f"not certified: {error}")
        if fingerprint(training) != before:
            outcome.faults.append("refused, but something was changed")
        return
    _train_grafted(training, outcome, expected, receipt)
    undone = session.undo((*needed, receipt)[0])  # the oldest takes the other along
    if fingerprint(training) != before:
        outcome.faults.append("after the undo, something is not as it was")
    if not undone.exact:
        outcome.faults.append("the undo says of itself that it is not exact")
    training.taken -= len(expected)  # the data cursor is the user's own
    again = training.run(len(expected))
    outcome.equal_losses = next(
        (i for i, (a, b) in enumerate(zip(again, expected, strict=True)) if a != b), len(again)
    )
    if again != expected:
        outcome.faults.append(f"the loss differs from step {outcome.equal_losses} after the undo")


def _train_grafted(
    training: Training, outcome: Outcome, expected: list[float], receipt: Receipt
) -> None:
    calls: list[int] = []
    receipt.graft.register_forward_hook(lambda *_: calls.append(1))
    start = {name: p.detach().clone() for name, p in receipt.graft.named_parameters()}
    steps = len(expected)
    losses = training.run(steps)
    if losses[0] != expected[0] and receipt.certificate.tolerance == 0.0:
        outcome.faults.append(f"the first loss is {losses[0]!r}, without the graft {expected[0]!r}")
    if len(calls) != steps * receipt.record.layer.calls:
        outcome.faults.append(f"it ran {len(calls)} times in {steps} steps")
    still = [n for n, p in receipt.graft.named_parameters() if torch.equal(p.detach(), start[n])]
    if still:
        outcome.faults.append(f"not trained: {', '.join(still)}")
    assert training.session is not None
    found = [f for f in training.session.findings() if f.severity is not Severity.INFO]
    outcome.faults += [f"finding: {f.layer}: {f.observed}" for f in found]


def all_outcomes(specimen: Specimen) -> Iterator[Outcome]:
    """Every blueprint at some layers of each kind."""
    expected, _ = unchanged_losses(specimen)
    for layer in representatives(seen_layers(specimen), specimen.layers_per_kind):
        for blueprint in blueprints.list_blueprints():
            yield examine(specimen, expected, layer, blueprint)
