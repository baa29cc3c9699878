"""One model on several ranks: a change is made on all replicas, or on none.

DistributedDataParallel reads its parameters when it is created. The gradients of a module that is
added later are not averaged, without an error, and the replicas diverge. So the ranks build with
one seed, take rank 0's tensors, vote, and give DDP a new reducer, at one step boundary; then they
compare.

    build → vote → rank 0's tensors → certify, swap in → new reducer → vote with a checksum
A "no", an exception or another checksum on any rank removes the graft on all ranks.
"""

from __future__ import annotations

import hashlib
import json
import struct
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from esper.blueprints import Graft
from esper.blueprints.gradient_reduction import WHOLE_MODEL_KIND, GradientReduction
from esper.contracts import LayerInfo
from esper.exceptions import ReplicaError
from esper.grafting.ranks.communication_hooks import BucketThread, sum_in_background
from esper.grafting.slot import CONTAINERS, slot_of
from esper.grafting.tensors.saved_values import bytes_of
from esper.sharding import Layout

AnyGraft = TypeVar("AnyGraft", bound=Graft)
# the model's process group -> ranks -> Esper's own; torch keeps both until they are destroyed
_groups: MutableMapping[Any, dict[tuple[int, ...], weakref.ref[Any]]] = weakref.WeakKeyDictionary()
WHOLE_MODEL = ""  # name of the "layer" that stands for the model on all ranks


class Call(IntEnum):
    """What a rank calls a meeting for."""

    ATTACH = 1
    STEP = 2
    GRAFT = 3
    UNDO = 4
    LOAD = 5
    VOTE = 6
    REMEDY = 7
    PREPARE = 8


@dataclass(frozen=True, slots=True)
class Meeting:
    """The messages of all ranks.

    Attributes:
        loss: mean over the ranks with a loss; NaN or infinite if that of any rank is. None: no rank
            has one yet.
        busy: rank 0 has, or may have, an order for all ranks.
    """

    loss: float | None
    busy: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """One rank's message. All rows have one size: a wrong message raises, and nothing hangs."""

    call: Call
    step: int
    key: int = 0
    flag: bool = False
    loss: float | None = None

    def pack(self) -> Tensor:
        has_loss = self.loss is not None
        bits = struct.unpack("<q", struct.pack("<d", self.loss or 0.0))[0]
        return torch.tensor(
            [self.call, self.step, self.key, self.flag, has_loss, bits], device="cpu"
        )

    @classmethod
    def unpack(cls, values: Sequence[int]) -> _Row:
        call, step, key, flag, has_loss, bits = values
        loss = struct.unpack("<d", struct.pack("<q", bits))[0] if has_loss else None
        return cls(Call(call), step, key, bool(flag), loss)

    def __str__(self) -> str:
        return f"{self.call.name.lower()} at step {self.step}"


