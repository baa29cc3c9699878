"""What a remedy is: a small change of a run, beside the blueprints, that can be undone.

    why_not(target)  → a reason, before anything is touched
    apply(target)    → details, and what stays in force until the remedy is undone

A remedy that changes weights does so once. One that acts in each step stays in force as an
:class:`Effect`. The user's optimizers keep their groups and values between two steps either way.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from esper.contracts import Risk
from esper.contracts.remedies import in_words
from esper.exceptions import ConfigurationError
from esper.grafting.optimizers import unwrap_optimizer
from esper.grafting.slot import SLOT_NAME, find_host
from esper.grafting.surroundings import Surroundings
from esper.remedies.good_states import GoodStates


@dataclass(frozen=True, slots=True)
class Batch:
    """The arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, sample: Any) -> Batch | None:
        """From a tensor, a tuple or list of arguments, or a dict of named ones; None of None."""
        if sample is None or isinstance(sample, Batch):
            return sample
        if isinstance(sample, dict):
            return cls(kwargs=sample)
        return cls(tuple(sample) if isinstance(sample, tuple | list) else (sample,))

    def run(self, model: nn.Module) -> Any:
        return model(*self.args, **self.kwargs)


@dataclass(slots=True)
class Stop:
    """Whether the training loop is asked to stop.

    Attributes:
        obeyed_by: what stops the loop then, such as ``"the Trainer"``; empty: the loop of a script
            must look itself.
    """

    asked: bool = False
    obeyed_by: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """The run that a remedy changes.

    Attributes:
        layer: name of the layer; empty: the whole run.
        step: number of optimizer steps so far.
        sample: a batch of the model's inputs, None where there is none.
        states: earlier states of the run that were good, None where none are kept.
        stop: asks the loop to stop.
        evaluate: measures the held-out loss, NaN where there is none; None: the script has no
            such function. On several ranks all of them must call it.
        checkpoint: the script's own function that saves the run; None: there is none.
    """

    model: nn.Module
    surroundings: Surroundings
    layer: str = ""
    step: int = -1
    sample: Batch | None = None
    states: GoodStates | None = None
    stop: Stop = field(default_factory=Stop)
    evaluate: Callable[[], float] | None = None
    checkpoint: Callable[[], object] | None = None

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Without the wrappers of frameworks."""
        return [unwrap_optimizer(optimizer) for optimizer in self.surroundings.optimizers]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the layer and of what is inside it, or of the model, without grafts."""
        module = find_host(self.model, self.layer) if self.layer else self.model
        named = module.named_parameters()
        return [p for name, p in named if SLOT_NAME not in name.split(".")]


def nothing() -> None:
    """The end of a remedy that leaves nothing in force."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What a remedy did.

    Attributes:
        details: JSON values for a person.
        end: ends what stays in force; a second call does nothing.
    """

    details: dict[str, Any] = field(default_factory=dict)
    end: Callable[[], None] = nothing


