"""How much a layer's newest measurements differ from its own past, and from what its peers do.

Shape legend: F frames, L layers, M measured signals.

    own    distance of the newest value to the median of the layer's last frames; norms and ratios
           as logarithms
    peer   own distance minus the median own distance of all layers: what this layer does alone
    spread the layer's usual distance (median absolute deviation), at least that of most layers
    z      the larger one of |peer| and half of |own|, over the spread. A learning rate moves
           the updates of all layers on purpose, so the update ratio counts as peer only.
    score  1 up to z = 3, then a straight line to 0 at z = 12, for the worst signal

Half of the own distance counts, because all layers move together when the data or the schedule
change. A jump of the whole run by a factor of 1,000 is seen nevertheless.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from esper.contracts import SIGNAL_INDEX, Signal
from esper.health.score import median_of_known

Floats = NDArray[np.float32]

PAST_FRAMES = 24
FEWEST_FRAMES = 8  # known values of a signal, below which nothing is usual yet
FEWEST_PEERS = 3
USUAL, FAR = 3.0, 12.0  # z
# Least spread of a signal: a tenth of a decade, or of a share.
LEAST_SPREAD = 0.1
_LOGARITHMIC = (Signal.GRAD_NORM, Signal.ACT_STD, Signal.UPDATE_RATIO)
_SHARES = (Signal.INACTIVE_FRACTION,)
_COLUMNS = [SIGNAL_INDEX[signal] for signal in (*_LOGARITHMIC, *_SHARES)]
_PEER_ONLY = _LOGARITHMIC.index(Signal.UPDATE_RATIO)


class Deviation:
    """Scores the frames of one run, oldest first."""

    def __init__(self) -> None:
        self._past: deque[Floats] = deque(maxlen=PAST_FRAMES)

    @np.errstate(all="ignore")  # NaN is valid data here
    def score(self, values: Floats) -> Floats:
        """The next frame.

        Args:
            values: float32 [L, signals]; NaN unknown.

        Returns:
            float32 [L], 1 as usual … 0 far from it; 1 where too little is known.
        """
        newest_LM = _comparable(values)
        if self._past and self._past[-1].shape != newest_LM.shape:
            self._past.clear()
        z_LM = self._distances(newest_LM)
        self._past.append(newest_LM)
        worst_L = np.where(np.isnan(z_LM), 0.0, z_LM).max(axis=1, initial=0.0)
        score_L: Floats = np.clip((FAR - worst_L) / (FAR - USUAL), 0.0, 1.0).astype(np.float32)
        return score_L

    def _distances(self, newest_LM: Floats) -> Floats:
        if len(self._past) < FEWEST_FRAMES or not newest_LM.size:
            return np.full_like(newest_LM, np.nan)
        past_FLM = np.stack(self._past)
        middle_LM = median_of_known(past_FLM)
        spread_LM = np.maximum(1.4826 * median_of_known(np.abs(past_FLM - middle_LM)), LEAST_SPREAD)
        spread_LM = np.fmax(spread_LM, median_of_known(spread_LM))
        own_LM = newest_LM - middle_LM
        own_LM[np.isfinite(past_FLM).sum(axis=0) < FEWEST_FRAMES] = np.nan
        has_peers_M = np.isfinite(own_LM).sum(axis=0) >= FEWEST_PEERS
        peer_LM = np.where(has_peers_M, own_LM - median_of_known(own_LM), 0.0)
        own_LM[:, _PEER_ONLY] = 0.0
        z_LM: Floats = np.maximum(np.abs(peer_LM), 0.5 * np.abs(own_LM)) / spread_LM
        return z_LM


def _comparable(values: Floats) -> Floats:
    """float32 [L, M]: logarithms of norms and ratios, shares as they are; NaN where not finite."""
    found: Floats = values[:, _COLUMNS].astype(np.float32)
    logarithmic = found[:, : len(_LOGARITHMIC)]
    np.log10(logarithmic, out=logarithmic)
    found[~np.isfinite(found)] = np.nan
    return found
