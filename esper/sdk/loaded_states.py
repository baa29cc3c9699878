"""A script loads a plain state into a model that a session watches: the grafts follow the state.

An early stopping that goes back to the best epoch calls ``model.load_state_dict(best)``, and
frameworks do the same. The grafts that the state lacks are taken out, and those that it has are
built again, so the model computes what it computed when the state was saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.exceptions import ConfigurationError, EsperError
from esper.grafting import state_dicts
from esper.grafting.slot import PassingHook
from esper.sdk.surgery import Surgery


class LoadedStates:
    """Watches ``model.load_state_dict`` until it is closed; torch's hooks, which copies lose."""

    def __init__(self, model: nn.Module, surgery: Surgery) -> None:
        self._model = model
        self._surgery = surgery
        before: Callable[..., RemovableHandle] = model.register_load_state_dict_pre_hook
        after: Callable[..., RemovableHandle] = model.register_load_state_dict_post_hook
        self._handles = [before(PassingHook(self._before)), after(PassingHook(self._after))]

    def close(self) -> None:
        """The grafts that are in the model stay bound to the states that it loads."""
        for handle in self._handles:
            handle.remove()
        state_dicts.follow_whole_states(self._model)

    def _before(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Raises before anything is loaded, for a state whose grafts cannot be built here."""
        if module is not self._model:
            return
        try:
            difference = state_dicts.compare(module, state, prefix)
            state_dicts.check_known(difference)
            if difference.leaving or difference.coming:
                self._surgery.follow_state(difference)
        except EsperError:
            raise
        except Exception as error:
            raise ConfigurationError(state_dicts.problem(error)) from error

    def _after(self, module: nn.Module, keys: Any) -> None:
        self._surgery.remove_idle_slots()
        state_dicts.follow_whole_states(module)
