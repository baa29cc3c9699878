"""Which part of each parameter this rank holds, by the parameter's name in the original model.

Shape legend: N elements of one parameter, n of them on this rank, G ranks of the group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn

from esper.sharding.kinds import Kind, is_dtensor, is_fsdp_module, kind_of

MAX_ADDEND = 1 << 14  # elements of a gradient that are sent to be summed
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@dataclass(slots=True)
class Part:
    """This rank's part of one parameter.

    Attributes:
        holder: the tensor that the optimizer has: the parameter, or a flat tensor of many.
        shape: of the whole parameter.
        copies: on how many ranks of the group the same elements lie.
        names: of the parameter in the original model; several where layers share it.
        owners: the modules that have it, in the order of ``names``.
        storage: FSDP's flat parameter; its local shard is this rank's part also while the layer's
            whole weights are gathered. None without one.
        place: of this part in the local shard of ``storage``.
        holds_many: ``holder`` is ``storage``, so its gradient and state are cut too.
    """

    holder: nn.Parameter
    shape: torch.Size
    copies: float
    names: list[str] = field(default_factory=list)
    owners: list[nn.Module] = field(default_factory=list)
    storage: Any = None
    place: slice | None = None
    holds_many: bool = False

    @property
    def weight(self) -> Tensor:
        """The elements on this rank, in any shape; without elements where it holds none."""
        if self.place is not None:
            shard = getattr(self.storage, "_local_shard", None)  # missing before the first forward
            whole: Tensor = self.storage.data if shard is None else shard
            return whole.detach().view(-1)[self.place]
        partition = getattr(self.holder, "ds_tensor", None)  # ZeRO-3 empties the parameter itself
        return local(self.holder if partition is None else partition).detach()

    @property
    def gradient(self) -> Tensor | None:
        """The gradient of these elements; None where there is none at this moment."""
        return None if self.holder.grad is None else self.of_holder(self.holder.grad)

    def of_holder(self, tensor: Tensor) -> Tensor | None:
        """The part's elements of a tensor like ``holder``: its gradient, or optimizer state.

        None for a tensor of another size, or of addends: a gradient that is not reduced yet.
        """
        mine = local(tensor).detach()
        if self.place is None:
            partial = any(p.is_partial() for p in getattr(tensor, "placements", ()))
            return None if partial and not self.is_addend else mine
        size = self.place.stop - self.place.start
        if self.holds_many:
            fits = mine.numel() == self.storage_size
            return mine.reshape(-1)[self.place] if fits else None
        return mine if mine.numel() == size else None

    @property
    def is_addend(self) -> bool:
        """Each rank may have an addend of its gradient, which only the sum makes whole.

        Tensor parallelism leaves the gradients of small parameters that all ranks have so.
        """
        placements = getattr(self.holder, "placements", ())
        whole = bool(placements) and all(placement.is_replicate() for placement in placements)
        return whole and self.shape.numel() <= MAX_ADDEND

    @property
    def gradient_copies(self) -> float:
        """On how many ranks of the group the same addend of the gradient lies."""
        gradient: Any = self.holder.grad
        placements = getattr(gradient, "placements", ())
        addends = [gradient.device_mesh.size(i) for i, p in enumerate(placements) if p.is_partial()]
        return self.copies / float(math.prod(addends))

    @property
    def storage_size(self) -> int:
        """Elements in this rank's shard of ``storage``."""
        shard = getattr(self.storage, "_local_shard", None)
        return int((self.storage if shard is None else shard).numel())


class Layout:
    """The parts of one model on this rank.

    Args:
        size: ranks in the group that the model is spread over.
    """

    def __init__(self, model: nn.Module, kind: Kind, size: int) -> None:
        self.kind = kind
        self.size = size
        self._model = model

    def parts(self) -> list[Part]:
        """In an order that all ranks have in common."""
        return parts_of(self._model, self.size)

    def describe(self) -> str:
        """The same on all ranks of one model: names and whole shapes."""
        return repr([(part.names, tuple(part.shape)) for part in self.parts()])


