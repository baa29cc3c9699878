"""Reads the gradients of a model, and how far each update moves a few elements of its weights.

What is computed of a few elements is computed for all tensors in one call: a call for each of a few
hundred tensors takes a host that feeds a GPU as long as a training step.

Shape legend: K tensors, F elements of each, R units of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper.diagnosis.facts import GradientRow, Gradients, UpdateSettings
from esper.diagnosis.samples import FEW, TABLES, TRANSPOSED, is_graft, plain_kind_of, sampled
from esper.diagnosis.updates import settings_of, strongest
from esper.health.optimizer_steps import dense, has_numbers, norms_of, spread_sample
from esper.health.transfers import HostTransfer, is_late

READINGS = 4  # a unit is dead when its gradient was zero in so many in a row
SMALLEST = 1e-6  # a smaller gradient may be the rounding error of a zero one
Samples = dict[int, Tensor]  # by ``id`` of the parameter


@dataclass(slots=True)
class _Row:
    norm: Tensor | None
    weight: Tensor | None
    dead: Tensor | None = None  # share of the units
    change: Tensor | None = None  # of a few elements of the weight, by this step
    rate: float = math.nan


@dataclass(slots=True)
class GradientProbe:
    """Reads all gradients at the end of an optimizer's step, before the script clears them."""

    model: nn.Module
    names: dict[int, str] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    parameters: dict[int, nn.Parameter] = field(default_factory=dict)
    readings: int = 0
    _rows: dict[int, _Row] = field(default_factory=dict)
    _still: Samples = field(default_factory=dict)  # int32 [R]: readings in a row without a gradient
    _before: Samples = field(default_factory=dict)  # of the weights, before this step
    _samples: Samples = field(default_factory=dict)  # of the weights, at the reading before
    _slopes: Samples = field(default_factory=dict)  # of the gradients
    _from_zero: Samples = field(default_factory=dict)  # bool []: it has begun at zero
    _settings: UpdateSettings = field(default_factory=UpdateSettings)  # of all in this step

    def __post_init__(self) -> None:
        self.refresh()

    def refresh(self) -> None:
        """Parameters were added or removed."""
        modules = dict(self.model.named_modules())
        self.names, self.kinds, self.parameters = {}, {}, {}
        for name, parameter in self.model.named_parameters():
            if has_numbers(parameter) and parameter.numel() and not is_graft(name):
                self.names[id(parameter)] = name
                module = modules.get(name.rpartition(".")[0], self.model)
                self.kinds[id(parameter)] = plain_kind_of(module)
                self.parameters[id(parameter)] = parameter
        known: tuple[dict[int, Any], ...] = (
            self._still, self._samples, self._rows, self._slopes, self._from_zero,
        )  # fmt: skip
        for entries in known:
            for gone in [key for key in entries if key not in self.names]:
                del entries[gone]

    @torch.no_grad()
    def remember(self, optimizer: torch.optim.Optimizer) -> None:
        """Before its step: a few elements, to see how far the step moves them."""
        self._before.update(_few_of({id(p): p for p in self._own(optimizer) if p.ndim > 1}))

    def forget(self) -> None:
        """Weights were put in by somebody else, so their change since is no update."""
        self._samples.clear()
        self._before.clear()

    def _own(self, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
        return [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if id(p) in self.names and p.requires_grad
        ]

    @torch.no_grad()
    def read(self, optimizer: torch.optim.Optimizer) -> None:
        """At the end of its step."""
        own = self._own(optimizer)
        self._settings = strongest(self._settings, settings_of(optimizer))
        gradients = [dense(p.grad) for p in own]
        norms, weights = norms_of(gradients), norms_of([p.detach() for p in own])
        rates = _rates_of(optimizer)
        for p, norm, weight in zip(own, norms, weights, strict=True):
            self._rows[id(p)] = _Row(norm, weight, rate=rates[id(p)])
        fitting = {
            id(p): gradient
            for p, gradient in zip(own, gradients, strict=True)
            if p.ndim > 1 and gradient is not None and gradient.shape == p.shape
        }
        self._slopes.update(_few_of(fitting))
        self._read_changes([p for p in own if id(p) in self._before])
        self._read_dead(own, fitting)

    def _read_changes(self, moved: Sequence[nn.Parameter]) -> None:
        before = {id(p): self._before.pop(id(p)) for p in moved}
        now = _few_of({id(p): p for p in moved})
        for keys, old_KF, new_KF in _together(before, now):
            for key, old_F in zip(keys, old_KF, strict=True):
                self._samples.setdefault(key, old_F)
            old_KF = old_KF.float()
            size_K = torch.linalg.vector_norm(old_KF, dim=1)
            change_K = torch.linalg.vector_norm(new_KF.float() - old_KF, dim=1) / size_K
            # Weights that begin at zero, as those of LoRA, grow by a multiple of themselves at
            # first.
            zero_K = size_K == 0
            known = [self._from_zero.get(key, zero) for key, zero in zip(keys, zero_K, strict=True)]
            if any(was.device != zero_K.device for was in known):
                known = [was.to(zero_K.device) for was in known]
            grows_K = zero_K | torch.stack(known)
            self._from_zero.update(zip(keys, grows_K, strict=True))
            for key, change in zip(keys, change_K.where(~grows_K, math.nan), strict=True):
                self._rows[key].change = change

    def _read_dead(self, own: Iterable[nn.Parameter], gradients: Mapping[int, Tensor]) -> None:
        alive = {}
        for p in own:
            if p.ndim < 2 or self.kinds[id(p)] in TABLES or self.kinds[id(p)] in TRANSPOSED:
                continue
            gradient = gradients.get(id(p))
            if gradient is None:
                self._still.pop(id(p), None)
            else:
                alive[id(p)] = sampled(gradient).any(1)
        # Where there were fewer readings so far, these are enough.
        still = {
            key: self._still.pop(key, torch.full_like(alive_R, READINGS - 1, dtype=torch.int32))
            for key, alive_R in alive.items()
        }
        for keys, alive_KR, still_KR in _together(alive, still):
            still_KR = (still_KR + 1).masked_fill(alive_KR, 0)
            self._still.update(zip(keys, still_KR.unbind(), strict=True))
            dead_K = (still_KR >= READINGS).float().mean(1)
            for key, dead in zip(keys, dead_K.unbind(), strict=True):
                self._rows[key].dead = dead

    @torch.no_grad()
    def collect(
        self, step: int, transfer: HostTransfer, *, rate: float, updates: int
    ) -> Callable[[], Gradients] | None:
        """Sends the reading of this step to the host; None where no optimizer made one.

        Returns:
            What makes the result, once the numbers have arrived.
        """
        if not self._rows:
            return None
        self.readings += 1
        rows, self._rows = self._rows, {}
        settings, self._settings = self._settings, UpdateSettings()
        names, moved = [self.names[key] for key in rows], self._moved(rows, rate)
        if any(id(p) not in self.names for p in self.model.parameters() if p.requires_grad):
            self.refresh()  # for the next reading
        for column in ("norm", "weight", "dead", "change"):
            transfer.add(column, [getattr(row, column) for row in rows.values()])
        transfer.add("moved", moved)
        seen = Gradients(
            step=step, readings=self.readings, rows=(), moved=math.nan, rate=rate, updates=updates,
            settings=settings,
        )  # fmt: skip
        rates = [row.rate for row in rows.values()]
        return partial(_gradients, seen, transfer, names, rates)

    def _moved(self, rows: Iterable[int], rate: float) -> list[Tensor]:
        """Of each matrix, int64 [2]: elements that are due to move, and those that have."""
        matrices = {key: p for key in rows if (p := self.parameters[key]).ndim > 1}
        now, before = _few_of(matrices), self._samples
        slopes, self._slopes = self._slopes, {}
        self._samples = {**before, **now}
        counts: list[Tensor] = []
        for _, slope_KF, old_KF, new_KF in _together(slopes, before, now):
            # From zero even the smallest step is seen, which says nothing of other weights.
            size_KF = slope_KF.abs()
            due_KF = (size_KF > SMALLEST) & (old_KF != 0)
            if new_KF.dtype in (torch.float32, torch.float64) and rate > 0:
                # A step this small is lost in these dtypes too, and was chosen so.
                due_KF &= size_KF * rate >= torch.finfo(new_KF.dtype).eps * old_KF.abs()
            moved_KF = due_KF & (old_KF != new_KF)
            counts.append(torch.stack([due_KF.sum(), moved_KF.sum()]))
        return counts


def _few_of(tensors: Mapping[int, Tensor]) -> Samples:
    """Copies of a few elements of each tensor [F]."""
    spread = {key: spread_sample(tensor.detach(), FEW) for key, tensor in tensors.items()}
    copies: Samples = {}
    for keys, few_KF in _together(spread):
        copies.update(zip(keys, few_KF.unbind(), strict=True))
    return copies


def _together(*columns: Samples) -> Iterator[tuple[Any, ...]]:
    """(keys, a stack of each column's tensors) for those of one form that all columns have.

    Without those whose device or shape the script has changed between two columns.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for key in columns[0]:
        row = [column[key] for column in columns if key in column]
        if len(row) == len(columns):
            form = tuple((tensor.device, tensor.dtype, tensor.shape) for tensor in row)
            groups.setdefault(form, []).append(key)
    for form, keys in groups.items():
        if len({(device, shape) for device, _, shape in form}) == 1:
            yield keys, *(torch.stack([column[key] for key in keys]) for column in columns)


def _rates_of(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """The learning rate of each parameter, by its ``id``; NaN for one that only a GPU knows."""
    found = {}
    for group in optimizer.param_groups:
        rate: Any = group.get("scheduled_lr", group.get("lr"))
        late = rate is None or (isinstance(rate, Tensor) and is_late(rate))
        found.update(dict.fromkeys(map(id, group["params"]), math.nan if late else float(rate)))
    return found


def _gradients(
    seen: Gradients, transfer: HostTransfer, names: Sequence[str], rates: Sequence[float]
) -> Gradients:
    """From what has arrived on the host."""
    columns = [transfer.take(name).tolist() for name in ("norm", "dead", "weight")]
    columns.append(transfer.take("change", not_a_number=math.nan).tolist())
    rows = tuple(GradientRow(*entry) for entry in zip(names, *columns, rates, strict=True))
    pairs = transfer.take("moved").tolist()
    due, moved = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    return replace(seen, rows=rows, moved=moved / due if due else math.nan)
