"""A router with its experts, and blueprints that extend it in the same slot.

    Router          y + Σ gate_e · E_e(x) over the two experts that it chooses for a position
    CapacityLimit   bounds how many positions an expert of the router serves
    UseBalancer     shifts the router's choice towards experts that are used little
    (experts.py)    one more expert, with a share of the router's softmax

Each is a graft with its own certificate and its own undo. They learn about each other only in
:meth:`Graft.join`, never in ``combine``.

Shape legend: N positions, I channels in, O channels out, E experts, H hidden units of an expert,
S seats: the N · 2 pairs of a position and an expert chosen for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.blueprints import layout
from esper.blueprints.base import Blueprint, Graft, check_integer, check_number, scaled_sizes
from esper.blueprints.initial import Initializer
from esper.blueprints.pointwise import project, why_not_aligned
from esper.contracts import (
    AdaptationType,
    BlueprintCategory,
    GraftKind,
    LayerInfo,
    Risk,
)

CHOSEN = 2  # experts of one position
DEFAULT_EXPERTS = 4
MAX_EXPERTS = 256
MAX_HIDDEN = 65_536
MAX_RAMP_STEPS = 10_000
DEFAULT_RAMP_STEPS = 50  # no longer than a run's maturity_steps, as in ln_rms
INDEX_BYTES = 8  # of a torch.long
FLOAT32_BYTES = 4
_MIXER = 0x45D9F3B  # "prospector" integer hash: bijective on 32 bits, and 32 × 27 bits fit an int64
_WORD = 0xFFFF_FFFF
ROUTERS = frozenset({"router_top2", "router_moe_auxloss"})
_G = TypeVar("_G", bound=Graft)


class CapacityLimit(Graft):
    """Bounds the positions of one expert to ``max(least, ⌈factor · S / E⌉)``.

    A position above the limit keeps the host's output. Applied at once, the limit would change the
    output of a trained assembly, so it decreases from "all N" by a schedule: the remaining steps,
    ``left``, are a tensor buffer.
    """

    left: Tensor

    def __init__(self, *, factor: float, least: int, ramp_steps: int, device: torch.device) -> None:
        super().__init__()
        # An integer: a share that is counted down to 0 leaves 1e-16, which rounds up to one
        # position.
        self.register_buffer("left", torch.tensor(ramp_steps, device=device))
        self.factor = factor
        self.least = least
        self.ramp_steps = ramp_steps

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    @torch.no_grad()
    def on_step(self) -> None:
        self.left.sub_(1).clamp_(min=0)

    def places(self, positions: int, experts: int) -> Tensor:
        """long scalar, on the device: the most positions of one expert."""
        closed = max(self.least, math.ceil(self.factor * positions * CHOSEN / experts))
        fewest = min(positions, closed)
        return positions - (positions - fewest) * (self.ramp_steps - self.left) // self.ramp_steps


class UseBalancer(Graft):
    """A running mean of each expert's use, and a bias on the router's choice that balances it.

    ``bias += rate · (1 - E · use)`` after each step, as the loss-free balancing of DeepSeek-V3
    does with the sign of the error. The gates do not use the bias. It starts at zero.
    """

    use_E: Tensor
    bias_E: Tensor
    seen_E: Tensor

    def __init__(self, *, decay: float, rate: float, device: torch.device) -> None:
        super().__init__()
        for name in ("use_E", "bias_E", "seen_E"):
            self.register_buffer(name, torch.empty(0, dtype=torch.float32, device=device))
        self.decay = decay
        self.rate = rate

    def join(self, neighbours: Sequence[Graft]) -> None:
        router = _first(Router, neighbours)
        if router is not None and len(self.use_E) != router.experts:
            self._start(router.experts)

    def _start(self, experts: int) -> None:
        for name, value in (("use_E", 1.0 / experts), ("bias_E", 0.0), ("seen_E", 0.0)):
            setattr(self, name, self.use_E.new_full((experts,), value))

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    @torch.no_grad()
    def count(self, served_E: Tensor) -> None:
        """Adds to the counts since the last step. Only shares matter: counting twice is safe."""
        self.seen_E.add_(served_E)

    @torch.no_grad()
    def on_step(self) -> None:
        total = self.seen_E.sum()
        share_E = torch.where(total > 0, self.seen_E / total.clamp(min=1.0), self.use_E)
        self.use_E.lerp_(share_E, 1.0 - self.decay)
        self.bias_E.add_(1.0 - len(self.use_E) * self.use_E, alpha=self.rate)
        self.seen_E.zero_()

    @torch.no_grad()
    def forget(self) -> None:
        self.seen_E.zero_()

    def signals(self) -> dict[str, float]:
        return {"moe_imbalance": float(self.use_E.max() * len(self.use_E))}


class Router(Graft):
    """``y + Σ gate_e · E_e(x)`` over the two experts with the largest logits at a position.

    E_e(x) is ``gelu(x · W_in_e) · W_out_e``; all experts share one tensor per direction, and W_out
    starts at zero. The gates are the softmax of the two logits. Only assigned seats are computed;
    on a GPU the sizes of the groups are read from the device once per call. Compiled, every expert
    runs at every position, because a graph has no sizes that depend on the data.

    While training, noise is added to the logits for the choice, not for the gates. It is a hash of
    (position, expert, ``steps``) computed on the device: it uses no random stream, activation
    checkpointing gets the same numbers twice, and an undo restores them with the buffer.

    Args:
        noise: standard deviation, in logits. V-MoE uses 1 / E (Riquelme et al. 2021, arXiv
            2106.05974).
        salt: makes the noise of two routers differ.
    """

    steps: Tensor

    def __init__(
        self,
        weight_router: nn.Parameter,
        weight_in: nn.Parameter,
        weight_out: nn.Parameter,
        *,
        noise: float,
        salt: int,
        channel_axis: int,
        stride: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.weight_router = weight_router  # [E, I]
        self.weight_in = weight_in  # [E, I, H]
        self.weight_out = weight_out  # [E, H, O]
        steps = torch.zeros((), dtype=torch.long, device=weight_router.device)
        self.register_buffer("steps", steps)
        self.noise = noise
        self.salt = salt
        self.channel_axis = channel_axis
        self.stride = stride
        # In tuples, so that neighbours are not registered as children.
        self._limits: tuple[CapacityLimit, ...] = ()
        self._balancers: tuple[UseBalancer, ...] = ()

    @property
    def experts(self) -> int:
        return len(self.weight_router)

    def join(self, neighbours: Sequence[Graft]) -> None:
        self._limits = tuple(_all(CapacityLimit, neighbours))[:1]
        self._balancers = tuple(_all(UseBalancer, neighbours))[:1]

    @torch.no_grad()
    def on_step(self) -> None:
        self.steps.add_(1)

    def combine(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.logits(x)
        logits_NE = _as_rows(logits, self.channel_axis)
        chosen_N2 = self._choose(logits_NE)
        gates_N2 = logits_NE.gather(1, chosen_N2).softmax(dim=1)
        change_NO = self._mix(self._rows(x), chosen_N2, gates_N2)
        change_NO = self._regularize(change_NO, logits_NE, chosen_N2)
        return y + self._as_output(change_NO, logits).to(y.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """float32 at least, E in place of the channels: the inputs of the gates."""
        found = project(
            layout.as_weight_dtype(x, self.weight_router),
            self.weight_router,
            channel_axis=self.channel_axis,
            stride=self.stride,
        )
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @torch.no_grad()
    def _choose(self, logits_NE: Tensor) -> Tensor:
        """[N, 2]: the experts of each position, by noisy and balanced logits."""
        wanted_NE = logits_NE
        if self.training and self.noise:
            wanted_NE = wanted_NE + self.noise * self._noise(wanted_NE)
        for balancer in self._balancers:
            wanted_NE = wanted_NE + balancer.bias_E
        chosen_N2 = wanted_NE.topk(CHOSEN, dim=1).indices
        if self.training:
            for balancer in self._balancers:
                balancer.count(_served(chosen_N2, self.experts))
        return chosen_N2

    def _noise(self, like_NE: Tensor) -> Tensor:
        """Standard normal numbers from a hash."""
        place = torch.arange(like_NE.numel(), device=like_NE.device)
        word = _mix_bits(place & _WORD)
        word = _mix_bits((word ^ _mix_bits((self.steps + self.salt) & _WORD)) & _WORD)
        # 23 bits: values half a step from 0 and from 1 are distinct in float32.
        uniform = ((word >> 9).to(torch.float32) + 0.5) / (1 << 23)
        normal: Tensor = torch.special.ndtri(uniform)
        return normal.reshape(like_NE.shape)

    def _rows(self, x: Tensor) -> Tensor:
        """[N, I]: the positions of x at the centres of the layer's output positions."""
        if self.stride and x.dim() > 2:
            x = x[(slice(None), slice(None), *(slice(None, None, step) for step in self.stride))]
        return _as_rows(layout.as_weight_dtype(x, self.weight_in), self.channel_axis)

    def _mix(self, x_NI: Tensor, chosen_N2: Tensor, gates_N2: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._mix_all(x_NI, chosen_N2, gates_N2)
        order_S, served = self._seats(chosen_N2)
        x_SI = x_NI.index_select(0, order_S // CHOSEN)
        out_SO = self._run_experts(x_SI, served)
        # Back in the order of positions. Not index_add, which keeps its summands for the backward
        # pass; unassigned seats stay zero.
        seats = out_SO.new_zeros(chosen_N2.numel(), out_SO.shape[1])
        out_N2O = seats.index_put((order_S,), out_SO).reshape(*chosen_N2.shape, -1)
        return (out_N2O * gates_N2[:, :, None].to(out_SO.dtype)).sum(dim=1)

    def _mix_all(self, x_NI: Tensor, chosen_N2: Tensor, gates_N2: Tensor) -> Tensor:
        """The same with fixed shapes: an expert's gate is zero where it was not chosen."""
        order_S, free_S, _ = self._rank(chosen_N2)
        if free_S is not None:
            kept_S = torch.zeros_like(free_S).scatter(0, order_S, free_S)
            gates_N2 = gates_N2 * kept_S.reshape(chosen_N2.shape)
        gates_NE = gates_N2.new_zeros(len(x_NI), self.experts).scatter(1, chosen_N2, gates_N2)
        out_ENO = F.gelu(x_NI @ self.weight_in) @ self.weight_out
        return (out_ENO * gates_NE.T[:, :, None].to(out_ENO.dtype)).sum(dim=0)

    @torch.no_grad()
    def _seats(self, chosen_N2: Tensor) -> tuple[Tensor, list[int]]:
        """Seat numbers grouped by expert, earlier positions first, and the groups' sizes."""
        order_S, free_S, served_E = self._rank(chosen_N2)
        return order_S if free_S is None else order_S[free_S], served_E.tolist()

    @torch.no_grad()
    def _rank(self, chosen_N2: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """All seats grouped by expert, which of them are below the limit, and the groups' sizes."""
        expert_S = chosen_N2.reshape(-1)
        order_S = expert_S.argsort(stable=True)
        served_E = _served(chosen_N2, self.experts)
        free_S = None
        for limit in self._limits:
            start_E = served_E.cumsum(0) - served_E
            place_S = torch.arange(len(order_S), device=order_S.device)
            place_S = place_S - start_E[expert_S[order_S]]
            places = limit.places(len(chosen_N2), self.experts)
            # Earlier positions first: sorting by gate would let a position depend on later ones.
            free_S = place_S < places
            served_E = served_E.clamp(max=places)
        return order_S, free_S, served_E

    def _run_experts(self, x_SI: Tensor, served: list[int]) -> Tensor:
        # unbind, not indexing: the backward pass of each index would create zeros for all experts.
        groups = torch.split(x_SI, served)
        weights = zip(groups, self.weight_in.unbind(0), self.weight_out.unbind(0), strict=True)
        outputs = [F.gelu(x @ into) @ out for x, into, out in weights if len(x)]
        return torch.cat(outputs) if outputs else x_SI @ self.weight_in[0] @ self.weight_out[0]

    def _regularize(self, change_NO: Tensor, logits_NE: Tensor, chosen_N2: Tensor) -> Tensor:
        """Hook for a router with its own loss."""
        return change_NO

    def _as_output(self, change_NO: Tensor, logits: Tensor) -> Tensor:
        """Puts rows back at the positions of ``logits``."""
        axis = self.channel_axis % logits.dim()
        positions = logits.shape[:axis] + logits.shape[axis + 1 :]
        return change_NO.reshape(*positions, -1).movedim(-1, axis)


class LossRouter(Router):
    """A router with the load-balancing loss ``E · Σ share_e · p_e`` (Switch, GShard).

    ``share_e`` is the share of seats of expert e, ``p_e`` the mean of its softmax. The loss is
    injected in the backward pass: the user's loss does not change. Its coefficient is a buffer
    that grows from zero. With gradient accumulation the coefficient is divided by the number of
    backward passes of the last step, as a user divides the loss.
    """

    coefficient: Tensor
    passes: Tensor
    share: Tensor

    def __init__(self, *args: Any, coefficient: float, ramp_steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = self.weight_router.device
        for name, value in (("coefficient", 0.0), ("passes", 0.0), ("share", 1.0)):
            full = torch.full((), value, dtype=torch.float32, device=device)
            self.register_buffer(name, full)
        self.full_coefficient = coefficient
        self.ramp_steps = ramp_steps

    @torch.no_grad()
    def on_step(self) -> None:
        super().on_step()
        taken = torch.where(self.passes > 0, 1.0 / self.passes.clamp(min=1.0), self.share)
        self.share.copy_(taken)
        self.passes.zero_()
        full = self.full_coefficient
        self.coefficient.add_(full / self.ramp_steps).clamp_(max=full)

    @torch.no_grad()
    def forget(self) -> None:
        self.passes.zero_()

    def _regularize(self, change_NO: Tensor, logits_NE: Tensor, chosen_N2: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return change_NO
        loss = balance_loss(logits_NE, chosen_N2)
        weight = self.coefficient * self.share
        inject: Callable[..., Tensor] = _InjectLoss.apply
        return inject(change_NO, loss, weight, self.passes)


class _InjectLoss(torch.autograd.Function):
    """Returns ``change``; in backward, ``weight`` is the gradient of ``loss``."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, loss: Tensor, weight: Tensor, passes: Tensor) -> Tensor:
        ctx.save_for_backward(weight.to(loss.dtype))
        ctx.passes = passes
        return change.view_as(change)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.passes.add_(1)
        return gradients[0], weight, None, None


def balance_loss(logits_NE: Tensor, chosen_N2: Tensor) -> Tensor:
    """``E · Σ share_e · p_e``: 1 for equal use of all experts, E if one expert gets all.

    Fedus et al. 2021, arXiv 2101.03961, equation 4, over both choices of a position.
    """
    experts = logits_NE.shape[1]
    with torch.no_grad():
        share_E = _served(chosen_N2, experts).to(logits_NE.dtype) / chosen_N2.numel()
    return experts * (share_E * logits_NE.softmax(dim=1).mean(dim=0)).sum()


def _served(chosen_N2: Tensor, experts: int) -> Tensor:
    """[E] of long: seats of each expert. Not bincount, which synchronises with the device."""
    served = torch.zeros(experts, dtype=torch.long, device=chosen_N2.device)
    flat = chosen_N2.reshape(-1)
    return served.scatter_add(0, flat, torch.ones_like(flat))


def _mix_bits(word: Tensor) -> Tensor:
    for _ in range(2):
        word = ((word ^ (word >> 16)) * _MIXER) & _WORD
    return word ^ (word >> 16)


def _as_rows(values: Tensor, channel_axis: int) -> Tensor:
    """[.., C, ..] -> [N, C]."""
    return values.movedim(channel_axis, -1).flatten(0, -2)


def _all(wanted: type[_G], neighbours: Sequence[Graft]) -> list[_G]:
    return [graft for graft in neighbours if isinstance(graft, wanted)]


def _first(wanted: type[_G], neighbours: Sequence[Graft]) -> _G | None:
    return next(iter(_all(wanted, neighbours)), None)


class RouterBlueprint(Blueprint):
    """Base of the two routers: sizes, costs and weights."""

    category = BlueprintCategory.MIXTURE_OF_EXPERTS
    kind = GraftKind.ASSEMBLY
    adaptation_type = AdaptationType.ADD_MOE
    risk = Risk.MEDIUM
    tunes = ("hidden", "experts")

    def supports(self, layer: LayerInfo) -> str:
        return why_not_aligned(layer)

    def default_config(self, layer: LayerInfo) -> dict[str, Any]:
        # Four experts as wide as the layer have the parameters of one feed-forward branch of four
        # times its width, and half its operations.
        return {
            "experts": DEFAULT_EXPERTS,
            "hidden": min(MAX_HIDDEN, layer.features_in),
            "noise": 1.0 / DEFAULT_EXPERTS,
        }

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        default = self.default_config(layer)
        hiddens = scaled_sizes(default["hidden"], smallest=1)
        return tuple({**default, "hidden": hidden} for hidden in hiddens)

    def check_config(self, config: dict[str, Any]) -> None:
        check_integer(config, "experts", low=CHOSEN, high=MAX_EXPERTS)
        check_integer(config, "hidden", low=1, high=MAX_HIDDEN)
        if config["noise"] != 0:
            check_number(config, "noise", low=0.0, high=10.0)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        d_in, d_out = layer.features_in, layer.features_out
        return int(config["experts"]) * (d_in + int(config["hidden"]) * (d_in + d_out))

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        d_in, d_out = layer.features_in, layer.features_out
        expert = int(config["hidden"]) * (d_in + d_out)
        rows = layout.position_count(layer, of_output=True)
        return 2 * rows * (int(config["experts"]) * d_in + CHOSEN * expert)

    def activation_bytes(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        # Kept for a seat: its row of x, the hidden units before and after GELU, the output, the
        # gate (once more where it is narrowed) and three indices; for a position its logits.
        rows, width = layout.position_count(layer, of_output=True), layout.dtype_bytes(layer)
        wide = max(width, FLOAT32_BYTES)
        channels = layer.features_in + 2 * int(config["hidden"]) + layer.features_out
        gate = wide if wide == width else wide + width
        seat = channels * width + gate + 3 * INDEX_BYTES
        return rows * (CHOSEN * seat + int(config["experts"]) * wide)

    def make(self, layer: LayerInfo, config: dict[str, Any], weights: Initializer) -> Graft:
        return Router(**self._arguments(layer, config, weights))

    @staticmethod
    def _arguments(
        layer: LayerInfo, config: dict[str, Any], weights: Initializer
    ) -> dict[str, Any]:
        experts, hidden = config["experts"], config["hidden"]
        d_in, d_out = layer.features_in, layer.features_out
        return {
            "weight_router": weights.uniform(experts, d_in),
            "weight_in": weights.uniform(experts, d_in, hidden, fan_in=d_in),
            "weight_out": weights.zeros(experts, hidden, d_out),
            "noise": float(config["noise"]),
            "salt": weights.integer(),
            "channel_axis": layer.channel_axis,
            "stride": layer.stride,
        }


class RouterPart(Blueprint):
    """Base of blueprints without weights that need a router in the slot."""

    kind = GraftKind.ASSEMBLY
    risk = Risk.HIGH
    trainable = False
    requires = ROUTERS

    def supports(self, layer: LayerInfo) -> str:
        return why_not_aligned(layer)

    def sizes(self, layer: LayerInfo) -> tuple[dict[str, Any], ...]:
        return (self.default_config(layer),)

    def parameters(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 0

    def flops(self, layer: LayerInfo, config: dict[str, Any]) -> int:
        return 0