class RankGroup(ABC):
    """The ranks of one model, seen from one rank: their messages.

    Args:
        group: a gloo group of Esper's own, so that its messages do not mix with the user's
            collectives.

    Attributes:
        meets_each_step: the ranks exchange a message in each step.
        background: a second group, for sums that go on while the ranks exchange messages; only
            where the model is spread over the ranks.
        layout: how the model's parameters are spread over the ranks; None where each has them all.
        whole_model: the model as shared by all ranks, the target of a gradient reduction; None
            where there is no such target.
    """

    meets_each_step = True
    layout: Layout | None = None
    background: Any = None
    whole_model: LayerInfo | None = None

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = int(distributed.get_rank(group))
        self.size = int(distributed.get_world_size(group))

    @property
    def lead(self) -> bool:
        """This is rank 0, which alone decides and communicates with the server."""
        return self.rank == 0

    @abstractmethod
    def why_not(self) -> str:
        """Why the model cannot be changed now, with the way out; empty if it can."""

    def why_no_remedy(self) -> str:
        """Why the model takes no remedy now; empty if it does."""
        return self.why_not()

    def why_not_at(self, host: nn.Module) -> str:
        """Why this layer takes no graft, where the others may; empty if it does."""
        return ""

    def why_not_this(self, graft: Graft) -> str:
        """Why this graft cannot be in the model; empty if it can."""
        return ""

    def settle(self) -> None:
        """Brings the model into its state between two steps, before a change."""
        return

    @contextmanager
    def whole(self, host: nn.Module) -> Iterator[None]:
        """Inside, the layer has its whole weights on each rank."""
        yield

    def spread(self, host: nn.Module, graft: AnyGraft) -> AnyGraft:
        """The graft as the layer's weights are over the ranks."""
        return graft

    @abstractmethod
    def parameters_changed(self) -> None:
        """Adapts what spreads the model over ranks to parameters that were added or removed."""

    @abstractmethod
    def checksum(self) -> str:
        """Hex SHA-256 over what is equal on all ranks."""

    # -- messages ------------------------------------------------------------------------------

    def meet(
        self, call: Call, step: int, *, key: str = "", loss: float | None = None, busy: bool = False
    ) -> Meeting:
        """All ranks exchange one message and check that they make the same call.

        Args:
            key: an argument that must be the same on all ranks, such as a layer's name.

        Raises:
            ReplicaError: the ranks make different calls; raised on all ranks.
        """
        rows = self._gather(_Row(call, step, _key_of(key), busy, loss))
        if len({(row.call, row.step, row.key) for row in rows}) > 1:
            messages = "; ".join(f"rank {rank}: {row}" for rank, row in enumerate(rows))
            raise ReplicaError(
                "the ranks must make the same calls in the same order with the same arguments: "
                f"{messages}"
            )
        losses = [row.loss for row in rows if row.loss is not None]
        return Meeting(loss=sum(losses) / len(losses) if losses else None, busy=rows[0].flag)

    def order(self, message: dict[str, Any] | None) -> None:
        """Rank 0: sends the next order to the others; None ends the orders."""
        raw = b"" if message is None else json.dumps(message).encode()
        self._broadcast(torch.tensor([len(raw)], device="cpu"))
        if raw:
            self._broadcast(torch.frombuffer(bytearray(raw), dtype=torch.uint8))

    def take_order(self) -> dict[str, Any] | None:
        """Other ranks: the next order of rank 0; None after the last."""
        length = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._broadcast(length)
        if not int(length):
            return None
        raw = torch.empty(int(length), dtype=torch.uint8, device="cpu")
        self._broadcast(raw)
        message: dict[str, Any] = json.loads(raw.numpy().tobytes())
        return message

    def mean(self, value: float) -> float:
        """The mean over all ranks; NaN if one rank has no value."""
        rows = self._gather(_Row(Call.STEP, 0, loss=value))
        return sum(row.loss or 0.0 for row in rows) / self.size

    def values(self, value: float) -> tuple[float, ...]:
        """One number of each rank, by rank."""
        rows = self._gather(_Row(Call.STEP, 0, loss=value))
        return tuple(row.loss or 0.0 for row in rows)

    def vote(self, error: BaseException | None, checksum: str = "") -> None:
        """Returns only if no rank has an error and all have the same checksum.

        Raises:
            ReplicaError: names the rank that failed, and its reason; not raised on a rank with an
                ``error``, which raises its own.
        """
        rows = self._gather(_Row(Call.VOTE, 0, _key_of(checksum), error is None))
        if not all(row.flag for row in rows):
            reasons = self._gather_texts("" if error is None else _reason(error))
            if error is None:
                raise ReplicaError("; ".join(reasons))
        elif len({row.key for row in rows}) > 1:
            raise ReplicaError("the replicas are not equal: their checksums differ")

    def share(self, flat: Tensor) -> None:
        """Sends rank 0's bytes to all ranks, in place."""
        self._broadcast(flat)

    # -- collectives ---------------------------------------------------------------------------

    def _gather(self, row: _Row) -> list[_Row]:
        mine = row.pack()
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine, group=self.group)
        return [_Row.unpack(values.tolist()) for values in everyone]

    def _gather_texts(self, text: str) -> list[str]:
        """The texts of all ranks with a text."""
        raw = text.encode()[:2000].ljust(2000)
        mine = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine, group=self.group)
        texts = [row.numpy().tobytes().decode(errors="replace").strip() for row in everyone]
        return [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]

    def _broadcast(self, tensor: Tensor) -> None:
        distributed.broadcast(tensor, group_src=0, group=self.group)


