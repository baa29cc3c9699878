"""The slot: where grafts sit in a model.

A slot is a child module ``esper`` on the layer plus one forward hook, the module-level function
:func:`run_slot`. The layer itself is never replaced, renamed or re-classed: its parameter names,
ties and ``isinstance`` checks stay as they are. The hook finds its slot through the layer, so that
copies by ``copy.deepcopy`` and pickle are independent, and it can be traced by torch.compile: an
empty slot leaves nothing in the graph, a graft is compiled with its layer, and after an undo the
older code runs again. It runs once per call, not per step: a layer that is called twice in a
forward pass runs its grafts twice.
"""

from __future__ import annotations

import copy
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._dynamo.decorators import skip
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from esper.blueprints import Graft
from esper.blueprints.base import introduce
from esper.exceptions import GraftError, UnknownLayerError
from esper.fail_closed import is_the_scripts, short
from esper.grafting.compiled import forget_compiled_code
from esper.grafting.hooks import PassingHook, apart, register_alike
from esper.grafting.manifest import MANIFEST_KEY, GraftRecord, pack
from esper.grafting.spans import Carrier, Source, Span, lay_hooks
from esper.near_names import or_known

SLOT_NAME = "esper"
LOAD_HOOK_MARK = "follows_loads_of_esper"
# Said by torch where a region with fullgraph=True would have to be split.
_OTHER_FORM = "an Esper graft was called with other axes or channels than it was made for"
# How activation checkpointing ends the part of a forward pass that it runs again.
_RECOMPUTED_ENOUGH = "_StopRecomputationError"
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

Watcher = Callable[[Tensor, Tensor], None]

logger = logging.getLogger("esper")


class Compiled(Protocol):
    """A graft's ``combine`` as machine code, for calls with matching shapes."""

    def fits(self, x: Tensor, y: Tensor) -> bool: ...

    def __call__(self, graft: Graft, x: Tensor, y: Tensor) -> Tensor: ...


