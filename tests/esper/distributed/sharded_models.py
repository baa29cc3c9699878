"""Small models that are spread over ranks in each of the ways that Esper knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from tests.esper.distributed.tiny_replica import batch

WIDTH, HEADS, TOKENS, WORDS = 8, 2, 6, 11
CPU = torch.device("cpu")


class Block(nn.Module):
    """A block of a transformer, with a norm, attention and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.fc1 = nn.Linear(WIDTH, 2 * WIDTH)
        self.fc2 = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        split = (len(x), -1, HEADS, WIDTH // HEADS)
        q, k, v = (part.reshape(split).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.fc2(torch.relu(self.fc1(x)))


class TinyTransformer(nn.Module):
    """Two blocks; the head's weight is the embedding's where it is tied."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Mlp(nn.Module):
    """Three layers, one of them with a single row, which one rank alone holds."""

    def __init__(self, *, frozen: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(7, 12)
        self.fc2 = nn.Linear(12, 1)
        self.fc3 = nn.Linear(1, 3)
        if frozen:
            self.fc1.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(torch.relu(self.fc1(x))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Mlp,
    "frozen": lambda: Mlp(frozen=True),
    "transformer": TinyTransformer,
    "tied": lambda: TinyTransformer(tied=True),
}


def parts(model: nn.Module) -> list[nn.Module]:
    """What a script wraps one by one, before the whole."""
    return [*model.blocks] if isinstance(model, TinyTransformer) else [model.fc1]  # type: ignore[list-item, misc]


def fsdp(model: nn.Module, **options: Any) -> nn.Module:
    def wrap(module: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(module, device_id=CPU, **options)

    if isinstance(model, TinyTransformer):
        for place, block in enumerate(model.blocks):
            model.blocks[place] = wrap(block)
    else:
        model.fc1 = wrap(model.fc1)  # type: ignore[arg-type]
    return wrap(model)


def fsdp2(model: nn.Module, mesh: DeviceMesh | None = None, **options: Any) -> nn.Module:
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for part in parts(model):
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    """Also a norm whose gradients are addends."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    if not isinstance(model, TinyTransformer):
        plan = {
            "fc1": ColwiseParallel(output_layouts=Shard(-1)),
            "fc2": RowwiseParallel(input_layouts=Shard(-1)),
        }
        return parallelize_module(model, mesh, plan)  # type: ignore[arg-type]
    whole, split = (Replicate(),), (Shard(1),)
    for block in model.blocks:
        split_tokens = PrepareModuleInput(input_layouts=whole, desired_input_layouts=split)
        parallelize_module(block, mesh, {"norm": split_tokens})
        parallelize_module(
            block,
            mesh,
            {
                "norm": SequenceParallel(),
                "qkv": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
                "fc1": ColwiseParallel(),
                "fc2": RowwiseParallel(),
            },
        )
    return model


def mesh_of(*axes: str) -> DeviceMesh:
    """2 x the rest of the ranks."""
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=axes)


def hybrid(model: nn.Module) -> nn.Module:
    return fsdp2(model, mesh_of("replicate", "shard"))


def two_axes(model: nn.Module) -> nn.Module:
    mesh = mesh_of("dp", "tp")
    return fsdp2(tensor_parallel(model, mesh["tp"]), mesh["dp"])


SHARDINGS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fsdp": lambda model: fsdp(model),
    "fsdp original": lambda model: fsdp(model, use_orig_params=True),
    "fsdp gradients": lambda model: fsdp(
        model, use_orig_params=True, sharding_strategy=ShardingStrategy.SHARD_GRAD_OP
    ),
    "fsdp whole": lambda model: fsdp(model, sharding_strategy=ShardingStrategy.NO_SHARD),
    "fsdp2": lambda model: fsdp2(model),
    "fsdp2 gathered": lambda model: fsdp2(model, reshard_after_forward=False),
    "fsdp2 mixed": lambda model: fsdp2(
        model,
        mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    ),
    "tensor parallel": tensor_parallel,
    "hybrid": hybrid,
    "two axes": two_axes,
}


@dataclass
class Side:
    """One rank's side of the training of one model.

    Attributes:
        drops: some gradients are cleared without a step.
        same_data: all ranks see the same rows, as tensor parallelism has it.
    """

    model: nn.Module
    same_data: bool
    size: int
    rank: int
    accumulate: int = 1
    evaluates: bool = False
    drops: bool = False
    optimizer: Any = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad], lr=0.01
        )

    def rows_of(self, at: int) -> list[int]:
        return [0] if self.same_data else [self.rank]

    def loss(self, at: int) -> Tensor:
        losses = [self._loss_of(row, at) for row in self.rows_of(at)]
        return torch.stack(losses).mean()

    def _loss_of(self, row: int, at: int) -> Tensor:
        x, y = batch(row, at)
        if isinstance(_inner(self.model), TinyTransformer):
            tokens = (10 * x.abs()).long()[:, :TOKENS] % WORDS
            return F.cross_entropy(self.model(tokens).flatten(0, 1), tokens.flatten())
        return F.cross_entropy(self.model(x), y)

    def step(self, at: int, session: Any = None) -> float:
        total = 0.0
        if self.drops and at % 2:
            self.loss(at + 3_000).backward()
            self.optimizer.zero_grad()
        for micro in range(self.accumulate):
            loss = self.loss(at * self.accumulate + micro) / self.accumulate
            loss.backward()
            total += loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(total)
        if self.evaluates and at % 3 == 0:
            with torch.no_grad():
                self.losses.append(self.loss(at + 1000).item())
        if session is not None:
            session.step(total)
        return total


class Whole(Side):
    """The same training in one process, with the rows of all ranks."""

    def rows_of(self, at: int) -> list[int]:
        return [0] if self.same_data else list(range(self.size))


def _inner(model: nn.Module) -> nn.Module:
    return getattr(model, "_fsdp_wrapped_module", model)


def make(model: str, sharding: str | None, rank: int, size: int, **options: Any) -> Side:
    """A model with the same weights at each call; ``sharding`` None: in one process."""
    torch.manual_seed(5)
    module = MODELS[model]()
    same = sharding in ("tensor parallel", "two axes")
    if sharding is None:
        return Whole(module, options.pop("same_data", False), size, rank, **options)
    return Side(SHARDINGS[sharding](module), same, size, rank, **options)
