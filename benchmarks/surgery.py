"""The cost of changing a model in training: Esper, Composer, PEFT and GroMo.

    python -m benchmarks.surgery [--quick] [--device cuda] [--json FILE]

All four change the same trained perceptron (same width, depth, optimizer, weights) in turns of one
run: one layer gets 64 more directions. They do not do the same work, so the table shows measured
results of each: whether the output stayed the same, whether the optimizer still holds the moments
of unchanged weights, whether it trains the new weights, and whether the change can be undone to the
bit.

The others are not in Esper's requirements; missing ones are reported and skipped:

    pip install peft==0.21.2 && pip install --no-deps gromo==0.1.0 deprecated wrapt mosaicml==0.32.1

Of Composer only ``composer/utils/module_surgery.py`` is loaded: its package pins a torch < 2.7.1.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.figures import Budget, Figure, write_json
from esper import blueprints, grafting
from esper.grafting import Receipt, Snapshot, Surroundings

DEPTH = 6
FEATURES = 64
CLASSES = 10
DIRECTIONS = 64  # rank of the update, or neurons that are added
WIDTHS = {"1 M": 440, "6 M": 1090, "25 M": 2230}  # parameters -> width of the hidden layers
WIDTHS_CUDA = {**WIDTHS, "124 M": 4990}
BUDGET = Budget("p95", 10.0, "ms")
NO_BUDGET = Budget("p95", None, "ms")


@dataclass(slots=True)
class Trained:
    """A model in training, its batch, and its optimizer."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    target: Tensor

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(self.model(self.x), self.target))
            self.optimizer.step()

    @torch.no_grad()
    def output(self) -> Tensor:
        output: Tensor = self.model(self.x)
        return output


@dataclass(slots=True)
class Observed:
    """Cost and results of one way of changing the model."""

    pauses_ms: list[float] = field(default_factory=list)
    undos_ms: list[float] = field(default_factory=list)
    output_change: float = 0.0
    moments_kept: bool = True
    new_weights_train: bool = True
    exact_undo: bool | None = None  # None: it has no undo


Change = Callable[[Trained], tuple[float, Callable[[], None] | None]]


