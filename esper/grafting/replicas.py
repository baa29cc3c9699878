"""One model on several ranks: what is done to one replica is done to all, or to none.

DistributedDataParallel learns its parameters when it is made. A module that comes later gets no
averaged gradient, without a word: the replicas drift apart. So the ranks build with one seed, take
rank 0's tensors, vote, and give DDP a new reducer, at one step boundary; then they compare.

    build → vote → rank 0's tensors → certify, swap in → new reducer → vote with a checksum
A "no", an exception or another checksum anywhere takes the graft out again on all ranks.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from esper.blueprints.gradient_reduction import WHOLE_MODEL_KIND, GradientReduction
from esper.contracts import LayerInfo
from esper.exceptions import ConfigurationError, ReplicaError
from esper.grafting.communication_hooks import BucketThread, sum_in_background
from esper.grafting.slot import CONTAINERS, slot_of

WHOLE_MODEL = ""  # the name of the "layer" that is all replicas together


class Call(IntEnum):
    """What a rank came to the meeting for."""

    ATTACH = 1
    STEP = 2
    GRAFT = 3
    UNDO = 4
    LOAD = 5
    VOTE = 6
    REMEDY = 7


@dataclass(frozen=True, slots=True)
class Meeting:
    """What all ranks said.

    Attributes:
        loss: mean over the ranks that have one; NaN or infinite where any rank's is. None: nobody
            has one yet.
        busy: rank 0 has, or may have, something for all to do.
    """

    loss: float | None
    busy: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """One rank's word. All meetings have rows of one size, so a wrong one is seen, not hung on."""

    call: Call
    step: int
    key: int = 0
    flag: bool = False
    loss: float | None = None

    def pack(self) -> Tensor:
        has_loss = self.loss is not None
        bits = struct.unpack("<q", struct.pack("<d", self.loss or 0.0))[0]
        return torch.tensor([self.call, self.step, self.key, self.flag, has_loss, bits])

    @classmethod
    def unpack(cls, values: Sequence[int]) -> _Row:
        call, step, key, flag, has_loss, bits = values
        loss = struct.unpack("<d", struct.pack("<q", bits))[0] if has_loss else None
        return cls(Call(call), step, key, bool(flag), loss)

    def __str__(self) -> str:
        return f"{self.call.name.lower()} at step {self.step}"


