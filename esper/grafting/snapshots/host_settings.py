"""What a script sets and training leaves alone: flags, parameter groups, hyper-parameters.

A hard undo restores what training has changed since the snapshot. What the script itself has set
since then must survive the undo. Two records of these settings tell the two apart:

    goal   what an undo must leave behind; at first the settings at the snapshot
    seen   the settings after the last change that Esper made itself

The script has set what differs between ``seen`` and the present; :func:`carry_over` puts that into
``goal``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esper.by_identity import ByIdentity
from esper.grafting.optimizers import unwrap_optimizer
from esper.grafting.tensors.forms import shape_of
from esper.grafting.tensors.saved_values import (
    Copy,
    SavedTensor,
    refill,
    restored,
    same_value,
    save_tree,
)

# Per-group lists of torch's schedulers.
GROUP_LISTS = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)
# Written into a group by a scheduler's constructor.
_BY_SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"})
# Hyper-parameters of an optimizer whose constructor names none of its own, such as **kwargs.
_COMMON = frozenset({"lr", "weight_decay", "momentum", "betas", "eps"})
_CYCLED = frozenset({"momentum", "betas"})  # also set by OneCycleLR and CyclicLR
_LAST_RATES = "_last_lr"
_SAME_RATE = 1e-5  # relative: a scheduler's recursion and its closed form differ by rounding
_SCALER_SETTINGS = frozenset({"growth_factor", "backoff_factor", "growth_interval"})

NameOf = Callable[[Tensor], str]


@dataclass(slots=True, eq=False)
class GroupRecord:
    """One parameter group.

    Attributes:
        group: the living dict.
        values: saved values of all keys but ``params``.
        settings: plain values of the keys that a script sets; the others are counters of training.
        rate: learning rate divided by the one that a known scheduler has set; NaN without one.
        entries: (place of the scheduler, name of its list) -> this group's entry.
        added: the script has added the group since the snapshot; an undo leaves its values alone.
    """

    group: dict[str, Any]
    params: list[Tensor]
    values: dict[str, Any]
    settings: dict[str, Any]
    rate: float
    entries: dict[tuple[int, str], Any]
    added: bool = False

    def copy(self) -> GroupRecord:
        return replace(
            self,
            params=list(self.params),
            values=dict(self.values),
            settings=dict(self.settings),
            entries=dict(self.entries),
        )


@dataclass(slots=True, eq=False)
class Members:
    """The parameters and buffers of one module, by name."""

    parameters: dict[str, nn.Parameter | None]
    buffers: dict[str, Tensor | None]

    @classmethod
    def of(cls, module: nn.Module) -> Members:
        return cls(dict(module._parameters), dict(module._buffers))

    def copy(self) -> Members:
        return Members(dict(self.parameters), dict(self.buffers))


@dataclass(slots=True, eq=False)
class HostSettings:
    """The settings of a model and of what trains it, at one moment."""

    members: ByIdentity[nn.Module, Members]
    flags: dict[Tensor, bool]  # requires_grad
    groups: list[list[GroupRecord]]  # by optimizer
    schedulers: list[dict[str, Any]]  # by scheduler

    @classmethod
    def read(
        cls,
        modules: Iterable[nn.Module],
        parameters: Iterable[Tensor],
        optimizers: Sequence[torch.optim.Optimizer],
        schedulers: Sequence[Any],
        copied: Copy = torch.clone,
    ) -> HostSettings:
        """The present settings of these objects."""
        return cls(
            members=ByIdentity((module, Members.of(module)) for module in modules),
            flags={parameter: parameter.requires_grad for parameter in parameters},
            groups=[_read_groups(optimizer, schedulers, copied) for optimizer in optimizers],
            schedulers=[_scheduler_settings(scheduler) for scheduler in schedulers],
        )

    def copy(self) -> HostSettings:
        return HostSettings(
            members=ByIdentity((module, own.copy()) for module, own in self.members.items()),
            flags=dict(self.flags),
            groups=[[record.copy() for record in records] for records in self.groups],
            schedulers=[dict(settings) for settings in self.schedulers],
        )


# -- reading -----------------------------------------------------------------------------------


def _read_groups(
    optimizer: torch.optim.Optimizer, schedulers: Sequence[Any], copied: Copy
) -> list[GroupRecord]:
    groups, defaults = optimizer.param_groups, optimizer.defaults
    arguments = _arguments_of(type(optimizer)) | _BY_SCHEDULERS
    mine = [(i, s) for i, s in enumerate(schedulers) if _drives(s, optimizer)]
    scheduled = {"lr"} | _CYCLED if any(map(_cycles, mine)) else {"lr"} if mine else set()
    rates = _scheduled_rates(mine, len(groups))
    lists = {
        (i, name): values
        for i, scheduler in mine
        for name, values in _group_lists(scheduler, len(groups)).items()
    }
    return [
        GroupRecord(
            group=group,
            params=list(group["params"]),
            values={k: save_tree(v, copied) for k, v in group.items() if k != "params"},
            settings={
                key: _plain(value)
                for key, value in group.items()
                if key not in scheduled and _is_setting(key, value, arguments, defaults)
            },
            rate=_ratio(group.get("lr"), rates[place] if rates else None),
            entries={key: _plain(values[place]) for key, values in lists.items()},
        )
        for place, group in enumerate(groups)
    ]


def _is_setting(key: str, value: Any, arguments: frozenset[str], defaults: dict[str, Any]) -> bool:
    """A script sets this key of a group; training, or Esper, sets the others.

    Optimizers such as Prodigy and schedule-free keep counters in their groups: numbers that are not
    arguments of the constructor.
    """
    if key == "params" or is_own_key(key):
        return False
    if key in arguments:
        return True
    counts = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
    return not counts and key not in defaults


def _arguments_of(kind: type[Any]) -> frozenset[str]:
    """Names of the constructor's arguments."""
    return _COMMON | frozenset(inspect.signature(kind).parameters)


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """The scheduler's attributes that a script sets. Per-group lists belong to the groups."""
    names = _arguments_of(type(scheduler)) - {"optimizer", "last_epoch", "schedulers"}
    own = vars(scheduler)
    return {name: own[name] for name in names & own.keys() - set(GROUP_LISTS)}


