"""A script loads a plain state into a model that a session watches: the grafts follow the state.

An early stopping that goes back to the best epoch calls ``model.load_state_dict(best)``, and
frameworks do the same. The grafts that the state lacks are taken out, and those that it has are
built again, so the model computes what it computed when the state was saved.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from esper.grafting import state_dicts
from esper.sdk.surgery import Surgery


class LoadedStates:
    """Watches ``model.load_state_dict`` until it is closed."""

    def __init__(self, model: nn.Module, surgery: Surgery) -> None:
        self._model = model
        self._surgery = surgery
        self._hooks = state_dicts.LoadHooks(
            model, self._before, self._after, copied=surgery.copies.copied
        )

    def close(self) -> None:
        """The grafts that are in the model stay bound to the states that it loads."""
        self._hooks.close()
        state_dicts.follow_whole_states(self._model)

    def _before(self, state: dict[str, Any], prefix: str) -> None:
        difference = state_dicts.compare(self._model, state, prefix)
        state_dicts.check_known(difference)
        if difference.leaving or difference.coming:
            self._surgery.loads.follow_state(difference)

    def _after(self) -> None:
        self._surgery.idle_slots.remove()
        state_dicts.follow_whole_states(self._model)
