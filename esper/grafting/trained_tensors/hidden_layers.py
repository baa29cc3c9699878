"""Finds layers that a module keeps in a plain list or dict, where ``parameters()`` misses them.

They take part in the forward pass and get gradients, and no optimizer trains them. A tensor is
reported only where it has a gradient and was not written to since it was first seen: a teacher that
is kept out of ``parameters()`` on purpose has no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import nn

from esper.contracts import Finding, Severity
from esper.fail_closed import contained
from esper.grafting.optimizers import parameters_of, unwrap_optimizer
from esper.grafting.trained_tensors.ledger import Problem, to_findings

_DEEPEST = 2  # lists in lists
_MOST = 1_000  # items of a list: a vocabulary or a data set has more, and no layers
_PLAIN = (list, tuple, dict)  # to go through another kind of list may run code of the script
_REMEDY = (
    "keep them in nn.ModuleList, nn.ModuleDict or nn.ParameterList, and make the optimizer "
    "afterwards; set requires_grad=False where they must not learn"
)


class HiddenLayers:
    """Of one model.

    The session asks a few times, not in each step.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[nn.Parameter, tuple[str, int]] = {}  # name, writes so far
        self.search()

    @contained("search for hidden layers", "Layers in plain lists are not told.")
    def search(self) -> None:
        """Looks for them in the attributes of all modules."""
        known = set(self._model.parameters())
        for name, parameter in _hidden(self._model):
            if parameter.is_inference():  # torch counts no writes to it
                continue
            if parameter.requires_grad and parameter not in known:
                self._seen.setdefault(parameter, (name, parameter._version))

    def findings(self, optimizers: Iterable[Any]) -> list[Finding]:
        """Those that have a gradient, and that nothing trains."""
        held = {id(p) for o in optimizers for p in parameters_of(unwrap_optimizer(o))}
        names = [
            name
            for parameter, (name, writes) in self._seen.items()
            if parameter.grad is not None and id(parameter) not in held
            if parameter._version == writes
        ]
        if not names:
            return []
        observed = (
            f"{len(names)} tensors, the first is {names[0]}, have a gradient, but are in a plain "
            "list or dict, where parameters() misses them: no optimizer trains them"
        )
        return to_findings([Problem("", Severity.SERIOUS, observed, _REMEDY)])


def _hidden(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, tensor) of all that is in a list, tuple or dict of a module."""
    for prefix, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "torch":
            continue  # its lists are no slips: FSDP keeps its flat parameters in one
        for key, value in list(vars(module).items()):
            # Torch's own registries and hooks begin with an underscore.
            if not key.startswith("_") and type(value) in _PLAIN:
                yield from _inside(f"{prefix}.{key}" if prefix else key, value, _DEEPEST)


def _inside(name: str, value: Any, deepest: int) -> Iterator[tuple[str, nn.Parameter]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for place, item in list(islice(items, _MOST)):
        here = f"{name}.{place}"
        # By its type: a proxy of the script may raise where it is asked for its class.
        if issubclass(type(item), nn.Module):
            if "_parameters" in vars(item):  # else torch's __init__ has not run
                for own, parameter in item.named_parameters():
                    yield f"{here}.{own}", parameter
        elif issubclass(type(item), nn.Parameter):
            yield here, item
        elif type(item) in _PLAIN and deepest > 1:
            yield from _inside(here, item, deepest - 1)