def is_own_key(key: str) -> bool:
    """Esper added this entry to a group."""
    return key.startswith("esper_")


def _drives(scheduler: Any, optimizer: torch.optim.Optimizer) -> bool:
    held = getattr(scheduler, "optimizer", None)
    return held is None or unwrap_optimizer(held) is optimizer


def _group_lists(scheduler: Any, size: int) -> dict[str, list[Any]]:
    """The scheduler's lists with one entry for each of ``size`` groups."""
    lists = {name: vars(scheduler).get(name) for name in GROUP_LISTS}
    return {
        name: values
        for name, values in lists.items()
        if isinstance(values, list) and len(values) == size
    }


def _cycles(entry: tuple[int, Any]) -> bool:
    return bool(getattr(entry[1], "cycle_momentum", False))


def _scheduled_rates(schedulers: Sequence[tuple[int, Any]], groups: int) -> list[Any]:
    """The learning rate of each group as the known schedulers have set it; empty if unknown.

    The closed form comes first, because a recursive scheduler continues from a rate that the script
    has written, and its last rates contain that.
    """
    for _, scheduler in schedulers:
        closed = getattr(scheduler, "_get_closed_form_lr", None)
        rates: Any = getattr(scheduler, _LAST_RATES, None)
        if closed is not None and len(schedulers) == 1:
            rates = list(closed())
        if isinstance(rates, list) and len(rates) == groups:
            return rates
    return []


def _ratio(rate: Any, scheduled: Any) -> float:
    if rate is None or not scheduled:
        return math.nan
    return float(rate) / float(scheduled)


def _plain(value: Any) -> Any:
    """Comparable by value, and not changed in place by anyone."""
    if isinstance(value, Tensor):
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


# -- what the script has set since ---------------------------------------------------------------


def carry_over(goal: HostSettings, seen: HostSettings, now: HostSettings) -> None:
    """Puts what the script has set between ``seen`` and ``now`` into ``goal``."""
    for module, members in now.members.items():
        if module in seen.members and module in goal.members:
            before, target = seen.members[module], goal.members[module]
            _carry_dict(target.parameters, before.parameters, members.parameters, _is_same_object)
            _carry_dict(target.buffers, before.buffers, members.buffers, _is_same_buffer)
    for parameter, flag in now.flags.items():
        if seen.flags.get(parameter) != flag:  # also where the script has added the parameter
            goal.flags[parameter] = flag
    for records in zip(goal.groups, seen.groups, now.groups, strict=True):
        _carry_groups(*records)
    for settings in zip(goal.schedulers, seen.schedulers, now.schedulers, strict=True):
        _carry_dict(*settings, same_value)


def _carry_dict(
    goal: dict[Any, Any],
    seen: dict[Any, Any],
    now: dict[Any, Any],
    same: Callable[[Any, Any], bool],
) -> None:
    for key in [*seen.keys() - now.keys()]:
        goal.pop(key, None)
    for key, value in now.items():
        if key not in seen or not same(seen[key], value):
            goal[key] = value