class Replicas:
    """The ranks of one DDP model, as one of them sees the others.

    Talks over a gloo group of its own, so that nothing of it comes between the user's
    collectives. Making it is a collective call.

    Args:
        ddp: the user's wrapper; it stays the same object, its reducer is replaced.

    Raises:
        ConfigurationError: this wrapper is used in a way that a new reducer would not keep.
    """

    def __init__(self, ddp: DistributedDataParallel) -> None:
        reason = why_not_replicable(ddp)
        if reason:
            raise ConfigurationError(reason)
        self._ddp = ddp
        self.group = _control_group(ddp)
        self.rank = int(distributed.get_rank(self.group))
        self.size = int(distributed.get_world_size(self.group))
        self._thread: BucketThread | None = None

    @property
    def lead(self) -> bool:
        """This is rank 0: it alone decides and talks to the server."""
        return self.rank == 0

    def why_not(self) -> str:
        """Why the reducer cannot be built anew by now; empty where it can."""
        return why_not_replicable(self._ddp)

    @property
    def whole_model(self) -> LayerInfo:
        """The model as all ranks share it: what a gradient reduction is grafted into."""
        parameters = [p for p in self._ddp.module.parameters() if p.requires_grad]
        reason = self._why_no_reduction()
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

    # -- talking -------------------------------------------------------------------------------

    def meet(
        self, call: Call, step: int, *, key: str = "", loss: float | None = None, busy: bool = False
    ) -> Meeting:
        """All ranks come together, once per call, and say what they came for.

        Args:
            key: what must be the same on all ranks, such as the name of a layer.

        Raises:
            ReplicaError: they did not come for the same; raised on all ranks alike.
        """
        rows = self._gather(_Row(call, step, _key_of(key), busy, loss))
        if len({(row.call, row.step, row.key) for row in rows}) > 1:
            said = "; ".join(f"rank {rank}: {row}" for rank, row in enumerate(rows))
            raise ReplicaError(
                f"the ranks do not do the same, in the same order, with the same arguments: {said}"
            )
        losses = [row.loss for row in rows if row.loss is not None]
        return Meeting(loss=sum(losses) / len(losses) if losses else None, busy=rows[0].flag)

    def order(self, message: dict[str, Any] | None) -> None:
        """Rank 0: tell the others what to do next; None ends it."""
        raw = b"" if message is None else json.dumps(message).encode()
        self._broadcast(torch.tensor([len(raw)]))
        if raw:
            self._broadcast(torch.frombuffer(bytearray(raw), dtype=torch.uint8))

    def take_order(self) -> dict[str, Any] | None:
        """The others: what rank 0 wants next; None when there is no more."""
        length = torch.zeros(1, dtype=torch.int64)
        self._broadcast(length)
        if not int(length):
            return None
        raw = torch.empty(int(length), dtype=torch.uint8)
        self._broadcast(raw)
        message: dict[str, Any] = json.loads(raw.numpy().tobytes())
        return message

    def mean(self, value: float) -> float:
        """Of all ranks; NaN where one has none."""
        rows = self._gather(_Row(Call.STEP, 0, loss=value))
        return sum(row.loss or 0.0 for row in rows) / self.size

    def vote(self, error: BaseException | None, checksum: str = "") -> None:
        """Goes on only where no rank has an error and all have the same checksum.

        Raises:
            ReplicaError: says which rank said no, and why; on a rank with an ``error`` nothing is
                raised, for it has its own to raise.
        """
        rows = self._gather(_Row(Call.VOTE, 0, _key_of(checksum), error is None))
        if not all(row.flag for row in rows):
            reasons = self._gather_texts("" if error is None else _reason(error))
            if error is None:
                raise ReplicaError("; ".join(reasons))
        elif len({row.key for row in rows}) > 1:
            raise ReplicaError("the replicas are not equal: their checksums differ")

    def share(self, flat: Tensor) -> None:
        """Rank 0's bytes to all, in place."""
        self._broadcast(flat)

    # -- the reducer ---------------------------------------------------------------------------

    def rebuild_reducer(self) -> None:
        """Lets DDP look again at which parameters there are, and how they are summed.

        What its constructor would do, so that the user's wrapper stays the same object.
        """
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
        """The gradient reduction that is grafted into the whole model, if any."""
        slot = slot_of(self._ddp.module)
        grafts = slot.grafts().values() if slot is not None else ()
        return next((graft for graft in grafts if isinstance(graft, GradientReduction)), None)

    def checksum(self) -> str:
        """Hex SHA-256 over what DDP keeps equal: the parameters, and which of them it knows.

        Not the buffers: between two forward passes each rank has its own.
        """
        total = hashlib.sha256()
        for name, parameter in self._ddp.module.named_parameters():
            if name not in self._ddp.parameters_to_ignore:
                total.update(f"{name}\0{parameter.dtype}\0{tuple(parameter.shape)}\0".encode())
                total.update(_bytes_of(parameter).numpy().data)
        return total.hexdigest()

    def _why_no_reduction(self) -> str:
        if isinstance(self._ddp.module, CONTAINERS):
            kind = type(self._ddp.module).__name__
            return f"the model is a bare {kind}, which would run the graft as one of its layers"
        if self._ddp._comm_hooks:
            return "the script has a communication hook of its own, and DDP takes one"
        if next(self._ddp.module.parameters()).device.type != "cpu":
            return "reductions between processes are proven on CPU (gloo) only"
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

    # -- collectives ---------------------------------------------------------------------------

    def _gather(self, row: _Row) -> list[_Row]:
        mine = row.pack()
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine, group=self.group)
        return [_Row.unpack(values.tolist()) for values in everyone]

    def _gather_texts(self, text: str) -> list[str]:
        """What the ranks that have something to say say."""
        raw = text.encode()[:2000].ljust(2000)
        mine = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine, group=self.group)
        texts = [row.numpy().tobytes().decode(errors="replace").strip() for row in everyone]
        return [f"rank {rank}: {said}" for rank, said in enumerate(texts) if said]

    def _broadcast(self, tensor: Tensor) -> None:
        distributed.broadcast(tensor, group_src=0, group=self.group)


