"""The ranks of one model whose parameters are spread over them, and grafts under ``fully_shard``.

A graft is built and certified whole, on every rank, beside the layer's gathered weights. Then it is
spread over the layer's mesh by ``fully_shard``, so its gradients are summed like the host's:

    vote → gather the layer → build → rank 0's tensors → certify → spread → insert → vote
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from esper.blueprints import Graft
from esper.fail_closed import contained
from esper.grafting.companions.companion import Companion
from esper.grafting.ranks.replicas import RankGroup, control_group, shared_group
from esper.grafting.slot import first_tensor, slot_of
from esper.sharding import Kind, Layout, fsdp_groups, group_ranks, is_fsdp_module, why_no_graft

AnyGraft = TypeVar("AnyGraft", bound=Graft)


class ShardedRanks(RankGroup):
    """The ranks over which a model is spread. Creating it is a collective call.

    Attributes:
        layout: which part of each parameter lies on this rank.
        background: a second group, for sums that go on while the ranks exchange messages: in one
            group their order would have to be the same on all ranks.
    """

    meets_each_step = False
    layout: Layout

    def __init__(self, model: nn.Module, kind: Kind) -> None:
        ranks = group_ranks(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        super().__init__(shared_group(ranks, distributed.group.WORLD, device))
        self.background = control_group(ranks, distributed.group.WORLD, device)
        self.layout = Layout(model, kind, self.size)
        self._model = model

    def why_not(self) -> str:
        """Why such a model takes no graft, with the way out; empty if it does."""
        reason = why_no_graft(self.layout.kind)
        return f"the model cannot be changed: {reason}" if reason else ""

    def why_no_remedy(self) -> str:
        """Some remedies, freezing and merging change weights that no rank has whole."""
        return self.why_not() or (
            "fully_shard spreads the weights over the ranks, and this changes whole ones: use "
            "DistributedDataParallel, or a remedy that acts on updates (set_lr, weight_decay, "
            "clip_layer, skip_update)"
        )

    def why_not_at(self, host: nn.Module) -> str:
        """Why this layer takes no graft; empty if it does."""
        if not _groups_of(self._model, host):
            return (
                "fully_shard leaves its weights whole on each rank: wrap it, or a part of the "
                "model that contains it"
            )
        return ""

    def why_not_this(self, graft: Graft) -> str:
        """Why this graft cannot be spread; empty if it can."""
        kind = type(graft)
        if kind.attach is not Graft.attach:
            return "it works on the layer's own weights, which fully_shard spreads over the ranks"
        if kind.join is not Graft.join:
            return "it works together with other grafts, whose weights would be spread over ranks"
        return ""

    def parameters_changed(self) -> None:
        """Nothing to adapt: gradients are summed by the parameters themselves."""

    def checksum(self) -> str:
        """Hex SHA-256 over names and whole shapes; the numbers differ from rank to rank."""
        return hashlib.sha256(self.layout.describe().encode()).hexdigest()

    def settle(self) -> None:
        """Frees gathered weights, so that every module has this rank's parts.

        After an evaluation the outermost module still has them whole.
        """
        for module in self._model.modules():
            if is_fsdp_module(module):
                reshard: Any = module.reshard
                reshard()

    @contextmanager
    def whole(self, host: nn.Module) -> Iterator[None]:
        """Inside, the layer and its grafts have their whole weights, in the dtype of their pass.

        A collective call.
        """
        slot = slot_of(host)
        grafts = [] if slot is None else [*slot.grafts().values()]
        gathered = [*_owners_of(self._model, host), *filter(is_fsdp_module, grafts)]
        try:
            for module in gathered:
                module.unshard()
            yield
        finally:
            for module in gathered:
                module.reshard()

    def spread(self, host: nn.Module, graft: AnyGraft) -> AnyGraft:
        """Spreads a whole graft over the layer's mesh, as its own weights are; no collective."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not any(True for _ in graft.parameters()) or is_fsdp_module(graft):
            return graft
        group = _groups_of(self._model, host)[0]
        policy = group.mp_policy
        # The output keeps the layer's dtype, and so do its inputs: the host has cast them.
        own = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype,
            reduce_dtype=policy.reduce_dtype,
            cast_forward_inputs=False,
        )
        shard: Any = fully_shard
        sharded: AnyGraft = shard(
            graft,
            mesh=group.mesh_info.mesh,
            reshard_after_forward=group.post_forward_mesh_info is not None,
            mp_policy=own,
            offload_policy=group.offload_policy,
        )
        return sharded


def as_computed(host: nn.Module, graft: AnyGraft) -> AnyGraft:
    """The graft in the dtype in which the gathered layer computes: itself, or a copy."""
    present = next((p.dtype for p in host.parameters(recurse=False)), None)
    own = next((p.dtype for p in graft.parameters()), None)
    if own is None or present is None or present == own:
        return graft
    return copy.deepcopy(graft).to(present)


def announce_gradients(graft: Graft, companion: Companion) -> None:
    """Tells the companion when a backward pass reaches the graft.

    ``fully_shard`` stores gradients itself, so hooks on the parameters do not run.
    """
    if not is_fsdp_module(graft):
        return

    def watch_output(module: nn.Module, args: Any, output: Any) -> None:
        found = first_tensor(output)
        if found is not None and found.requires_grad:
            found.register_hook(reached)  # type: ignore[no-untyped-call]

    @contained("gradient hook", "A graft's gradients are not cleared with the host's.")
    def reached(gradient: Tensor) -> None:
        companion.reach()

    graft.register_forward_hook(watch_output)


def _owners_of(model: nn.Module, host: nn.Module) -> list[Any]:
    """The modules of fully_shard that hold parameters of the layer."""
    return [module for module, group in fsdp_groups(model) if _holds(group, host)]


def _groups_of(model: nn.Module, host: nn.Module) -> list[Any]:
    return [group for _, group in fsdp_groups(model) if _holds(group, host)]


def _holds(group: Any, host: nn.Module) -> bool:
    slot = slot_of(host)
    inside_slot = set() if slot is None else set(slot.modules())
    own = {module for module in host.modules() if module not in inside_slot}
    return any(
        own & {held._module_info.module, *held._module_info.shared_modules}
        for held in group.fsdp_params
    )