def original_name(name: str) -> str:
    """A module's or parameter's name without what wrappers add to it."""
    return ".".join(piece for piece in name.split(".") if piece not in _WRAPPERS)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor; the tensor itself where it is not distributed."""
    mine: Tensor = getattr(tensor, "_local_tensor") if is_dtensor(tensor) else tensor  # noqa: B009
    return mine


def group_ranks(model: nn.Module) -> list[int]:
    """The global ranks that the model is spread over: those of its largest mesh, or all."""
    meshes = [p.device_mesh.mesh.flatten().tolist() for p in _holders(model) if is_dtensor(p)]  # type: ignore[attr-defined]
    everyone = list(range(distributed.get_world_size()))
    return max(meshes, key=len) if meshes else everyone


def parts_of(model: nn.Module, size: int = 1) -> list[Part]:
    """This rank's part of every parameter.

    Args:
        size: ranks of the group, for :attr:`Part.copies`.
    """
    found: dict[Any, Part] = {}
    flat, sharded = _flat_members(model), _fully_sharded(model)
    for path, module in model.named_modules():
        for name, key, fresh in _own_parts(module, flat.get(id(module), {}), sharded, size):
            part = found.setdefault(key, fresh)
            part.names.append(original_name(f"{path}.{name}".lstrip(".")))
            part.owners.append(module)
    return list(found.values())


def _own_parts(
    module: nn.Module,
    flat: dict[str, _FlatMember],
    sharded: dict[tuple[int, str], nn.Parameter],
    size: int,
) -> Iterator[tuple[str, Any, Part]]:
    """(name, identity, part) of the parameters that ``module`` itself has."""
    for name, parameter in module._parameters.items():
        if parameter is None or name in flat or getattr(parameter, "_is_flat_param", False):
            continue
        holder = sharded.get((id(module), name), parameter)
        yield name, id(holder), _part(holder, size)
    for name, member in flat.items():
        yield name, member.key, member.part(size)


def named_holders(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(original name, tensor that an optimizer should have) of every parameter.

    As ``model.named_parameters()`` where nothing is sharded. A flat tensor has the name of the
    first parameter in it.
    """
    if kind_of(model) is None:
        yield from model.named_parameters()
        return
    seen: set[int] = set()
    for part in parts_of(model):
        if id(part.holder) not in seen:
            seen.add(id(part.holder))
            yield part.names[0], part.holder


@dataclass(slots=True)
class _FlatMember:
    """One parameter inside a flat parameter of FSDP."""

    handle: Any
    index: int

    @property
    def key(self) -> tuple[int, int]:
        return id(self.handle.flat_param), self.index

    def part(self, size: int) -> Part:
        flat = self.handle.flat_param
        info = flat._shard_param_infos[self.index]
        start = info.offset_in_shard or 0
        separate = getattr(flat, "_params", None)  # use_orig_params=True
        shards = self.handle.process_group.size() if self.handle.uses_sharded_strategy else 1
        return Part(
            holder=flat if separate is None else separate[self.index],
            shape=flat._shapes[self.index],
            copies=size / shards,
            storage=flat,
            place=slice(start, start + (info.numel_in_shard or 0)),
            holds_many=separate is None,
        )


def _flat_members(model: nn.Module) -> dict[int, dict[str, _FlatMember]]:
    """id of a module -> name -> its parameter that FSDP has put into a flat one."""
    found: dict[int, dict[str, _FlatMember]] = {}
    for handle in _handles(model):
        flat = handle.flat_param
        places = {}
        for index, info in enumerate(flat._param_infos):
            places[info.module, info.param_name] = index
            found.setdefault(id(info.module), {})[info.param_name] = _FlatMember(handle, index)
        for info in flat._shared_param_infos:
            index = places[info.prim_module, info.prim_param_name]
            found.setdefault(id(info.module), {})[info.param_name] = _FlatMember(handle, index)
    return found


def _handles(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        if type(handle).__name__ == "FlatParamHandle":
            yield handle


def _fully_sharded(model: nn.Module) -> dict[tuple[int, str], nn.Parameter]:
    """(id of the module, name) -> what the optimizer has, also while the whole is gathered."""
    found = {}
    for _, group in fsdp_groups(model):
        for held in group.fsdp_params:
            info = held._module_info
            places = [(info.module, info.param_name)]
            places += zip(info.shared_modules, info.shared_param_names, strict=True)
            found.update({(id(owner), name): held.sharded_param for owner, name in places})
    return found


def fsdp_groups(model: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    """(module, group of parameters that are gathered together) of every call of fully_shard."""
    for module in model.modules():
        if is_fsdp_module(module):
            own: Any = module
            state = own._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # older than torch 2.12: one group
            if groups is None:
                groups = [group for group in [state._fsdp_param_group] if group is not None]
            for group in groups:
                yield module, group


def _holders(model: nn.Module) -> list[nn.Parameter]:
    return [*_fully_sharded(model).values(), *model.parameters()]


def _part(holder: nn.Parameter, size: int) -> Part:
    shape: torch.Size = getattr(holder, "ds_shape", holder.shape)
    distinct = 1
    if is_dtensor(holder):
        spread: Any = holder
        for axis, placement in enumerate(spread.placements):
            if not (placement.is_replicate() or placement.is_partial()):
                distinct *= spread.device_mesh.size(axis)
    elif hasattr(holder, "ds_tensor"):
        distinct = size
    return Part(holder, torch.Size(shape), size / distinct)