class Slot(nn.Module):
    """Holds a layer's grafts as children, named by slug, in the order of insertion."""

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, GraftRecord] = {}
        self.carriers: dict[str, Carrier] = {}  # by slug, of grafts that span layers
        self.failure = ""  # why the grafts were left out of a call
        self.attaches = True  # grafts may register hooks on the host
        # Kept, because unpickling the handle reserves the hook's number in a new process.
        self.handle: RemovableHandle | None = None
        self._watchers: dict[int, Watcher] = {}
        self.until_empty = False
        self._next_watcher = 0
        # In addition to the grafts: parameters, names and copies belong to the graft.
        self._compiled: dict[str, tuple[Graft, Compiled]] = {}
        # By slug: what else must happen when a state without the graft is loaded.
        self._leave: dict[str, list[Callable[[], object]]] = {}
        self.load_handles: list[RemovableHandle] = []  # see esper.grafting.state_dicts
        self._copies: list[weakref.ref[Slot]] = []

    @property
    def copies(self) -> tuple[Slot, ...]:
        """The slots of living ``copy.deepcopy``s of the model."""
        living = [(ref, slot) for ref in self._copies if (slot := ref()) is not None]
        self._copies = [ref for ref, _ in living]
        return tuple(slot for _, slot in living)

    @property
    def is_watched(self) -> bool:
        return bool(self._watchers)

    def grafts(self) -> dict[str, Graft]:
        """slug -> graft, oldest first."""
        return {name: graft for name, graft in self._modules.items() if isinstance(graft, Graft)}

    def insert(self, record: GraftRecord, graft: Graft) -> None:
        """Adds a graft after the present ones."""
        self.add_module(record.blueprint, graft)
        self.records[record.blueprint] = record
        if record.layer.since:
            self.carriers[record.blueprint] = Carrier()
        self._compiled.clear()
        self.introduce()

    def take_out(self, slug: str) -> Graft:
        """Removes one graft and detaches it from the layer."""
        graft = self.grafts()[slug]
        graft.detach()
        del self._modules[slug]
        self.records.pop(slug, None)  # absent if an insertion was interrupted
        self.carriers.pop(slug, None)
        self._leave.pop(slug, None)
        self._compiled.clear()  # grafts may use one another's results
        introduce((graft,))
        self.introduce()
        return graft

    def on_leave(self, slug: str, leave: Callable[[], object]) -> None:
        """:meth:`leave` calls ``leave`` when the graft is out."""
        self._leave.setdefault(slug, []).append(leave)

    def leave(self, slug: str) -> bool:
        """A state without this graft is loaded: it goes, and is not trained any more.

        Returns:
            True where the user was told of it.
        """
        others = self._leave.pop(slug, [])
        self.take_out(slug)
        told = [bool(leave()) for leave in others]
        return any(told)

    def manifest(self) -> list[dict[str, Any]]:
        """The grafts as JSON values, in the order in which they run."""
        return [self.records[slug].entry(graft) for slug, graft in self.grafts().items()]

    @property
    def load_with_esper_load_state_dict(self) -> Tensor:
        """The manifest as it stands in a state dict, under its key there.

        ``torch.distributed.checkpoint`` looks up each key of a state as an attribute.
        """
        return pack(self.manifest())

    def expects(self, x: Tensor, y: Tensor) -> bool:
        """True where the tensors have the axes and channels that all grafts were made for.

        The input of a graft that spans layers is another one; see :meth:`_input_of`.
        """
        for record in self.records.values():
            layer = record.layer
            axis, channels_in, channels_out = (
                layer.channel_axis,
                layer.features_in,
                layer.features_out,
            )
            if not layer.since and not _has_form(x, len(layer.in_shape), axis, channels_in):
                return False
            if not _has_form(y, len(layer.out_shape), axis, channels_out):
                return False
        return True

    def speed_up(self, slug: str, compiled: Compiled) -> None:
        """From the next call on, ``compiled`` computes the graft where the shapes match."""
        self._compiled[slug] = (self.grafts()[slug], compiled)

    def introduce(self) -> None:
        """Tells each graft about the others; called when the grafts have changed."""
        introduce(tuple(self.grafts().values()))

    @contextmanager
    def without(self, slug: str) -> Iterator[None]:
        """Inside the block, the graft is not in the layer's forward pass."""
        grafts, compiled = dict(self._modules), dict(self._compiled)
        del self._modules[slug]
        self._compiled.clear()
        self.introduce()
        try:
            yield
        finally:
            self._modules.clear()
            self._modules.update(grafts)
            self._compiled.update(compiled)
            self.introduce()

    def watch(self, watcher: Watcher) -> Callable[[], None]:
        """Calls ``watcher(x, y)`` on each call of the layer until the returned function runs."""
        key = self._next_watcher
        self._next_watcher += 1
        self._watchers[key] = watcher

        def end() -> None:
            self._watchers.pop(key, None)

        return end

    def look(self, x: Tensor, y: Tensor) -> None:
        """Shows a call of the layer to the watchers, nested tensors row by row."""
        if not self._watchers:
            return
        nested = x.is_nested and y.is_nested
        rows = [*zip(x.unbind(), y.unbind(), strict=True)] if nested else []
        for watcher in tuple(self._watchers.values()):
            for row, out in rows or [(x, y)]:
                watcher(row, out)

    def leave_out(self, error: Exception) -> None:
        """A graft cannot run on this input: the layer's own output is used. Logged once."""
        if not self.failure:
            names = ", ".join(self.records)
            logger.error("%s failed on an input, and is left out there", names, exc_info=error)
            self.failure = short(error)

    def run(self, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output after its grafts."""
        for slug, graft in self._modules.items():
            if isinstance(graft, Source):
                graft.carrier.keep(x)
                continue
            assert isinstance(graft, Graft)
            given = self._input_of(slug, x, y) if slug in self.carriers else x
            if given is None:
                continue
            if torch.compiler.is_compiling():
                # Its hooks are on the host since the insertion, and the graph takes in its code.
                y = graft(given, y)
                continue
            if self.attaches and torch.is_grad_enabled():
                graft.attach(host)
            y = self._run_graft(slug, graft, given, y)
        return y

    def _input_of(self, slug: str, x: Tensor, y: Tensor) -> Tensor | None:
        """What a graft that spans layers reads; None: it is left out of this call."""
        carrier, layer = self.carriers[slug], self.records[slug].layer
        given = carrier.take()
        if given is None:
            self._leave_out_span(slug, carrier.missed)
            return None
        fits = _has_form(given, len(layer.in_shape), layer.channel_axis, layer.features_in)
        # Other rows would be broadcast, or raise.
        rows = 1 if layer.channel_axis == 1 else -1
        if not fits or given.shape[:rows] != y.shape[:rows]:
            self._leave_out_span(slug, "its input and the output have other rows or channels")
            return None
        return given

    def _leave_out_span(self, slug: str, reason: str) -> None:
        if torch.compiler.is_compiling() or self.failure:
            return
        self.failure = f"{slug}: {reason}"
        since = self.records[slug].layer.since
        logger.error("%s, which reads the input of %s, is left out: %s", slug, since, reason)

    def _run_graft(self, slug: str, graft: Graft, x: Tensor, y: Tensor) -> Tensor:
        owner, compiled = self._compiled.get(slug, (None, None))
        if compiled is not None and owner is graft and compiled.fits(x, y):
            try:
                return compiled(graft, x, y)
            except Exception as error:  # the eager graft computes the same, so training continues
                if is_the_scripts(error):
                    raise
                logger.exception("compiled %s failed and is not used any more", slug)
                del self._compiled[slug]
        combined: Tensor = graft(x, y)
        return combined

    def __getstate__(self) -> dict[str, Any]:
        # Watchers belong to their caller, copies to their model, machine code and what trains the
        # graft to this process.
        gone: dict[str, Any] = {"_watchers": {}, "_copies": [], "_compiled": {}, "_leave": {}}
        return {**vars(self), **gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Slots saved by older versions have no such members.
        absent = {
            "_compiled": {},
            "_leave": {},
            "carriers": {},
            "load_handles": [],
            "failure": "",
            "attaches": True,
            "until_empty": False,
        }
        super().__setstate__({**absent, **state})  # type: ignore[no-untyped-call]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.grafts():
            destination[prefix + MANIFEST_KEY] = self.load_with_esper_load_state_dict

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # The grafts were brought in line with the state before; see esper.grafting.state_dicts.
        rest = {key: value for key, value in state_dict.items() if key != prefix + MANIFEST_KEY}
        super()._load_from_state_dict(rest, prefix, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        restore: Callable[[dict[str, Any]], None] = made.__setstate__
        restore(copy.deepcopy(self.__getstate__(), memo))
        self._copies.append(weakref.ref(made))
        return made


def run_slot(module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> Any:
    """The forward hook of every slot. None leaves the output as it is.

    torch leaves out the keyword arguments where another thread adds or removes the slot just now.

    torch.compile traces it into the graph: an empty slot leaves nothing there. Every call of every
    layer pays for it, so an idle slot costs a few lookups.
    """
    slot = module._modules.get(SLOT_NAME)
    if slot is None:
        return None
    kwargs, output = kwargs_and_output if len(kwargs_and_output) > 1 else ({}, *kwargs_and_output)
    if torch.compiler.is_compiling():
        # Watchers are not read here: each change of them would compile the graph again.
        return _run_traced(slot, module, args, kwargs, output) if slot._modules else None
    if not (slot._modules or slot.__dict__.get("_watchers")):
        return None
    return _run_occupied(slot, module, args, kwargs, output)


def _run_traced(
    slot: nn.Module,
    host: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    """As :func:`_run_occupied`, in words that torch.compile can trace."""
    x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
    if x is None or y is None or not isinstance(slot, Slot):
        return None
    if y.is_nested or not slot.expects(x, y):
        return _run_occupied(slot, host, args, kwargs, output)
    changed = slot.run(host, x, y)
    return None if changed is y else replace_first_tensor(output, changed)


# Where torch.compile leaves the hook to eager code, as it does beside an LSTM, it must not compile
# the hook alone: it rebuilds packed sequences wrongly. ``skip`` says that, and that the hook may
# not be traced into the code around it either, which is taken back.
skip(run_slot)._torchdynamo_disable = False  # type: ignore[attr-defined]


# Hidden, because an error while tracing would end the user's forward pass.
@torch.compiler.disable(reason=_OTHER_FORM)  # type: ignore[no-untyped-call, untyped-decorator]
def _run_occupied(
    slot: nn.Module,
    host: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> Any:
    x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
    if x is None or y is None or not isinstance(slot, Slot):
        return None
    apart(slot.look, x, y)
    if not slot._modules:
        return None
    try:
        changed = _run_rows(slot, host, x, y) if y.is_nested else slot.run(host, x, y)
        return None if changed is y else replace_first_tensor(output, changed)
    except torch.OutOfMemoryError:
        raise  # the user's code may catch it, and take a smaller batch
    except Exception as error:
        if type(error).__name__ == _RECOMPUTED_ENOUGH or is_the_scripts(error):
            raise
        # On several ranks the others would wait for the gradients of this graft.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            raise
        slot.leave_out(error)
        return None


def _run_rows(slot: Slot, host: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Row by row, for the nested tensors of ``nn.TransformerEncoder`` in eval mode."""
    if slot.carriers:
        raise TypeError("a graft that spans layers takes no nested tensors")
    rows = zip(x.unbind(), y.unbind(), strict=True)
    changed = [slot.run(host, row[None], out[None])[0] for row, out in rows]
    return torch.nested.as_nested_tensor(changed, layout=y.layout)


def first_tensor(value: Any) -> Tensor | None:
    """A tensor itself, or the first one of a tuple or list; the data of a packed sequence."""
    place = _first_place(value) if isinstance(value, tuple | list) else None
    found = value if place is None else value[place]
    found = found.data if isinstance(found, PackedSequence) else found
    return found if isinstance(found, Tensor) else None


def replace_first_tensor(output: Any, new: Tensor) -> Any:
    """``output`` with its first tensor replaced; tuples stay tuples, named ones named."""
    place = _first_place(output) if isinstance(output, tuple | list) else None
    if place is None:
        return new
    old = output[place]
    fresh = old._replace(data=new) if isinstance(old, PackedSequence) else new
    items = [*output[:place], fresh, *output[place + 1 :]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def _has_form(tensor: Tensor, axes: int, channel_axis: int, channels: int) -> bool:
    """True for so many axes and channels, 0 being unknown; the other sizes may differ."""
    if not axes:
        return True
    return tensor.dim() == axes and (not channels or tensor.shape[channel_axis] == channels)


def _first_place(values: tuple[Any, ...] | list[Any]) -> int | None:
    kinds = (Tensor, PackedSequence)
    return next((i for i, item in enumerate(values) if isinstance(item, kinds)), None)


def find_host(model: nn.Module, layer: str) -> nn.Module:
    """The module of that name.

    Raises:
        UnknownLayerError: the model has none.
    """
    try:
        return model.get_submodule(layer)
    except AttributeError as error:
        names = (name for name, _ in model.named_modules() if SLOT_NAME not in name.split("."))
        known = or_known(layer, names)
        raise UnknownLayerError(f"the model has no layer {layer!r}{known}", layer=layer) from error


def slot_of(module: nn.Module) -> Slot | None:
    """The slot of a layer, None where none was prepared."""
    if is_opaque(module):
        return None
    slot = module._modules.get(SLOT_NAME)
    return slot if isinstance(slot, Slot) else None


def is_opaque(module: nn.Module) -> bool:
    """A TorchScript module: it runs no hooks, and takes no child."""
    return isinstance(module, torch.jit.ScriptModule)


def find_slot(model: nn.Module, layer: str) -> Slot | None:
    """The slot of the layer of that name, None where there is no such layer or slot."""
    try:
        return slot_of(find_host(model, layer))
    except UnknownLayerError:
        return None


def left_out_grafts(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(layer, error) of every slot whose grafts were left out of a call because one failed."""
    return ((layer, slot.failure) for layer, _, slot in slots(model) if slot.failure)


def living_grafts(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """graft -> (layer, slug) of every graft in the model."""
    return {
        graft: (layer, slug)
        for layer, _, slot in slots(model)
        for slug, graft in slot.grafts().items()
    }


def graft_at(model: nn.Module, layer: str, slug: str) -> Graft | None:
    """The graft that the layer carries under this slug, None where it carries none."""
    slot = slot_of(find_host(model, layer))
    return None if slot is None else slot.grafts().get(slug)


def take_out(model: nn.Module, layer: str, slug: str) -> None:
    """Removes one graft from the layer's slot; nothing happens where it is not there."""
    slot = slot_of(find_host(model, layer))
    if slot is not None and slug in slot.grafts():
        slot.take_out(slug)
        settle_spans(model)


def settle_spans(model: nn.Module) -> None:
    """Makes sources and hooks those of the grafts that span layers; after each change of grafts."""
    spans = [*_spans(model)]
    wanted = {(span.since, span.source_name): span.carrier for span in spans}
    for layer, _, slot in slots(model):
        for name, module in [*slot._modules.items()]:
            if isinstance(module, Source) and wanted.get((layer, name)) is not module.carrier:
                del slot._modules[name]
    for (since, name), carrier in wanted.items():
        prepare_slots(model, [since], until_empty=True)
        start = find_slot(model, since)
        assert start is not None
        if name not in start._modules:
            start.add_module(name, Source(carrier))
    if lay_hooks(model, spans):
        forget_compiled_code()


def _spans(model: nn.Module) -> Iterator[Span]:
    for layer, _, slot in slots(model):
        for slug, carrier in slot.carriers.items():
            since = slot.records[slug].layer.since
            if slug in slot.grafts() and find_or_none(model, since) is not None:
                yield Span(since, layer, slug, carrier)


def find_or_none(model: nn.Module, layer: str) -> nn.Module | None:
    """The module of that name, None where the model has none."""
    try:
        return model.get_submodule(layer)
    except AttributeError:
        return None


def prepare_slots(
    model: nn.Module, layers: Iterable[str], *, until_empty: bool = False
) -> tuple[str, ...]:
    """Adds an empty slot to each layer that has none.

    A new slot makes torch compile all compiled code of this process again at its next run.

    Args:
        until_empty: a new slot serves one graft, and goes with the last graft in it. Otherwise all
            of them stay until :func:`remove_slots`.

    Returns:
        The layers with a new slot.

    Raises:
        UnknownLayerError: the model has no such layer.
        GraftError: the layer is a container, or has an own attribute ``esper``.
    """
    hosts = {
        layer: find_host(model, layer) for layer in layers
    }  # check all before the first change
    for layer, host in hosts.items():
        _check_host(layer, host)
    fresh = [layer for layer, host in hosts.items() if slot_of(host) is None]
    for layer in fresh:
        _add_slot(hosts[layer])
    for layer, host in hosts.items():
        slot = slot_of(host)
        if slot is not None and (layer in fresh or not until_empty):
            slot.until_empty = until_empty
    if fresh:
        forget_compiled_code()
    return tuple(fresh)


def remove_slots(model: nn.Module, layers: Iterable[str] | None = None) -> tuple[str, ...]:
    """Removes empty slots, all of them or those of ``layers``; a slot with grafts stays.

    Returns:
        The layers whose slot was removed.
    """
    wanted = None if layers is None else set(layers)
    removed = []
    for layer, host, slot in [*slots(model)]:
        if slot._modules or (wanted is not None and layer not in wanted):
            continue
        for handle in [slot.handle, *slot.load_handles]:
            if handle is not None:
                handle.remove()
        del host._modules[SLOT_NAME]
        _share_code_again(host)
        removed.append(layer)
    # Without a slot, too: the script may have put another layer in the place of one with a graft.
    if (removed or wanted is None) and not any(True for _ in slots(model)):
        _remove_load_hooks(model)
    return tuple(removed)


def slots_of_grafts(model: nn.Module) -> dict[str, Slot]:
    """Layer -> slot, of the slots that were made for a graft."""
    return {layer: slot for layer, _, slot in slots(model) if slot.until_empty}


def remove_unused_slots(model: nn.Module, made: Mapping[str, Slot]) -> tuple[str, ...]:
    """Removes those of ``made`` that hold no graft, and through which nothing is watched."""
    return remove_slots(model, [layer for layer, slot in made.items() if not slot.is_watched])


def follows_loads(hook: Any) -> bool:
    """A load hook of torch's that is the one of :mod:`esper.grafting.state_dicts`."""
    return hasattr(getattr(hook, "hook", None), LOAD_HOOK_MARK)


def _remove_load_hooks(model: nn.Module) -> None:
    hooks = model._load_state_dict_pre_hooks
    for number in [number for number, hook in hooks.items() if follows_loads(hook)]:
        del hooks[number]


def slots(model: nn.Module) -> Iterator[tuple[str, nn.Module, Slot]]:
    """(layer, host, slot) of every slot in the model."""
    for layer, host in model.named_modules():
        slot = slot_of(host)
        if slot is not None:
            yield layer, host, slot


def watch(model: nn.Module, layer: str, watcher: Watcher) -> Callable[[], None]:
    """Calls ``watcher(x, y)`` with the layer's input and its own output, before any graft.

    A layer without a slot has a plain hook for as long, which compiled code does not run.

    Returns:
        A function that ends the watch. The watcher is not copied, pickled or saved.
    """
    host = find_host(model, layer)
    slot = slot_of(host)
    if slot is not None:
        return slot.watch(watcher)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if x is not None and y is not None and not is_transformed(y):
            watcher(x, y)

    return register_alike("watch", host, PassingHook(read, takes=4)).remove


def is_transformed(tensor: Tensor) -> bool:
    """Inside ``torch.func``'s transforms, a result must not leave the transform."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def _check_host(layer: str, host: nn.Module) -> None:
    if is_opaque(host):
        raise GraftError(f"{layer!r} is compiled by TorchScript and runs no hooks", layer=layer)
    if isinstance(host, CONTAINERS):
        # They iterate over their children: a child named "esper" would be run as a layer.
        raise GraftError(f"{layer!r} is a container; it computes nothing itself", layer=layer)
    if slot_of(host) is None and _has_attribute(host):
        raise GraftError(f"{layer!r} has an attribute named {SLOT_NAME!r} already", layer=layer)


def _has_attribute(host: nn.Module) -> bool:
    """Not by ``hasattr``: some layers answer every attribute."""
    own = (vars(host), host._modules, host._parameters, host._buffers)
    return any(SLOT_NAME in names for names in own) or hasattr(type(host), SLOT_NAME)


def _add_slot(host: nn.Module) -> None:
    slot = Slot()
    slot.train(host.training)
    try:
        slot.handle = register_alike("slot", host, run_slot)
        host._modules[SLOT_NAME] = slot  # add_module refuses where every attribute is answered
        keep_code_apart(host)
    except BaseException:
        if slot.handle is not None:
            slot.handle.remove()
        raise


def keep_code_apart(host: nn.Module) -> None:
    """torch may not run code on this layer that it has compiled for a layer without a slot.

    It does not guard on absent hooks, so another model of the same class would share its code, and
    the grafts would be left out in silence. What it guards on is that a layer has no ``forward`` of
    its own. This one is that of the class, so layers with slots go on sharing their code.
    """
    forward = inspect.getattr_static(type(host), "forward", None)
    if isinstance(forward, types.FunctionType) and "forward" not in host.__dict__:
        host.__dict__["forward"] = types.MethodType(forward, host)


def _share_code_again(host: nn.Module) -> None:
    own = host.__dict__.get("forward")
    forward = inspect.getattr_static(type(host), "forward", None)
    if isinstance(own, types.MethodType) and own.__func__ is forward:
        del host.__dict__["forward"]
