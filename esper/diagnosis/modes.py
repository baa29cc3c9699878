"""In which mode the modules are whose result depends on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.diagnosis.facts import Modes
from esper.diagnosis.samples import is_readable
from esper.grafting.hooks import PassingHook
from esper.health.transfers import is_late

USUAL_UPDATES = 10  # that show how many forward passes an update has
_DROPOUT = nn.modules.dropout._DropoutNd
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class ModesProbe:
    """The mode of the modules whose result depends on it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [m for m in model.modules() if _depends_on_mode(m)]
        self._inside = {id(child): m for m in model.modules() for child in m.children()}
        self._seen_update = False
        norms = [m for m in self._modules if isinstance(m, BATCH_NORM)]
        counters = [m.num_batches_tracked for m in norms if m.num_batches_tracked is not None]
        at_once = [counter for counter in counters if not is_late(counter)]
        self._counter: Tensor | None = at_once[0] if at_once else None
        self._batches = int(self._counter) if self._counter is not None else 0
        self._updates = 0
        self._usual = 0
        self._blank: list[tuple[str, nn.Module]] = []
        self.facts = Modes()

    def on_update(self, step: int) -> None:
        """At an optimizer's step they are still in the mode of the forward pass."""
        self._count_batches()
        if not self._seen_update:
            self._seen_update = True
            self._modules = self._of_learning_parts()
            self._blank = self._set_alone_and_blank()
        elif self._blank:
            self._blank = [(name, m) for name, m in self._blank if self._is_set_alone(m)]
        training, old = sum([module.training for module in self._modules]), self.facts
        left = 0 if training else sum(self._is_left(module) for module in self._modules)
        if training and training == old.in_training:
            return  # as in the update before
        evaluating = left > 0
        again = evaluating and old.updates > 0
        self.facts = Modes(
            in_training=training,
            in_evaluation=left if evaluating else len(self._modules) - training,
            since_step=(old.since_step if again else step) if evaluating else 0,
            updates=old.updates + 1 if evaluating else 0,
            was_training=old.was_training or bool(training),
            extra_batches=old.extra_batches,
            extra_steps=old.extra_steps,
            evaluated_in_training=old.evaluated_in_training,
        )

    @property
    def without_statistics(self) -> tuple[str, ...]:
        """Batch norms that use statistics of no batch: in evaluation mode since the start."""
        return tuple(name for name, _ in self._blank)

    def _set_alone_and_blank(self) -> list[tuple[str, nn.Module]]:
        norms = [m for m in self._modules if isinstance(m, BATCH_NORM) and self._is_set_alone(m)]
        names = {id(module): name for name, module in self._model.named_modules()}
        return [(names[id(m)], m) for m in norms if _has_no_statistics(m)]

    def _is_set_alone(self, module: nn.Module) -> bool:
        inside = self._inside.get(id(module))
        return not module.training and inside is not None and inside.training

    def _is_left(self, module: nn.Module) -> bool:
        """In evaluation mode, and not by itself: a script that keeps its statistics on purpose sets
        this module alone, and what it is in trains."""
        inside = self._inside.get(id(module))
        return not module.training and (inside is None or not inside.training)

    def _of_learning_parts(self) -> list[nn.Module]:
        """Without those of frozen parts, which are kept in evaluation mode on purpose."""
        names = {id(module): name for name, module in self._model.named_modules()}
        return [m for m in self._modules if _learns(self._model, names[id(m)])]

    @property
    def counts(self) -> bool:
        """There is something to look at in each update."""
        return bool(self._modules)

    def evaluating(self, closed: Callable[..., Any]) -> list[RemovableHandle]:
        """Counts calls of these modules in training mode, until the hooks are removed."""

        def count(module: nn.Module, _: Any) -> None:
            if module.training:
                calls = self.facts.evaluated_in_training + 1
                self.facts = replace(self.facts, evaluated_in_training=calls)

        hook = PassingHook(closed(count))
        return [module.register_forward_pre_hook(hook) for module in self._modules]

    def _count_batches(self) -> None:
        """Compares the batches since the update before with those of the first updates."""
        if self._counter is None:
            return
        batches, self._batches = int(self._counter) - self._batches, int(self._counter)
        if self._updates < USUAL_UPDATES:
            self._updates += 1
            self._usual = max(self._usual, batches)
        elif batches >= self._usual + 2:
            old = self.facts
            self.facts = replace(
                old,
                extra_batches=old.extra_batches + batches - self._usual,
                extra_steps=old.extra_steps + 1,
            )


def drop_probability(module: nn.Module) -> float:
    """Probability with which it sets a value to 0 in training mode."""
    if isinstance(module, _DROPOUT):
        return float(module.p)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0
    return float(module.dropout) if isinstance(module, nn.MultiheadAttention) else 0.0


def _depends_on_mode(module: nn.Module) -> bool:
    if isinstance(module, _DROPOUT):
        return module.p > 0
    return isinstance(module, BATCH_NORM) and module.track_running_stats


def _has_no_statistics(norm: nn.Module) -> bool:
    """Its mean and variance are those with which it is made."""
    mean, variance = norm.running_mean, norm.running_var
    if not isinstance(mean, Tensor) or not isinstance(variance, Tensor) or not is_readable(mean):
        return False
    return not bool(mean.any()) and bool((variance == 1).all())


def _learns(model: nn.Module, name: str) -> bool:
    """The smallest part of the model around this module that has parameters trains one."""
    path = name.split(".")
    for end in range(len(path), -1, -1):
        part = model.get_submodule(".".join(path[:end]))
        trainable = [parameter.requires_grad for parameter in part.parameters()]
        if trainable:
            return any(trainable)
    return False