class Joint:
    """One operation of all replicas. With ``replicas`` None it is one process's own business.

    Attributes:
        done: all ranks know that all have done it; from here on nobody may go back alone.
    """

    def __init__(self, replicas: Replicas | None) -> None:
        self._replicas = replicas
        self.done = False
        self._open = replicas is not None  # the others still wait for this rank's word
        self._rebuilt = False

    def share(self, graft: nn.Module) -> None:
        """All ranks have built the same, and now hold rank 0's tensors."""
        if self._replicas is None:
            return
        tensors = [*graft.parameters(), *graft.buffers()]
        parts = [_bytes_of(tensor) for tensor in tensors]
        flat = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        self._vote(repr([(name, t.shape, t.dtype) for name, t in graft.state_dict().items()]))
        if len(flat):
            self._replicas.share(flat)
        _fill(tensors, flat)

    def commit(self) -> None:
        """It is done on this rank; returns when it is done on all, and all are equal."""
        if self._replicas is not None:
            self._rebuilt = True  # from its first line on it must be done again
            self._replicas.rebuild_reducer()
            self._vote(self._replicas.checksum(), last=True)

    def agree(self) -> None:
        """It is undone on this rank; returns when it is undone on all."""
        if self._replicas is not None:
            self._rebuilt = True
            self._replicas.rebuild_reducer()
            self._vote("", last=True)

    def fail(self, error: BaseException) -> None:
        """This rank is as it was before; the others shall be too."""
        if self._replicas is None or self.done:
            return
        try:
            if self._open:
                self._open = False
                self._replicas.vote(error)
        finally:
            if self._rebuilt:
                self._replicas.rebuild_reducer()

    def _vote(self, checksum: str, *, last: bool = False) -> None:
        assert self._replicas is not None
        self._open = False  # whatever comes out of it, the others know
        self._replicas.vote(None, checksum)
        self._open, self.done = not last, last


@contextmanager
def jointly(replicas: Replicas | None) -> Iterator[Joint]:
    """Inside, a rank that fails puts itself back first, and then lets the others know."""
    joint = Joint(replicas)
    try:
        yield joint
    except BaseException as error:
        joint.fail(error)
        raise


def why_not_replicable(ddp: DistributedDataParallel) -> str:
    """Why this wrapper's reducer cannot be built anew; empty where it can."""
    wrapper: Any = ddp
    if wrapper.mixed_precision is not None:
        return (
            "DistributedDataParallel(mixed_precision=…) prepares each module when it is made, "
            "which would miss grafts: use torch.autocast in its place"
        )
    if wrapper.static_graph:
        # And a new reducer with it fails when its first backward pass is inside no_sync().
        return (
            "DistributedDataParallel(static_graph=True) promises a graph that never changes, and a "
            "graft changes it: make it without"
        )
    if wrapper._delay_all_reduce_params or wrapper._use_python_reducer:
        return (
            "DistributedDataParallel was made with delayed or compiled reduction, which Esper "
            "cannot renew: make it without delay_all_reduce_named_params and optimize_ddp="
            "'python_reducer'"
        )
    if any(hasattr(p, "_in_backward_optimizers") for p in wrapper.module.parameters()):
        return "the optimizer steps inside backward, where no step boundary is: step it after"
    hook = wrapper._get_ddp_logging_data().get("comm_hook", "")
    if hook not in ("", sum_in_background.__qualname__) and not wrapper._comm_hooks:
        return (
            "DistributedDataParallel has a built-in communication hook, which a new reducer "
            "would lose: use register_comm_hook with torch's Python hook of the same name"
        )
    if any(_keeps_buckets(state) for _, state in wrapper._comm_hooks):
        return (
            "the communication hook keeps a state of its own for DDP's buckets, and a graft "
            "changes them: use a hook whose state is None or a process group"
        )
    return ""


def _keeps_buckets(state: object) -> bool:
    return state is not None and not isinstance(state, distributed.ProcessGroup)


def _control_group(ddp: DistributedDataParallel) -> Any:
    """A gloo group of the same ranks and patience; tensors in it are small and on the CPU."""
    ranks = distributed.get_process_group_ranks(ddp.process_group)
    backend: Any = ddp.process_group._get_backend(ddp.device)
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
    """The tensor's bytes, uint8 on the CPU; a view where it can be one."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


@torch.no_grad()
def _fill(tensors: Sequence[Tensor], flat: Tensor) -> None:
    place = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        values = flat[place : place + size].clone().view(tensor.dtype).view(tensor.shape)
        tensor.copy_(values)
        place += size