class Remedy(ABC):
    """One kind of remedy; a file of the catalogue has one.

    Attributes:
        slug: the file's name.
        title: for people.
        phrase: what it does with its settings, for
            :func:`esper.contracts.remedies.in_words`; empty: the title.
        idea: what it does, one sentence.
        source: where it comes from.
        when: which situation it answers.
        risk: ``LOW`` where it changes no weight and can be ended at any time.
        changes_weights: it asks a person in supervised mode.
        stays: it stays in force until it is undone.
        begins_anew: states of the run from before it are not offered to rewind to.
        asks: a person decides, in every mode.
        needs_sample: it needs a batch of the model's inputs.
        works_on_parts: it is as exact where each rank holds only a part of each tensor.
        scope: ``"run"``, ``"layer"``, or ``"both"``: what it may be applied to.
    """

    slug: ClassVar[str]
    title: ClassVar[str]
    phrase: ClassVar[str] = ""
    idea: ClassVar[str]
    source: ClassVar[str]
    when: ClassVar[str]
    risk: ClassVar[Risk]
    changes_weights: ClassVar[bool] = False
    stays: ClassVar[bool] = True
    needs_sample: ClassVar[bool] = False
    begins_anew: ClassVar[bool] = False
    asks: ClassVar[bool] = False
    works_on_parts: ClassVar[bool] = False
    scope: ClassVar[str] = "run"

    @property
    def changes_nothing(self) -> bool:
        """It measures or saves something; there is nothing to judge and nothing to take back."""
        return not self.changes_weights and not self.stays

    def default_config(self) -> dict[str, Any]:
        return {}

    def check_config(self, config: dict[str, Any]) -> None:
        """Raises ``ConfigurationError`` for a value out of range."""
        return

    def in_words(self, config: dict[str, Any]) -> str:
        """What it would do with these settings; the others take their defaults."""
        return in_words(self.phrase or self.title, {**self.default_config(), **config})

    def done_in_words(self, details: dict[str, Any]) -> str:
        """What an :class:`Effect` with these ``details`` did, such as "Rewind to step 120"."""
        settings = self.default_config()
        done = {name: details[name] for name in settings if name in details}
        if "step" in settings and "to_step" in details:
            done["step"] = details["to_step"]
        return self.in_words(done)

    def so_far(self, details: dict[str, Any]) -> str:
        """What it has done beyond :meth:`done_in_words`, for people; empty: no more is known.

        Args:
            details: of the :class:`Effect`; a remedy that stays in force keeps them up to date.
        """
        return ""

    def why_not(self, target: Target, config: dict[str, Any]) -> str:
        """Why it cannot be applied here, a sentence; empty: it can. Changes nothing."""
        return ""

    @abstractmethod
    def apply(self, target: Target, config: dict[str, Any]) -> Effect:
        """Does it. The caller restores the run where this raises."""

    def on_agreed(self, target: Target) -> None:
        """What is done once the remedy is applied on all ranks, and cannot fail on one of them."""
        return

    def resume(self, target: Target, details: dict[str, Any]) -> Effect:
        """In a process that continues the run: what stays in force, without what was done once.

        Args:
            details: of the earlier :class:`Effect`.
        """
        return self.apply(target, {name: details[name] for name in self.default_config()})

    def config_for(self, config: dict[str, Any]) -> dict[str, Any]:
        """The whole configuration, checked.

        Raises:
            ConfigurationError: a name is unknown, or a value is out of range.
        """
        full = self.default_config()
        unknown = sorted(config.keys() - full.keys())
        if unknown:
            known = ", ".join(sorted(full)) or "none"
            raise ConfigurationError(
                f"{self.slug} has no setting {unknown[0]!r}; its settings are: {known}"
            )
        full.update(config)
        self.check_config(full)
        return full


def check_above_zero(config: dict[str, Any], name: str, *, most: float = math.inf) -> None:
    """Raises ``ConfigurationError`` unless the setting is a number above 0, at most ``most``."""
    value = config[name]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= most or math.isinf(value):
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise ConfigurationError(f"{name} must be a number above 0{limit}, got {value!r}")


def no_optimizer(target: Target) -> str:
    """A reason where nothing trains the model."""
    return "" if target.optimizers else "the session was given no optimizer"


def no_rate(target: Target) -> str:
    """A reason where an optimizer has no learning rate."""
    rateless = [o for o in target.optimizers if any("lr" not in g for g in o.param_groups)]
    return f"{type(rateless[0]).__name__} has no learning rate" if rateless else ""


def many_gradients(target: Target) -> str:
    """A reason where one step of an optimizer computes its gradients more than once.

    What is done to the first gradient is not done to the others, which are compared with it.
    """
    several = any(isinstance(o, torch.optim.LBFGS) for o in target.optimizers)
    return "LBFGS computes its gradients more than once in a step" if several else ""


def not_trained(target: Target) -> str:
    """A reason where no optimizer trains a tensor of the layer."""
    groups = [group for optimizer in target.optimizers for group in optimizer.param_groups]
    held = {id(p) for group in groups for p in group["params"]}
    trained = any(p.requires_grad and id(p) in held for p in target.parameters)
    return "" if trained else "no optimizer trains the layer"