class Replicas(RankGroup):
    """The ranks of one DDP model. Creating it is a collective call.

    Args:
        ddp: the user's wrapper; it stays the same object, its reducer is replaced.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        ranks = distributed.get_process_group_ranks(ddp.process_group)
        super().__init__(shared_group(ranks, ddp.process_group, ddp.device))
        self._ddp = ddp
        self._rebuilt = False
        self._thread: BucketThread | None = None

    def why_not(self) -> str:
        """Why the reducer cannot be rebuilt now; empty if it can."""
        return why_not_replicable(self._ddp)

    @property
    def whole_model(self) -> LayerInfo:  # type: ignore[override]
        """The model as shared by all ranks: the target of a gradient reduction."""
        parameters = [p for p in self._ddp.module.parameters() if p.requires_grad]
        reason = self.why_not() or self._why_no_reduction()
        return LayerInfo(
            name=WHOLE_MODEL,
            kind=WHOLE_MODEL_KIND,
            in_shape=(),
            out_shape=(),
            dtype=str(parameters[0].dtype).removeprefix("torch."),
            parameters=sum(p.numel() for p in parameters),
            graftable=not reason,
            reason=reason,
            device=str(parameters[0].device),
        )

    # -- the reducer ---------------------------------------------------------------------------

    def parameters_changed(self) -> None:
        """Rebuilds DDP's reducer for the present parameters and reduction.

        Does what DDP's constructor does, so that the user's wrapper stays the same object. A
        wrapper that takes no new reducer has the old one, because nothing was changed.
        """
        if self.why_not() and not self._rebuilt:
            return
        self._rebuilt = True
        self.rebuild_reducer()

    def rebuild_reducer(self) -> None:
        """As :meth:`parameters_changed`, without asking whether it can."""
        ddp: Any = self._ddp
        ddp.reducer._remove_autograd_hooks()
        parameters, sparse = ddp._build_params_for_reducer()
        names = ddp._build_debug_param_to_name_mapping(parameters)
        ddp._ddp_init_helper(parameters, sparse, names, False)  # no static graph
        ddp._has_rebuilt_buckets = False
        for hook, state in ddp._comm_hooks:
            _register(ddp, state, hook)
        self._use_reduction()

    def reduction(self) -> GradientReduction | None:
        """The gradient reduction grafted into the whole model, if any."""
        slot = slot_of(self._ddp.module)
        grafts = slot.grafts().values() if slot is not None else ()
        return next((graft for graft in grafts if isinstance(graft, GradientReduction)), None)

    def checksum(self) -> str:
        """Hex SHA-256 over what DDP keeps equal: the parameters that it knows.

        Without buffers: between two forward passes they differ by rank.
        """
        total = hashlib.sha256()
        for name, parameter in self._ddp.module.named_parameters():
            if name not in self._ddp.parameters_to_ignore:
                total.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
                total.update(bytes_of(parameter))
        return total.hexdigest()

    def _why_no_reduction(self) -> str:
        if isinstance(self._ddp.module, CONTAINERS):
            kind = type(self._ddp.module).__name__
            return f"the model is a bare {kind}, which would call the graft as one of its layers"
        if self._ddp._comm_hooks:
            return "the script has its own communication hook, and DDP accepts only one"
        if next(self._ddp.module.parameters()).device.type != "cpu":
            return "gradient reductions are tested only on CPU (gloo)"
        return ""

    def _use_reduction(self) -> None:
        reduction = self.reduction()
        if reduction is None:
            if self._thread is not None:
                self._thread.close()
                self._thread = None
            return
        if self._thread is None or self._thread.reduction is not reduction:
            self._thread = BucketThread(reduction, self.group)
        _register(self._ddp, self._thread, sum_in_background)


class Joint:
    """One operation of all replicas; with ``replicas`` None, of this process alone.

    Attributes:
        done: all ranks have done it and know it; no rank may revert it alone.
    """

    def __init__(self, replicas: RankGroup | None) -> None:
        self._replicas = replicas
        self.done = False
        self._open = replicas is not None  # the other ranks wait for this rank's vote
        self._changed = False

    def begin(self) -> None:
        """Before anything is changed."""
        if self._replicas is not None:
            self._replicas.settle()

    def ready(self) -> None:
        """Returns when no rank has failed so far; before a collective call that is not a vote."""
        if self._replicas is not None and self._replicas.layout is not None:
            self._vote("")

    def same(self, what: str, *, last: bool = False) -> None:
        """Returns when all ranks have come here with the same ``what``, and none has failed.

        Args:
            last: it is done with that; nothing of the model was changed.
        """
        if self._replicas is not None:
            self._vote(what, last=last)

    def share(self, graft: nn.Module) -> None:
        """Checks that all ranks have built the same module, and copies rank 0's tensors to all."""
        if self._replicas is None:
            return
        tensors = [*graft.parameters(), *graft.buffers()]
        parts = [_bytes_of(tensor) for tensor in tensors]
        flat = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device="cpu")
        self._vote(repr([(name, t.shape, t.dtype) for name, t in graft.state_dict().items()]))
        if len(flat):
            self._replicas.share(flat)
        _fill(tensors, flat)

    def commit(self) -> None:
        """Done on this rank; returns when done on all ranks, and all are equal."""
        if self._replicas is not None:
            self._changed = True  # if it fails, the reducer must be rebuilt
            self._replicas.parameters_changed()
            self._vote(self._replicas.checksum(), last=True)

    def agree(self) -> None:
        """Undone on this rank; returns when undone on all ranks."""
        if self._replicas is not None:
            self._changed = True
            self._replicas.parameters_changed()
            self._vote("", last=True)

    def fail(self, error: BaseException) -> None:
        """Reverted on this rank; tells the others to revert."""
        if self._replicas is None or self.done:
            return
        try:
            if self._open:
                self._open = False
                self._replicas.vote(error)
        finally:
            if self._changed:
                self._replicas.parameters_changed()

    def _vote(self, checksum: str, *, last: bool = False) -> None:
        assert self._replicas is not None
        self._open = False  # after the vote, the others know the result
        self._replicas.vote(None, checksum)
        self._open, self.done = not last, last


