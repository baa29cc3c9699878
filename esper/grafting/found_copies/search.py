"""Running averages of a model that nobody named: they get its grafts too.

An average pairs its tensors with the model's by position, so the first update after a graft would
raise in the script, or average different tensors. An average is found in two ways: torch's
``AveragedModel`` and other modules of the model's class once, by the garbage collector, and copies
that are made later, because ``copy.deepcopy`` copies the model's hooks.

Not every copy is an average. A copy that was never written to since it was made, such as the best
model so far or a frozen teacher, and one that an optimizer trains stay as they are. So does a model
that was made apart, as a later member of an ensemble. Where another model of the same shapes is
trained, as one of two critics, an average belongs to the nearer one.

What stays as it is, such as a target network or another member of a population, may load a state of
the model later: it then gets the grafts of that state, as its load would raise in the script
otherwise. Where the script trains it, the grafts stay as they were loaded.
"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.by_identity import WeaklyByIdentity
from esper.exceptions import ConfigurationError
from esper.fail_closed import contained
from esper.grafting.changes.loading import build_grafts_of_loaded_states
from esper.grafting.copies import bare_copy, check_copy
from esper.grafting.found_copies.kept_by_hand import FIRST, KeptByHand
from esper.grafting.found_copies.named_by_script import NamedByScript
from esper.grafting.found_copies.parts import CopiedParts
from esper.grafting.found_copies.script_objects import script_objects
from esper.grafting.slot import slots
from esper.grafting.state_dicts import LoadHooks, is_followed
from esper.grafting.tensors.forms import shape_of
from esper.grafting.tensors.versions import writes_to

SEARCH_SHARE = 1 / 200  # of the process's time since its first search
MARKED = 4  # matrices of a copy of which some numbers are kept
PARTS = {"_parameters", "_buffers", "_modules"}
REFERENCE = (
    "a copy of the model gets gradients, and no optimizer trains it: the script may pair its "
    "tensors with the model's, as SVRG does, which a graft would shift. Call requires_grad_(False) "
    "on a copy that is only read, or graft by session.graft"
)


class SearchTime:
    """What the searches of all sessions of this process may take.

    A search takes tenths of a second, as long as a short session trains: a script that attaches in
    each of many short sessions would spend most of its time on them.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._spent = 0.0

    @property
    def is_left(self) -> bool:
        """The first search may come at once; a later one once it is a small part of the time."""
        return self._spent <= SEARCH_SHARE * (time.perf_counter() - self._since)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """A search takes place inside."""
        began = time.perf_counter()
        self._since = self._since or began
        try:
            yield
        finally:
            self._spent += time.perf_counter() - began


search_time = SearchTime()