def _is_same_object(one: Any, other: Any) -> bool:
    return one is other


def _is_same_buffer(one: Tensor | None, other: Tensor | None) -> bool:
    """Layers also assign new tensors to their buffers in training; those have the same form."""
    if one is None or other is None:
        return one is other
    return form_of(one) == form_of(other)


def form_of(tensor: Tensor) -> tuple[Any, ...]:
    """What training never changes of a tensor."""
    return (type(tensor), shape_of(tensor), tensor.dtype, tensor.device)


def _carry_groups(goal: list[GroupRecord], seen: list[GroupRecord], now: list[GroupRecord]) -> None:
    known = _matched(now, seen)
    targets = {place: goal[i] for place, i in _matched(seen, goal).items()}
    homes = {parameter: place for place, record in enumerate(seen) for parameter in record.params}
    for place in set(range(len(seen))) - set(known.values()):
        if place in targets:  # the script has removed it
            goal.remove(targets[place])
    _drop(goal, homes.keys() - {parameter for record in now for parameter in record.params})
    for i, record in enumerate(now):
        if i not in known:
            _drop(goal, record.params)
            goal.append(replace(record.copy(), added=True))
        elif known[i] in targets:  # otherwise Esper's own group, which the undo removes
            target = targets[known[i]]
            moved = [p for p in record.params if homes.get(p) != known[i]]
            _drop(goal, moved)
            target.params += moved
            _carry_values(target, seen[known[i]], record)


def _carry_values(target: GroupRecord, seen: GroupRecord, now: GroupRecord) -> None:
    target.group = now.group  # load_state_dict of an optimizer makes new dicts
    if target.added:
        target.values, target.settings = dict(now.values), dict(now.settings)
        target.entries, target.rate = dict(now.entries), now.rate
        return
    changed = dict(target.settings)
    _carry_dict(changed, seen.settings, now.settings, same_value)
    for key in target.settings.keys() - changed.keys():
        target.values.pop(key, None)
    for key, value in changed.items():
        if key not in target.settings or not same_value(target.settings[key], value):
            target.values[key] = now.values[key]
    target.settings = changed
    _carry_dict(target.entries, _constants(seen), _constants(now), same_value)
    _carry_rate(target, seen.rate, now.rate)


def _constants(record: GroupRecord) -> dict[tuple[int, str], Any]:
    """Its entries in the lists that schedulers do not change themselves."""
    return {key: value for key, value in record.entries.items() if key[1] != _LAST_RATES}


def _carry_rate(target: GroupRecord, seen: float, now: float) -> None:
    """A rate that the script has scaled beside a known scheduler stays scaled."""
    if not (seen > 0 and now >= 0) or math.isclose(seen, now, rel_tol=_SAME_RATE):
        return
    rate = target.values["lr"]
    if isinstance(rate, SavedTensor):
        rate = replace(rate, value=rate.value * (now / seen))
    else:
        rate = rate * (now / seen)
    target.values["lr"] = rate
    target.rate *= now / seen


def _matched(records: list[GroupRecord], others: list[GroupRecord]) -> dict[int, int]:
    """place -> place of the same group among ``others``: the same dict, or one with its tensors."""
    by_dict = {id(record.group): place for place, record in enumerate(others)}
    found = {i: by_dict[id(r.group)] for i, r in enumerate(records) if id(r.group) in by_dict}
    if not found and len(records) == len(others):
        return {place: place for place in range(len(records))}
    for i, record in enumerate(records):
        if i not in found:
            own = {id(parameter) for parameter in record.params}
            free = (j for j in range(len(others)) if j not in found.values())
            shared = (j for j in free if any(id(p) in own for p in others[j].params))
            place = next(shared, None)
            if place is not None:
                found[i] = place
    return found


def _drop(records: list[GroupRecord], parameters: Iterable[Tensor]) -> None:
    gone = {id(parameter) for parameter in parameters}
    if gone:
        for record in records:
            record.params = [p for p in record.params if id(p) not in gone]


# -- applying ----------------------------------------------------------------------------------


def apply_groups(optimizer: torch.optim.Optimizer, records: Sequence[GroupRecord]) -> None:
    """Makes the optimizer's groups those of ``records``."""
    optimizer.param_groups[:] = [record.group for record in records]
    for record in records:
        if record.added:
            record.group["params"] = list(record.params)
        else:
            params = list(record.params)
            refill(record.group, {**restored(record.values), "params": params})


