"""From a verified recipe to a module. The code is this process's own; the recipe only chooses."""

from __future__ import annotations

import torch

from esper import blueprints
from esper.blueprints import Graft
from esper.contracts import LayerInfo, Recipe
from esper.exceptions import KernelError


def instantiate(
    recipe: Recipe,
    layer: LayerInfo,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Graft:
    """Build the graft that the kernel describes.

    Args:
        recipe: from ``open_kernel``.
        device: default: the layer's.
        dtype: default: the layer's.

    Raises:
        UnknownBlueprintError: this process's Esper does not have the blueprint.
        KernelError: it has another version of it, which may build another module.
        IncompatibleLayerError: the blueprint does not fit this layer.
        ConfigurationError: its configuration makes no sense here.
    """
    blueprint = blueprints.get(recipe.blueprint)
    if blueprint.version != recipe.blueprint_version:
        raise KernelError(
            f"the kernel was made from {recipe.blueprint} {recipe.blueprint_version}, "
            f"this process has {blueprint.version}: install the same Esper on both sides"
        )
    return blueprint.build(
        layer, recipe.config, seed=recipe.seed, device=device or layer.device, dtype=dtype
    )
