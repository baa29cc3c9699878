"""What a kernel depends on, as a cache key."""

from __future__ import annotations

import platform
from typing import Any

import torch

from esper import blueprints
from esper.contracts import KernelKey, LayerInfo
from esper.exceptions import KernelBuildError


def capability() -> str:
    """What this process can compile for: ``cpu``, or ``cuda.sm90`` for its first GPU."""
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"cuda.sm{major}{minor}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind and widest instruction set.

    Raises:
        KernelBuildError: not permanent: this machine lacks the device, another one may have it.
    """
    if device.type == "cpu":
        return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
        raise KernelBuildError(f"this machine has no device {device}", permanent=False)
    return torch.cuda.get_device_name(device)


def kernel_key(layer: LayerInfo, blueprint: str, config: dict[str, Any] | None) -> KernelKey:
    """The key of ``blueprint`` at ``layer``, built by this process.

    Args:
        config: settings that differ from the blueprint's defaults are enough.

    Raises:
        UnknownBlueprintError: no blueprint has this slug or id.
        IncompatibleLayerError, ConfigurationError: it cannot be built like this there.
        KernelBuildError: the layer's device is not here.
    """
    chosen = blueprints.get(blueprint)
    device = torch.device(layer.device)
    return KernelKey(
        blueprint=chosen.slug,
        blueprint_version=chosen.version,
        config=chosen.config_for(layer, config),
        layer_kind=_kind(layer),
        in_shape=layer.in_shape,
        out_shape=layer.out_shape,
        dtype=layer.dtype,
        capability=capability() if device.type == "cuda" else "cpu",
        device_name=device_name(device),
        torch_version=torch.__version__,
        python_version=platform.python_version(),
    )


def _kind(layer: LayerInfo) -> str:
    """The class name, and what the shapes of convolutions and of attention do not tell."""
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