class Copies(Sequence[Any]):
    """The copies of a model that follow its grafts.

    Args:
        model: as it trains.
        given: averages that the script named; they are never dropped.

    Attributes:
        by_hand: averages that are no modules.
        named: what else the script looks up by the parameters' names.
        parts: copies of parts of the model.
    """

    def __init__(self, model: nn.Module, given: Sequence[Any] = ()) -> None:
        self._model = weakref.ref(model)
        self._given = tuple(given)
        self._followers: list[weakref.ref[nn.Module]] = []
        # By identity, as a class of the script may compare as it likes.
        self._own: MutableMapping[nn.Module, None] = WeaklyByIdentity()
        # copy -> it is inside an AveragedModel
        self._seen: MutableMapping[nn.Module, bool] = WeaklyByIdentity()
        self._marks: MutableMapping[nn.Module, list[Tensor]] = WeaklyByIdentity()
        self._loading: list[LoadHooks] = []
        self._wanted = False
        self._searched = False
        self._looks = 0  # at the script's variables, one after each of the next steps
        self.by_hand = KeptByHand()
        self.named = NamedByScript()
        self.parts = CopiedParts(model)

    def __len__(self) -> int:
        return len(self._all())

    def __getitem__(self, place: Any) -> Any:
        return self._all()[place]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def _all(self) -> tuple[Any, ...]:
        living = [found for ref in self._followers if (found := ref()) is not None]
        return (*self._given, *living)

    def open(self) -> None:
        """The layers are known: what the script makes anew is another one in the second look."""
        self._looks = 2

    def begin(self) -> None:
        """The training begins. What :meth:`search_in_time` finds need not be found by a graft."""
        self._wanted = True
        self.parts.begin()

    def search_in_time(self) -> None:
        """After each step: the search, once its time is a small part of the process's."""
        if self._wanted and not self._searched and search_time.is_left:
            self.search()
            self._looks = max(self._looks, 1)

    def search(self) -> None:
        """Finds the copies that exist. Looks at every object of the process, so it does so once."""
        model = self._model()
        if self._searched or model is None:
            return
        with search_time.taken():
            self._search(model)
        self._searched = True

    def search_for_graft(self) -> bool:
        """A graft that is no line of the script comes soon: finds what the script made since.

        As EWC does, which keeps its anchors once the first task is learned.

        Returns:
            Whether the graft should wait for the next step, as it is not known what of it stays.
        """
        model = self._model()
        if (
            self._searched
            and not self.by_hand.awaited
            and search_time.is_left
            and model is not None
        ):
            with search_time.taken():
                self.by_hand.let_go()
                _, tensors, _ = _living(model, ())
                self.by_hand.search(model, tensors)
        self.search()
        began, self.by_hand.awaited = not self.by_hand.awaited, True
        return began and self.look_at_script()

    @contained("look at the variables of the script", "What it looks up by name is not known.")
    def look_at_script(self) -> bool:
        """Remembers what the script looks up by name; True: there is something new.

        Of a copy, some numbers are remembered: torch counts no writes through ``.data``.
        """
        model = self._model()
        if model is None:
            return False
        found = list(script_objects())
        self._mark(other for other in found if type(other) is type(model) and other is not model)
        return self.named.note(model, found)

    def look(self) -> None:
        """After each step: what the script has made, or has dropped."""
        self.by_hand.look()
        self.named.let_go()
        if self._looks:
            self._looks -= 1
            self.look_at_script()
        self._mark(self._own)

    def _mark(self, copies: Iterable[nn.Module]) -> None:
        for copied in copies:
            if copied not in self._marks:
                self._marks[copied] = _some_numbers(copied)

    def _was_written(self, found: nn.Module) -> bool:
        if _was_written(found):
            return True
        marks, numbers = self._marks.get(found, []), _some_numbers(found)
        return any(
            a.shape != b.shape or not torch.equal(a, b.to(a.device))
            for a, b in zip(marks, numbers, strict=False)
        )

    def _search(self, model: nn.Module) -> None:
        found, tensors, modules = _living(model, self.parts.kinds())
        self.by_hand.search(model, tensors)
        self.parts.search(modules)
        others = [other for other, averaged in found if not averaged]
        may_follow = any(
            self._was_written(other) and not _is_trained(other)
            for other in others
            if _alike(model, other)
        )
        if may_follow or self.by_hand.found:
            # It may be of an earlier run that nothing uses any more, which is in nobody's way.
            # Collecting takes as long as many steps, so it is not done where there is none; the
            # model of an earlier run, which was trained, follows nobody.
            del found, others, tensors, modules
            self.by_hand = KeptByHand()
            gc.collect()
            found, tensors, modules = _living(model, self.parts.kinds())
            self.by_hand.search(model, tensors)
            self.parts.search(modules)
        for other, averaged in found:
            self._note(other, averaged=averaged)

    def copied(self, memo: dict[int, Any]) -> None:
        """``copy.deepcopy`` copies the model now; ``memo`` is its own."""
        found = memo.get(id(self._model()))
        if isinstance(found, nn.Module):
            self._own[found] = None
            self._note(found, averaged=_inside_averaged_model())

    def settle(self) -> tuple[nn.Module, ...]:
        """Decides, before a graft, which copies follow from now on; returns the new ones."""
        model = self._model()
        if model is None:
            return ()
        alike = {found: average for found, average in self._seen.items() if _alike(model, found)}
        rivals = [found for found, average in alike.items() if not average and _is_trained(found)]
        fresh = tuple(
            found
            for found, averaged in alike.items()
            if not any(found is rival for rival in rivals)
            and (averaged or self._was_written(found))
            and (averaged or found in self._own or _is_near(found, model))
            and (found in self._own or _is_nearest(found, model, rivals))
        )
        self._follow(fresh)
        for found in alike:
            if found in self._seen and not is_followed(found):
                self._loading.append(build_grafts_of_loaded_states(found))
        return fresh

    def settle_averaged(self) -> None:
        """Without a run: what an ``AveragedModel`` holds follows.

        Another copy may be a model that is grafted by itself, to compare the two.
        """
        model = self._model()
        if model is not None:
            averaged = [found for found, is_averaged in self._seen.items() if is_averaged]
            self._follow([found for found in averaged if _alike(model, found)])

    def _follow(self, fresh: Iterable[nn.Module]) -> None:
        for found in fresh:
            self._followers.append(weakref.ref(found))
            del self._seen[found]

    def close(self) -> None:
        """Takes the hooks off the models that may load a graft, unless there is still one."""
        model = self._model()
        if model is None or not any(slot.grafts() for _, _, slot in slots(model)):
            for hooks in self._loading:
                hooks.close()
            self._loading = []

    def reason_for_policy(self) -> str:
        """Why nobody but the script itself may graft now; empty: no copy is a reference."""
        model = self._model()
        if model is None:
            return ""
        alike = (found for found in self._seen if _has_gradients(found) and _alike(model, found))
        # What was made otherwise and written to is another model, which trains by itself.
        kept = (found for found in alike if found in self._own or not self._was_written(found))
        return REFERENCE if any(not _has_state(found) for found in kept) else ""

    def _note(self, found: nn.Module, *, averaged: bool) -> None:
        model = self._model()
        known = {id(bare_copy(copied)) for copied in self._all()} | {id(model)}
        if id(found) not in known:
            self._seen[found] = averaged or self._seen.get(found, False)


