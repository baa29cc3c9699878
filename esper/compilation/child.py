"""``python -m esper.compilation.child``: builds kernels for the worker that started it.

Orders arrive on standard input, answers go to standard output; other output goes to standard error,
whose last lines the worker keeps if this process ends. The order of the first lines matters: the
process drops its rights before it imports torch, which starts threads.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from esper.compilation import confinement
from esper.compilation.builder import KEY_FILE, BuildOrder
from esper.compilation.bundle import report_to_wire
from esper.contracts import CostForecast, KernelDraft, codec
from esper.contracts.kernels import REPORT_FILE, SPEC_FILE
from esper.exceptions import EsperError, KernelBuildError


def main() -> None:
    parent, memory_mib = int(sys.argv[1]), int(sys.argv[2])
    confinement.end_with_parent(parent)
    confinement.die_first()
    answers = _private_answers()
    network = confinement.close_network()
    faulthandler.enable()

    from esper.compilation import warm_up

    warm_up()
    confinement.limit_memory(memory_mib)
    _say(answers, answer="ready", network=network, devices=_devices(), versions=_versions())
    for line in sys.stdin.buffer:
        _obey(codec.decode(line), answers)


def _private_answers() -> BinaryIO:
    """Reserves standard output for answers: output that a blueprint prints is no answer."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _obey(message: dict[str, Any], answers: BinaryIO) -> None:
    order = BuildOrder.from_wire(message)
    try:
        if message["act"] == "specify":
            _specify(order, answers)
        else:
            _draft(order, Path(message["folder"]), answers)
    except KernelBuildError as error:
        _say(answers, answer="failed", error=str(error), permanent=error.permanent)
    except (EsperError, RuntimeError, MemoryError, OSError) as error:
        permanent = isinstance(error, EsperError)
        text = f"{type(error).__name__}: {error}"
        _say(answers, answer="failed", error=text, permanent=permanent)


def _specify(order: BuildOrder, answers: BinaryIO) -> None:
    from esper import blueprints
    from esper.compilation import kernel_key

    blueprint = blueprints.get_blueprint(order.blueprint)
    reason = blueprint.refusal(order.layer)
    if reason:
        raise KernelBuildError(
            f"{blueprint.slug} does not fit {order.layer.name}: {reason}", permanent=True
        )
    key = kernel_key(order.layer, order.blueprint, order.config, capability=order.capability)
    forecast = blueprint.forecast(order.layer, key.config)
    _say(answers, answer="specified", key=key.to_wire(), forecast=forecast.to_wire())


def _draft(order: BuildOrder, folder: Path, answers: BinaryIO) -> None:
    from esper.compilation import draft_kernel

    def on_step(step: str, forecast: CostForecast) -> None:
        _say(answers, answer="step", step=step, forecast=forecast.to_wire())

    draft = draft_kernel(
        order.layer,
        order.blueprint,
        order.config,
        capability=order.capability,
        on_step=on_step,
    )
    _write(draft, folder)
    _say(answers, answer="drafted", devices=_devices())


def _write(draft: KernelDraft, folder: Path) -> None:
    (folder / KEY_FILE).write_bytes(codec.encode(draft.key.to_wire()))
    (folder / SPEC_FILE).write_bytes(codec.encode(asdict(draft.spec)))
    (folder / REPORT_FILE).write_bytes(codec.encode(report_to_wire(draft.report)))


def _say(answers: BinaryIO, **answer: Any) -> None:
    answers.write(codec.encode(answer) + b"\n")
    answers.flush()


def _versions() -> dict[str, str]:
    import torch

    cuda = {"cuda": str(torch.version.cuda)} if torch.cuda.is_available() else {}
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        **cuda,
    }


def _devices() -> list[dict[str, Any]]:
    """The processor, then each GPU, with memory in MiB; for the processor, the host's."""
    import torch

    from esper.compilation.key import capability, device_name

    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": device_name(torch.device("cpu")), "capability": "cpu"}
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        found.append(
            {
                "device": str(device),
                "name": device_name(device),
                "capability": capability(device),
                "memory_free_mib": free >> 20,
                "memory_total_mib": total >> 20,
            }
        )
    return found


if __name__ == "__main__":
    main()
