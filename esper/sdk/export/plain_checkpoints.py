"""A framework's own checkpoint of optimizers and schedulers, as it would be without Esper.

Lightning and the HF Trainer load the optimizers before any callback could rebuild a graft, and stop
when they find groups that the fresh optimizer does not have. So their part of a checkpoint leaves
out what belongs to grafts; Esper's part holds it by name. The model's part holds the grafts, as it
would be another model without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esper.grafting.ledger import GROUP_LISTS, is_own_key, is_users_group

# [optimizer][group][tensor], as the script made them
Layout = Sequence[Sequence[Sequence[Tensor]]]


def layout_of(optimizers: Sequence[torch.optim.Optimizer]) -> Layout:
    """The groups as they are now, to be remembered before anything is grafted."""
    return [
        [list(group["params"]) for group in optimizer.param_groups if is_users_group(group)]
        for optimizer in optimizers
    ]


def plain_optimizer_state(
    optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[Tensor]]
) -> dict[str, Any]:
    """As ``optimizer.state_dict()``, of the tensors and in the groups that the script gave it."""
    numbers = {id(p): n for n, p in enumerate(p for group in groups for p in group)}
    users = [group for group in optimizer.param_groups if is_users_group(group)]
    return {
        "state": {
            numbers[id(p)]: dict(held) for p, held in optimizer.state.items() if id(p) in numbers
        },
        "param_groups": [
            {
                **{key: value for key, value in group.items() if not is_own_key(key)},
                "params": [numbers[id(p)] for p in tensors],
            }
            for group, tensors in zip(users, groups, strict=True)
        ],
    }


def plain_scheduler_state(
    state: dict[str, Any], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """A scheduler's state dict with an entry only for each of the script's own groups."""
    places = [n for n, group in enumerate(optimizer.param_groups) if is_users_group(group)]
    size = len(optimizer.param_groups)
    plain = dict(state)
    for key, value in state.items():
        if key in GROUP_LISTS and isinstance(value, list) and len(value) == size:
            plain[key] = [value[place] for place in places]
        elif key == "_schedulers":  # of a chain
            plain[key] = [plain_scheduler_state(inner, optimizer) for inner in value]
    return plain