def _living(
    model: nn.Module, kinds: Sequence[type[nn.Module]]
) -> tuple[list[tuple[nn.Module, bool]], list[Tensor], list[nn.Module]]:
    """Every other model of this class and whether an ``AveragedModel`` holds it; all tensors; and
    all modules of this class or of one of the ``kinds``.

    Not those that another thread just builds or copies, or that the collector has emptied.
    """
    averaged_model = sys.modules["torch.optim.swa_utils"].AveragedModel
    found: list[tuple[nn.Module, bool]] = []
    tensors: list[Tensor] = []
    modules: list[nn.Module] = []
    wanted = {type(model), *kinds}
    for other in gc.get_referrers(averaged_model, Tensor, *wanted):
        kind = type(other)
        if kind is Tensor:
            tensors.append(other)
        elif (kind in wanted or kind is averaged_model) and _is_built(other):
            if kind in wanted:
                modules.append(other)
            if kind is averaged_model:
                found.append((bare_copy(other), True))
            elif kind is type(model) and other is not model:
                found.append((other, False))
    return found, tensors, modules


def _is_built(found: nn.Module) -> bool:
    """It and all that is inside have their parts: each can be walked through."""
    try:
        return all(vars(part).keys() >= PARTS for part in found.modules())
    except (AttributeError, RuntimeError):  # without parts, or they change in this moment
        return False


def _inside_averaged_model() -> bool:
    """``AveragedModel.__init__`` is what copies."""
    wanted = sys.modules["torch.optim.swa_utils"].AveragedModel.__init__.__code__
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is wanted:
            return True
        frame = frame.f_back
    return False


def _alike(model: nn.Module, found: nn.Module) -> bool:
    """It has the model's tensors by name and shape, and none of them is the model's own."""
    if found._modules.keys() != model._modules.keys():  # at once, for most
        return False
    own = {id(parameter) for parameter in model.parameters()}
    if not own or any(id(parameter) in own for parameter in found.parameters()):
        return False
    try:
        check_copy(model, found)
    except ConfigurationError:
        return False
    return True


def _was_written(found: nn.Module) -> bool:
    return any(writes_to(parameter) for parameter in found.parameters())


def _some_numbers(found: nn.Module) -> list[Tensor]:
    """Of the first matrices, on their device, so that nothing waits for it."""
    matrices = [
        p
        for p in found.parameters()
        if len(shape_of(p) or ()) > 1 and p.layout is torch.strided
        # Neither spread over ranks, nor quantised, nor without numbers.
        if type(p.detach()) is Tensor and not p.is_meta
    ]
    kept = matrices[:MARKED]
    return [p.detach()[(0,) * (p.ndim - 1)][:FIRST].clone() for p in kept if p.numel()]


def _is_trained(found: nn.Module) -> bool:
    """It has gradients, or an optimizer holds state of it."""
    return _has_gradients(found) or (_was_written(found) and _has_state(found))


def _has_gradients(found: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in found.parameters())


def _has_state(found: nn.Module) -> bool:
    """An optimizer holds state of it."""
    return _is_a_key(next(found.parameters()))


def _is_a_key(parameter: Tensor) -> bool:
    """Of a dictionary, such as the state of an optimizer; an average needs none."""
    return any(
        isinstance(holder, dict) and any(key is parameter for key in holder)
        for holder in gc.get_referrers(parameter)
    )


@torch.no_grad()
def _is_near(found: nn.Module, model: nn.Module) -> bool:
    """Nearer to the model than zeros are, as two models that were made apart are not.

    Vectors do not count: the gains of norms begin alike in every model.
    """
    apart = of_found = of_model = 0.0
    for one, other in zip(found.parameters(), model.parameters(), strict=True):
        if len(shape_of(one) or ()) > 1:
            ours = other.float().to(one.device)
            apart += float((one.float() - ours).square().sum())
            of_found += float(one.float().square().sum())
            of_model += float(ours.square().sum())
    return not apart or apart < max(of_found, of_model)


def _is_nearest(found: nn.Module, model: nn.Module, rivals: Sequence[nn.Module]) -> bool:
    """No rival is nearer; one with the same numbers, of an equal run before, is no reason."""
    return all(_distance(found, model) <= _distance(found, rival) for rival in rivals)


@torch.no_grad()
def _distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    known = [(a, b) for a, b in pairs if shape_of(a) is not None]  # else not initialized yet
    return sum(float((a.float() - b.float().to(a.device)).square().sum()) for a, b in known)