@contextmanager
def jointly(replicas: RankGroup | None) -> Iterator[Joint]:
    """A rank that fails inside the block reverts its change first, and then tells the others."""
    joint = Joint(replicas)
    try:
        joint.begin()
        yield joint
    except BaseException as error:
        joint.fail(error)
        raise


def why_not_replicable(ddp: DistributedDataParallel) -> str:
    """Why this wrapper's reducer cannot be rebuilt; empty if it can."""
    wrapper: Any = ddp
    if wrapper.mixed_precision is not None:
        return (
            "DistributedDataParallel(mixed_precision=…) prepares modules only once, so it "
            "would miss grafts; use torch.autocast instead"
        )
    if wrapper.static_graph:
        # A new reducer with it also fails when its first backward pass is inside no_sync().
        return (
            "DistributedDataParallel(static_graph=True) assumes a graph that never changes, but a "
            "graft changes it; leave static_graph out"
        )
    if wrapper._delay_all_reduce_params or wrapper._use_python_reducer:
        return (
            "DistributedDataParallel was made with delayed or compiled reduction, which Esper "
            "cannot rebuild; leave out delay_all_reduce_named_params and optimize_ddp="
            "'python_reducer'"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in wrapper.module.parameters()):
        return "the optimizer steps inside backward, which leaves no step boundary; step it after"
    hook = wrapper._get_ddp_logging_data().get("comm_hook", "")
    if hook not in ("", sum_in_background.__qualname__) and not wrapper._comm_hooks:
        return (
            "DistributedDataParallel has a built-in communication hook, which a new reducer "
            "would lose; use register_comm_hook with torch's Python hook of the same name"
        )
    if any(_keeps_buckets(state) for _, state in wrapper._comm_hooks):
        return (
            "the communication hook keeps a state of its own for DDP's buckets, and a graft "
            "changes them; use a hook whose state is None or a process group"
        )
    return ""


def _keeps_buckets(state: object) -> bool:
    return state is not None and not isinstance(state, distributed.ProcessGroup)


def shared_group(ranks: list[int], model: Any, device: torch.device) -> Any:
    """The :func:`control_group` of all sessions whose model uses the same process group.

    A group lives until the process group ends: to destroy one of several can hang the ranks.
    """
    of_model = _groups.setdefault(model, {})
    known = of_model.get(tuple(ranks))
    group = known() if known is not None else None
    if group is None:
        group = control_group(ranks, model, device)
        of_model[tuple(ranks)] = weakref.ref(group)
    return group


def control_group(ranks: list[int], model: Any, device: torch.device) -> Any:
    """A new gloo group with the same ranks and timeout, for small tensors on the CPU.

    Args:
        model: the process group that the model uses on ``device``.
    """
    backend: Any = model._get_backend(device)
    return distributed.new_group(
        ranks,
        backend="gloo",
        timeout=backend.options._timeout,
        use_local_synchronization=True,
        group_desc="esper",
    )


def _register(ddp: Any, state: object, hook: Any) -> None:
    ddp.logger._set_comm_hook_name(hook.__qualname__)
    register: Any = getattr(distributed, "_register_comm_hook")  # noqa: B009 - torch hides it
    register(ddp.reducer, state, hook)


def _key_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _bytes_of(tensor: Tensor) -> Tensor:
    """The tensor's bytes, uint8 on the CPU; a view if possible."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


@torch.no_grad()
def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    place = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        values = flat[place : place + size].clone().view(tensor.dtype).view(tensor.shape)
        tensor.copy_(values)
        place += size
