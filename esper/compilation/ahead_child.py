"""``python -m esper.compilation.ahead_child``: compiles a graft's code for the trainer.

The order is on standard input, see :mod:`esper.compilation.ahead`; the answer is the last line of
standard output. The order of the first lines matters: the process drops its rights and its priority
before it imports torch, which starts threads.
"""

from __future__ import annotations

import faulthandler
import json
import pickle
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from importlib import import_module
from operator import attrgetter
from types import FunctionType, ModuleType
from typing import Any

from esper.compilation import confinement


def main() -> None:
    confinement.end_with_parent(int(sys.argv[1]))
    with suppress(OSError):
        confinement.die_first()
    confinement.run_when_idle()
    confinement.close_network()
    faulthandler.enable()
    state = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the trainer that started this
    sys.path[:] = [*state["path"], *(entry for entry in sys.path if entry not in state["path"])]
    try:
        answer = _prepare(state)
    except Exception as error:
        from esper.fail_closed import short

        answer = {"reason": f"compiling failed: {short(error)}"}
    sys.stdout.write(f"\n{json.dumps(answer)}\n")
    sys.stdout.flush()


def _prepare(state: dict[str, Any]) -> dict[str, Any]:
    _take_over(state)
    from esper.compilation.ahead import load_order

    order = load_order(sys.stdin.buffer)
    _stand_in_for_script(order["region"])
    _move_to_front(state["home_of_torch"])
    _insert_graft(order)
    started = time.perf_counter()
    _compile(order)
    cold = time.perf_counter() - started
    # Of its own processor time: by the clock, it mostly waits for the training.
    started = time.process_time()
    _compile(order)
    return {"cold_seconds": cold, "warm_seconds": time.process_time() - started}


def _stand_in_for_script(region: Any) -> None:
    """What the script's own functions use, where the compiler looks it up: in ``__main__``."""
    kinds = {kind for module in region.modules() for kind in type(module).__mro__}
    own = [kind for kind in kinds if kind.__module__ == "__main__"]
    for kind in own:
        for member in vars(kind).values():
            if isinstance(member, FunctionType):
                names = {k: v for k, v in member.__globals__.items() if not k.startswith("__")}
                vars(sys.modules["__main__"]).update(names)


def _move_to_front(name: str) -> None:
    """The first module that has ``torch`` is the same as in the trainer."""
    import torch

    stand_in = ModuleType(name)
    vars(stand_in)["torch"] = torch
    others = {key: module for key, module in sys.modules.items() if key != name}
    first = sys.modules.get(name, stand_in)
    sys.modules.clear()
    sys.modules.update({name: first, **others})


def _take_over(state: dict[str, Any]) -> None:
    """The trainer's settings, which are part of the cache's key or decide which code is made."""
    import torch

    torch.set_num_threads(state["threads"])
    torch.set_default_dtype(state["default_dtype"])
    torch.use_deterministic_algorithms(
        state["deterministic"][0], warn_only=state["deterministic"][1]
    )
    for path, value in state["backends"].items():
        holder, _, name = path.rpartition(".")
        if attrgetter(path)(torch) != value:
            setattr(attrgetter(holder)(torch), name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that this torch is about to drop
        for name, config in state["configs"].items():
            import_module(name).load_config(config)
    inductor: Any = import_module("torch._inductor.config")
    inductor.compile_threads = 1
    confinement.limit_memory(state["memory_bytes"] >> 20)
    if torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, state["memory_bytes"] / total))


def _insert_graft(order: dict[str, Any]) -> None:
    """The graft as the trainer will insert it. Its certificate is of no use here."""
    from esper.blueprints import get_blueprint
    from esper.contracts import Certificate
    from esper.grafting.changes.apply import insert_graft
    from esper.grafting.manifest import GraftRecord
    from esper.grafting.slot import find_host
    from esper.grafting.surroundings import BARE

    region, layer = order["region"], order["layer"]
    blueprint = get_blueprint(order["blueprint"])
    host = find_host(region, layer.name)
    config = blueprint.config_for(layer, order["config"])
    device = next((p.device for p in host.parameters()), None)
    graft = blueprint.build(layer, config, seed=order["seed"], device=device)
    graft.train(host.training)
    graft.inherit(host)
    record = GraftRecord(
        adaptation="",
        layer=layer,
        blueprint=blueprint.slug,
        version=blueprint.version,
        config=config,
        seed=order["seed"],
        step=0,
        certificate=Certificate(0.0, 0.0, True, True, True, 0, 0),
    )
    insert_graft(region, record, graft, BARE)


def _compile(order: dict[str, Any]) -> None:
    """Compiles forward and backward as the trainer will."""
    import torch

    region, call, settings = order["region"], order["call"], order["settings"]
    torch.compiler.reset()
    arguments = {"dynamic": settings["dynamic"], "options": settings["options"]}
    if settings["in_place"]:
        region.compile(**arguments)
        entry = region
    else:
        entry = torch.compile(region, **arguments)
    region.train(call.training)
    _run(entry, call, gradients=call.gradients)
    if order["evaluates"]:
        region.eval()
        _run(entry, call, gradients=False)


def _run(entry: Any, call: Any, *, gradients: bool) -> None:
    import torch

    from esper.compilation.ahead import blanks, results_with_gradients

    args, kwargs = blanks((call.args, call.kwargs))
    narrowed: Any = nullcontext()
    if call.autocast is not None:
        device, dtype, cached = call.autocast
        narrowed = torch.autocast(device, dtype, cache_enabled=cached)
    with torch.set_grad_enabled(gradients):
        with narrowed:
            output = entry(*args, **kwargs)
        ends = results_with_gradients(output)
        if ends:
            torch.autograd.backward(ends, [torch.zeros_like(end) for end in ends])


if __name__ == "__main__":
    main()
