"""Builds the module that a verified kernel spec names, from this process's own code."""

from __future__ import annotations

import torch

from esper import blueprints
from esper.blueprints import Graft
from esper.contracts import KernelSpec, LayerInfo
from esper.exceptions import KernelError


def instantiate(
    spec: KernelSpec,
    layer: LayerInfo,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Graft:
    """Build the graft that the kernel describes.

    Args:
        spec: from ``open_kernel``.
        device: default: the layer's.
        dtype: default: the layer's.

    Raises:
        UnknownBlueprintError: this version of Esper does not have the blueprint.
        KernelError: it has another version of the blueprint, which may build another module.
        IncompatibleLayerError: the blueprint does not fit this layer.
        ConfigurationError: the configuration is not valid for this layer.
    """
    blueprint = blueprints.get_blueprint(spec.blueprint)
    if blueprint.version != spec.blueprint_version:
        raise KernelError(
            f"the kernel was made from {spec.blueprint} {spec.blueprint_version}, "
            f"this process has {blueprint.version}: install the same Esper on both sides"
        )
    return blueprint.build(
        layer, spec.config, seed=spec.seed, device=device or layer.device, dtype=dtype
    )
