"""BP-CLAMP-GRAD-NORM: bounds the L2 norm of one layer's gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.blueprints.base import Blueprint, Graft, check_number
from esper.blueprints.initial import Initializer
from esper.contracts import AdaptationType, BlueprintCategory, GraftKind, LayerInfo, Risk
from esper.fail_closed import contained


class GradientClamp(Graft):
    """Scales the gradients of the host's own weights down to ``max_norm`` as they accumulate.

    They are scaled together, after the last of them, so their direction is kept. Below the bound
    they are multiplied by one, which is exact, without a read from the device.
    """

    def __init__(self, *, max_norm: float) -> None:
        super().__init__()
        self.max_norm = max_norm
        self._tied: dict[nn.Parameter, RemovableHandle] = {}
        self._arrived: set[nn.Parameter] = set()

    def inherit(self, host: nn.Module) -> None:
        if getattr(host, "sparse", False):  # torch's word in Embedding and EmbeddingBag
            raise TypeError("its gradients are sparse, and the bound needs dense ones")

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def attach(self, host: nn.Module) -> None:
        self._arrived.clear()  # left from a pass in which a weight had no gradient
        own = [p for name, p in host.named_parameters() if not name.startswith("esper.")]
        wanted = {parameter for parameter in own if parameter.requires_grad}
        if wanted == self._tied.keys():
            return
        self.detach()
        for parameter in wanted:
            self._tied[parameter] = self._tie(parameter)

    def detach(self) -> None:
        for handle in self._tied.values():
            handle.remove()
        self._tied.clear()
        self._arrived.clear()

    def _tie(self, parameter: nn.Parameter) -> RemovableHandle:
        register: Callable[..., RemovableHandle] = parameter.register_post_accumulate_grad_hook
        return register(self._arrive)

    @contained("gradient clamp", "The layer's gradient is not bounded in such a step.")
    def _arrive(self, parameter: nn.Parameter) -> None:
        self._arrived.add(parameter)
        if len(self._arrived) == len(self._tied):
            self._arrived.clear()
            self._clamp([p.grad for p in self._tied if p.grad is not None])

    @torch.no_grad()
    def _clamp(self, gradients: list[Tensor]) -> None:
        norms = torch._foreach_norm(gradients)
        total = torch.linalg.vector_norm(torch.stack([norm.float() for norm in norms]))
        scale = (self.max_norm / total).clamp(max=1.0)  # never 0 / 0: max_norm > 0
        torch._foreach_mul_(gradients, scale)

    def __getstate__(self) -> dict[str, Any]:
        # Hooks belong to the tensors of one model: a copy registers its own at its first forward.
        return {**vars(self), "_tied": {}, "_arrived": set()}


class ClampGradNorm(Blueprint):
    slug = "clamp_grad_norm"
    id = "BP-CLAMP-GRAD-NORM"
    title = "Gradient clamp"
    category = BlueprintCategory.DIAGNOSTICS
    kind = GraftKind.WRAP
    adaptation_type = AdaptationType.ADD_DIAGNOSTIC
    risk = Risk.LOW
    trainable = False
    scaler_refusal = (
        "a gradient scaler multiplies gradients, so the bound would apply to scaled gradients"
    )
    idea = "Scales this layer's gradient down whenever its L2 norm exceeds a bound."
    source = "Pascanu et al. 2013, arXiv 1211.5063"
    when = "One layer's gradients spike while those of other layers do not."

    def supports(self, layer: LayerInfo) -> str:
        if not layer.graftable:
            return layer.reason
        return "" if layer.trainable else "its weights are frozen, so it has no gradient to clamp"

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        return {"max_norm": 1.0}

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return tuple({"max_norm": bound} for bound in (0.1, 1.0, 10.0))

    def check_config(self, config: dict[str, Any]) -> None:
        check_number(config, "max_norm", low=0.0, high=1e6)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 0

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 0  # of the forward pass; the backward pass gets 3 for each weight of the layer

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return GradientClamp(max_norm=config["max_norm"])