def perceptron(width: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(FEATURES, width), nn.ReLU()]
    for _ in range(DEPTH - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def trained(width: int, build: Callable[[int], nn.Module] = perceptron) -> Trained:
    """Trained for three steps, so that the optimizer has its moments."""
    torch.manual_seed(0)
    model = build(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    case = Trained(model, optimizer, torch.randn(32, FEATURES), torch.randint(CLASSES, (32,)))
    case.train(3)
    return case


# -- the ways of changing it ------------------------------------------------------------------


def with_esper(case: Trained, *, hard: bool) -> tuple[float, Callable[[], None]]:
    """A certified low-rank graft from a prepared kernel, with a snapshot before it."""
    layer = next(
        info
        for info in grafting.trace_layers(case.model, lambda: case.model(case.x))
        if info.name == "4"
    )
    grafting.prepare_slots(case.model, ["4"])  # as a session does when it attaches
    blueprint = blueprints.get_blueprint("proj_lora_64")
    graft = blueprint.build(layer, seed=1)
    memory = grafting.SnapshotMemory.reserve(case.model, (case.optimizer,))  # as a session does
    started = _now()
    receipt: Receipt = grafting.apply_graft(
        case.model,
        layer,
        blueprint,
        surroundings=Surroundings((case.optimizer,)),
        graft=graft,
        seed=1,
        memory=memory,
    )
    return _since(started), partial(_undo_with_esper, receipt, hard)


def _undo_with_esper(receipt: Receipt, hard: bool) -> None:
    receipt.undo(hard=hard)


def with_peft(case: Trained) -> tuple[float, Callable[[], None]]:
    """``inject_adapter_in_model``; the optimizer is updated by hand, as its documentation says."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=DIRECTIONS, target_modules=["4"], lora_alpha=16)
    started = _now()
    peft.inject_adapter_in_model(config, case.model)
    fresh = [p for name, p in case.model.named_parameters() if "lora_" in name]
    case.optimizer.add_param_group({"params": fresh})
    pause = _since(started)

    def undo() -> None:
        wrapped: Any = case.model.get_submodule("4")
        case.model._modules["4"] = wrapped.get_base_layer()
        for parameter in case.model.parameters():
            parameter.requires_grad_(True)
        del case.optimizer.param_groups[-1]

    return pause, undo


def with_composer(case: Trained) -> tuple[float, None]:
    """``replace_module_classes``: a wider stand-in replaces the layer."""
    surgery = _composers_surgery()
    target = case.model.get_submodule("4")

    def widen(module: nn.Module, number: int) -> nn.Module | None:
        return (
            _LowRankLinear(module) if module is target and isinstance(module, nn.Linear) else None
        )

    started = _now()
    surgery.replace_module_classes(case.model, {nn.Linear: widen}, optimizers=case.optimizer)
    return _since(started), None


class _LowRankLinear(nn.Module):
    """The replacement that a user of module surgery would write: copied weights plus an update."""

    def __init__(self, old: nn.Linear) -> None:
        super().__init__()
        self.base = nn.Linear(old.in_features, old.out_features)
        self.base.load_state_dict(old.state_dict())
        self.down = nn.Linear(old.in_features, DIRECTIONS, bias=False)
        self.up = nn.Linear(DIRECTIONS, old.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x) + self.up(self.down(x))
        return output


def gromos_perceptron(width: int) -> nn.Module:
    mlp = importlib.import_module("gromo.containers.growing_mlp")
    model: nn.Module = mlp.GrowingMLP(
        FEATURES, CLASSES, width, DEPTH, activation=nn.ReLU(), device=torch.get_default_device()
    )
    return model


def with_gromo(case: Trained) -> tuple[float, None]:
    """One growth step: statistics of one batch, the optimal update, at most 64 neurons added."""
    model: Any = case.model
    started = _now()
    model.set_growing_layers(index=2)
    model.init_computation()
    torch.autograd.backward(F.cross_entropy(model(case.x), case.target, reduction="sum"))
    model.update_computation()
    model.compute_optimal_updates(maximum_added_neurons=DIRECTIONS)
    model.reset_computation()
    model.dummy_select_update()
    model.currently_updated_layer.set_scaling_factor(1.0)
    model.apply_change()
    # The weights are new tensors: its examples create a new optimizer, without the moments.
    case.optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-3)
    return _since(started), None


def _composers_surgery() -> ModuleType:
    """Loads the one module without the package's imports."""
    if "composer" not in sys.modules:
        spec = importlib.util.find_spec("composer")
        places = list(spec.submodule_search_locations or []) if spec else []
        for name, path in (("composer", places), ("composer.utils", [f"{places[0]}/utils"])):
            package = ModuleType(name)
            package.__path__, package.__spec__ = path, spec
            sys.modules[name] = package
    return importlib.import_module("composer.utils.module_surgery")


# -- measurements -----------------------------------------------------------------------------


def observe(
    build: Callable[[int], nn.Module], change: Change, width: int, repeats: int
) -> Observed:
    """Apply one change to fresh copies of the trained model."""
    seen = Observed()
    for repeat in range(repeats + 1):
        case = trained(width, build)
        before, moments = case.output(), _moments(case)
        state = Snapshot.take(case.model, Surroundings([case.optimizer]))
        held = {id(p) for p in case.model.parameters()}
        pause, undo = change(case)
        if repeat == 0:  # the first repetition warms up
            seen.output_change = float((case.output() - before).abs().max())
            seen.moments_kept = all(
                _same(case.optimizer.state.get(p), moment) for p, moment in moments.items()
            )
            seen.new_weights_train = _new_weights_train(case, held)
            continue
        seen.pauses_ms.append(pause)
        if undo is not None:
            started = _now()
            undo()
            seen.undos_ms.append(_since(started))
            seen.exact_undo = seen.exact_undo is not False and not state.differences()
    return seen


def _moments(case: Trained) -> dict[nn.Parameter, Tensor]:
    return {p: case.optimizer.state[p]["exp_avg"].clone() for p in case.model.parameters()}


def _same(state: Any, moment: Tensor) -> bool:
    return bool(state) and torch.equal(state["exp_avg"], moment)


def _new_weights_train(case: Trained, held: set[int]) -> bool:
    fresh = [p for p in case.model.parameters() if id(p) not in held]
    before = [p.detach().clone() for p in fresh]
    case.train(2)
    moved = [not torch.equal(p, old) for p, old in zip(fresh, before, strict=True)]
    return bool(moved) and all(moved)


def _now() -> float:
    """Seconds, when a GPU has done what it was given."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _since(started: float) -> float:
    return (_now() - started) * 1e3


@dataclass(frozen=True, slots=True)
class Way:
    """One library's way, and its requirements."""

    name: str
    change: Change
    needs: str = ""
    build: Callable[[int], nn.Module] = perceptron


WAYS = (
    Way("esper, hard undo", partial(with_esper, hard=True)),
    Way("esper, soft undo", partial(with_esper, hard=False)),
    Way("peft", with_peft, needs="peft"),
    Way("composer", with_composer, needs="composer"),
    Way("gromo", with_gromo, needs="gromo", build=gromos_perceptron),
)


def measure(*, quick: bool = False) -> dict[tuple[str, str], Observed | str]:
    """(way, size) -> measurements, or why there are none."""
    torch.set_num_threads(1)
    results: dict[tuple[str, str], Observed | str] = {}
    widths = WIDTHS_CUDA if torch.get_default_device().type == "cuda" else WIDTHS
    for size, width in widths.items():
        repeats = 5 if quick else max(5, 40 * 440 // width)
        for way in WAYS:
            results[way.name, size] = _try(way, width, repeats)
    return results


def _try(way: Way, width: int, repeats: int) -> Observed | str:
    if way.needs and importlib.util.find_spec(way.needs) is None:
        return f"{way.needs} is not installed"
    with suppress(ImportError):
        return observe(way.build, way.change, width, repeats)
    return f"{way.needs} does not import beside torch {torch.__version__}"


def show(results: dict[tuple[str, str], Observed | str]) -> str:
    """A table for a terminal."""
    lines = [
        f"{'way':<18}{'model':>6}{'graft p50':>11}{'p95':>9}{'undo p50':>10}  "
        f"{'output moved':<14}{'moments kept':<14}{'new ones train':<16}undo to the bit"
    ]
    for (way, size), seen in results.items():
        if isinstance(seen, str):
            lines.append(f"{way:<18}{size:>6}  {seen}")
            continue
        undo = f"{statistics.median(seen.undos_ms):.2f}" if seen.undos_ms else "-"
        exact = {True: "yes", False: "no", None: "has none"}[seen.exact_undo]
        lines.append(
            f"{way:<18}{size:>6}{statistics.median(seen.pauses_ms):>11.2f}"
            f"{_p95(seen.pauses_ms):>9.2f}{undo:>10}  {seen.output_change:<14.2g}"
            f"{_yes(seen.moments_kept):<14}{_yes(seen.new_weights_train):<16}{exact}"
        )
    device = torch.get_default_device().type
    return "\n".join([*lines, f"milliseconds; one torch thread, device {device}"])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def figures(results: dict[tuple[str, str], Observed | str]) -> list[Figure]:
    """As written by all benchmarks; Esper's pause at 1 M parameters has the budget."""
    found = []
    for (way, size), seen in results.items():
        name = f"{way}, {size}"
        if isinstance(seen, str):
            found.append(Figure(name, NO_BUDGET, (), seen))
            continue
        own = way.startswith("esper") and size == "1 M"
        note = (
            f"output moved {seen.output_change:.2g}, moments kept {seen.moments_kept}, new weights "
            f"train {seen.new_weights_train}, undo exact {seen.exact_undo}"
        )
        found.append(Figure(name, BUDGET if own else NO_BUDGET, tuple(seen.pauses_ms), note))
        if seen.undos_ms:
            found.append(Figure(f"{name}, undo", NO_BUDGET, tuple(seen.undos_ms), note))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use")
    torch.set_default_device(options.device)
    results = measure(quick=options.quick)
    print(show(results))
    if options.json:
        write_json(figures(results), options.json)


if __name__ == "__main__":
    main()
