"""A tiny training with a norm in it, and what its checkpoint holds besides the session."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import esper
from tests.esper.sdk.tiny_training import Training


class NormedTraining(Training):
    """Two equal layers, so that state in the wrong place would fit there too."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.model = nn.Sequential(
            nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 16),
            nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4),
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1.0 / (1.0 + 0.01 * step)
        )

    def attach(self, **options: Any) -> esper.Session:
        return esper.attach(self.model, self.optimizer, scheduler=self.scheduler, **options)

    def checkpoint(self, session: esper.Session) -> dict[str, Any]:
        return {
            "session": session.state_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rule": self.rule,
            "rng": torch.get_rng_state(),
        }

    def resume(self, saved: dict[str, Any], **options: Any) -> esper.Session:
        """Attached, and everything loaded as a training script would."""
        session = self.attach(**options)
        session.load_state_dict(saved["session"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scheduler.load_state_dict(saved["scheduler"])
        self.rule = saved["rule"]
        torch.set_rng_state(saved["rng"])
        return session
