"""The cache key of a kernel: everything that it depends on."""

from __future__ import annotations

import platform
from typing import Any

import torch

from esper import blueprints
from esper.contracts import KernelKey, LayerInfo
from esper.exceptions import KernelBuildError


def capability(device: torch.device | str | None = None) -> str:
    """The capability of a device: ``cpu`` or ``cuda.sm90``.

    Args:
        device: None: this process's first GPU, or its processor if there is none.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type != "cuda":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(chosen)
    return f"cuda.sm{major}{minor}"


def capabilities() -> list[str]:
    """All capabilities of this machine, without duplicates: ``["cpu", "cuda.sm90"]``."""
    gpus = (torch.device("cuda", index) for index in range(torch.cuda.device_count()))
    return ["cpu", *sorted({capability(gpu) for gpu in gpus})]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and widest instruction set.

    Raises:
        KernelBuildError: not permanent: this machine does not have the device, another may.
    """
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise KernelBuildError(f"this machine has no device {device}", permanent=False)
    return torch.cuda.get_device_name(device)


def kernel_key(
    layer: LayerInfo,
    blueprint: str,
    config: dict[str, Any] | None,
    *,
    capability: str | None = None,
) -> KernelKey:
    """The key of ``blueprint`` at ``layer``, built by this process.

    Args:
        config: settings that differ from the blueprint's defaults.
        capability: target of the kernel; None: the capability of the layer's device.

    Raises:
        UnknownBlueprintError: no blueprint has this slug or id.
        IncompatibleLayerError, ConfigurationError: layer or settings do not fit.
        KernelBuildError: this machine lacks the layer's device, or its capability differs.
    """
    chosen = blueprints.get_blueprint(blueprint)
    device = torch.device(layer.device)
    name = device_name(device)
    return KernelKey(
        blueprint=chosen.slug,
        blueprint_version=chosen.version,
        config=chosen.config_for(layer, config),
        layer_kind=_kind(layer),
        in_shape=layer.in_shape,
        out_shape=layer.out_shape,
        dtype=layer.dtype,
        capability=_checked_capability(device, capability),
        device_name=name,
        torch_version=torch.__version__,
        python_version=platform.python_version(),
    )


def _checked_capability(device: torch.device, asked: str | None) -> str:
    """A CPU accepts any name that starts with ``cpu`` (``cpu.avx512``); a GPU has one name."""
    found = capability(device)
    if asked is None or asked == found:
        return found
    if found == "cpu" and asked.startswith("cpu."):
        return asked
    raise KernelBuildError(f"{device} is {found} here, but {asked} was asked for", permanent=False)


def _kind(layer: LayerInfo) -> str:
    """The class name, and what shapes do not show for convolutions and attention."""
    if layer.cached_channels:
        first, end = layer.cached_channels
        return f"{layer.kind} cached {first}-{end} h{layer.head_width}"
    if not layer.kernel_size:
        return layer.kind
    named = {
        "k": layer.kernel_size,
        "s": layer.stride,
        "p": layer.padding,
        "d": layer.dilation,
    }
    sizes = " ".join(letter + "x".join(map(str, size)) for letter, size in named.items())
    return f"{layer.kind} {sizes} g{layer.groups}"
