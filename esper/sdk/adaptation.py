"""A graft from its operation to its end, as one process sees it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from esper.blueprints import Blueprint, Graft
from esper.contracts import (
    AdaptationState,
    LayerInfo,
    Reward,
    RunningTest,
    SafetyPolicy,
    Verdict,
)
from esper.grafting import Receipt, SnapshotMemory
from esper.reward import Look
from esper.sdk.saving import losses_from_state, losses_to_state


@dataclass(frozen=True, slots=True)
class Operation:
    """What is to be grafted; ``graft`` and ``memory`` may have been made in another thread."""

    layer: LayerInfo
    blueprint: Blueprint
    config: dict[str, Any]
    seed: int
    uid: str
    graft: Graft | None = None
    memory: SnapshotMemory | None = None


@dataclass(slots=True, eq=False)
class Adaptation:
    """One graft in this process, from the moment it is in the model.

    Attributes:
        uid: the server's id, or ``local-<n>``.
        state: ``probation``, ``kept``, ``rolled_back`` or ``reverted``.
        grafted_at: seconds since the epoch.
        looks: the held-out loss with the graft and without it, oldest first.
        look_seconds: what these evaluations took.
        look_every: of the looks that the policy asks for, every so many-th is taken.
        test: where its test stands; None before the first judgement, and with a server.
        guarded_until: the last step at which the trainer's own guard may take it out.
        loss_before: (step, loss) of the run before the graft, for the verdict.
        merged: the graft was folded into its host's weights; it is in effect, in no slot.
        left_by_load: the script loaded a state without the graft, which took it out.
        since: the earlier layer whose input it reads; empty for a graft beside one layer.
    """

    uid: str
    layer: str
    blueprint: str
    step: int
    state: AdaptationState
    config: dict[str, Any] = field(default_factory=dict)
    receipt: Receipt | None = None
    looks: list[Look] = field(default_factory=list)
    look_seconds: float = 0.0
    look_every: int = 1
    test: RunningTest | None = None
    guarded_until: int = -1
    grafted_at: float = 0.0
    verdict: Verdict | None = None
    reward: Reward | None = None
    loss_before: tuple[tuple[int, float], ...] = ()
    merged: bool = False
    left_by_load: bool = False
    since: str = ""

    def __str__(self) -> str:
        until = f" until step {self.guarded_until} at most" if self.on_probation else ""
        if self.on_probation and self.test is not None:
            until = f", {self.test}"
        why = f": {self.verdict.reason}" if self.verdict is not None else ""
        merged = ", merged into its host" if self.merged else ""
        state = self.state.replace("_", " ")
        where = f"{self.layer!r}" if not self.since else f"{self.since!r} … {self.layer!r}"
        return f"{self.blueprint} in {where}, step {self.step}: {state}{until}{merged}{why}"

    def __repr__(self) -> str:
        return f"<Adaptation {self}>"

    @property
    def ablation_gain(self) -> float:
        """The held-out loss without the graft minus with it, at the last look; NaN unknown."""
        return self.looks[-1].gain if self.looks else math.nan

    @property
    def grafted(self) -> bool:
        """Its graft is in the model."""
        return self.state in (AdaptationState.PROBATION, AdaptationState.KEPT)

    @property
    def on_probation(self) -> bool:
        """Its graft is in the model, and may be taken out again."""
        return self.state is AdaptationState.PROBATION

    @property
    def in_effect(self) -> bool:
        """What it was grafted for still acts: in its slot, or in the host's weights."""
        return self.merged or (self.receipt is not None and self.receipt.present)

    @property
    def restorable(self) -> bool:
        """The model as it was before the graft can be brought back."""
        return self.receipt is not None and self.receipt.can_undo_hard

    @property
    def local(self) -> bool:
        """No server knows of it."""
        return self.uid.startswith("local-")

    def later_looks(self, policy: SafetyPolicy) -> list[Look]:
        """Those behind the end of its test."""
        return [look for look in self.looks if look.step > self.step + policy.probation_steps]

    def to_state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "adaptation": self.uid,
            "layer": self.layer,
            "since": self.since,
            "blueprint": self.blueprint,
            "config": self.config,
            "step": self.step,
            "state": str(self.state),
            "guarded_until": self.guarded_until,
            "looks": [[look.step, look.gain, look.loss] for look in self.looks],
            "look_seconds": self.look_seconds,
            "look_every": self.look_every,
            # Not the moment: the time between two processes is no part of a probation.
            "age_seconds": time.time() - self.grafted_at,
            "loss_before": losses_to_state(self.loss_before),
            "merged": self.merged,
            "reward": dict(self.reward.terms) if self.reward is not None else None,
        }

    @classmethod
    def from_state(cls, saved: dict[str, Any], receipt: Receipt | None) -> Adaptation:
        """``receipt`` is that of the rebuilt graft; None for one that was merged."""
        terms = saved.get("reward")  # earlier states have none
        return cls(
            uid=str(saved["adaptation"]),
            layer=str(saved["layer"]),
            since=str(saved.get("since", "")),
            blueprint=str(saved["blueprint"]),
            config=dict(saved["config"]),
            step=int(saved["step"]),
            state=AdaptationState(saved["state"]),
            guarded_until=int(saved["guarded_until"]),
            looks=[Look(int(at), float(gain), float(loss)) for at, gain, loss in saved["looks"]],
            look_seconds=float(saved["look_seconds"]),
            look_every=int(saved.get("look_every", 1)),  # absent from older states
            receipt=receipt,
            grafted_at=time.time() - float(saved["age_seconds"]),
            loss_before=tuple(losses_from_state(saved["loss_before"])),
            merged=bool(saved["merged"]),
            reward=Reward({str(name): float(term) for name, term in terms.items()})
            if terms is not None
            else None,
        )