def apply_lists(scheduler: Any, place: int, groups: Sequence[Sequence[GroupRecord]]) -> None:
    """Makes the scheduler's per-group lists those of its optimizer's ``groups``."""
    for name in GROUP_LISTS:
        for records in groups:
            key = (place, name)
            entries = [record.entries[key] for record in records if key in record.entries]
            values = vars(scheduler).get(name)
            if not isinstance(values, list) or not entries or len(entries) != len(records):
                continue  # the script has not given its own group an entry
            if not same_value([_plain(value) for value in values], entries):
                values[:] = entries


def keep_scaler_settings(state: dict[str, Any], scaler: Any) -> dict[str, Any]:
    """A scaler's saved state, with its present settings."""
    present = scaler.state_dict()
    return {**state, **{key: present[key] for key in _SCALER_SETTINGS & present.keys()}}


# -- words -------------------------------------------------------------------------------------


def describe(before: HostSettings, after: HostSettings, name_of: NameOf) -> list[str]:
    """What the script has set between the two, one entry per kind and value."""
    found: dict[str, list[str]] = {}
    for what, subject in (*_flag_changes(before, after, name_of), *_member_changes(before, after)):
        found.setdefault(what, []).append(subject)
    texts = [f"{what}: {listed(subjects)}" for what, subjects in found.items()]
    for old, new in zip(before.groups, after.groups, strict=True):
        texts += _group_changes(old, new, name_of)
    for one, other in zip(before.schedulers, after.schedulers, strict=True):
        changed = [key for key in other if key not in one or not same_value(one[key], other[key])]
        texts += [f"{key} of a scheduler: {other[key]}" for key in sorted(changed)]
    return texts


def listed(names: Sequence[str], most: int = 4) -> str:
    """A few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _flag_changes(
    before: HostSettings, after: HostSettings, name_of: NameOf
) -> Iterator[tuple[str, str]]:
    for parameter, flag in after.flags.items():
        if before.flags.get(parameter, flag) != flag:
            yield f"requires_grad={flag}", name_of(parameter)


def _member_changes(before: HostSettings, after: HostSettings) -> Iterator[tuple[str, str]]:
    for module, members in after.members.items():
        kind, old = type(module).__name__, before.members[module]
        for what, was, now in (
            ("parameter", old.parameters, members.parameters),
            ("buffer", old.buffers, members.buffers),
        ):
            for name in now.keys() - was.keys():
                yield f"{what} registered", f"{name} of a {kind}"
            for name in was.keys() - now.keys():
                yield f"{what} removed", f"{name} of a {kind}"
            for name in now.keys() & was.keys():
                if now[name] is not was[name]:
                    yield f"{what} replaced", f"{name} of a {kind}"


def _group_changes(
    before: list[GroupRecord], after: list[GroupRecord], name_of: NameOf
) -> Iterator[str]:
    places = {id(record.group): place for place, record in enumerate(before)}
    pairs = _matched(after, before)
    for i, record in enumerate(after):
        if record.added:
            yield f"parameter group added: {listed([name_of(p) for p in record.params])}"
            continue
        old = before[places.get(id(record.group), pairs.get(i, i))]
        yield from _value_changes(i, old, record)
        taken = {id(p) for p in record.params}
        had = {id(p) for p in old.params}
        for what, names in (
            ("added to", [name_of(p) for p in record.params if id(p) not in had]),
            ("taken out of", [name_of(p) for p in old.params if id(p) not in taken]),
        ):
            if names:
                yield f"tensors {what} parameter group {i}: {listed(names)}"
    gone = len(before) - sum(not record.added for record in after)
    if gone > 0:
        yield f"parameter groups removed: {gone}"


def _value_changes(place: int, before: GroupRecord, after: GroupRecord) -> Iterator[str]:
    old, new = before.settings, after.settings
    for key in sorted(old.keys() | new.keys()):
        if key not in new:
            yield f"{key} of parameter group {place}: removed"
        elif key not in old or not same_value(old[key], new[key]):
            yield f"{key} of parameter group {place}: {new[key]}"
    scaled = math.isfinite(after.rate) and math.isfinite(before.rate)
    if scaled and not math.isclose(before.rate, after.rate, rel_tol=_SAME_RATE):
        yield f"lr of parameter group {place}: scaled by {after.rate / before.rate:.3g}"
    was = _constants(before)
    for entry, value in _constants(after).items():
        if not same_value(was.get(entry), value):
            yield f"{entry[1]} of a scheduler, parameter group {place}: {value}"
