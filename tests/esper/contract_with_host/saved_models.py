"""Models that are saved and loaded across a graft, and the ways to keep a state between."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import esper
from esper import Session
from esper.grafting import Receipt
from esper.grafting.slot import slots

State = dict[str, Any]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 11)

    def forward(self, x: Tensor) -> Tensor:
        steps, _ = self.lstm(self.embed(x))
        y: Tensor = self.out(self.norm(steps))
        return y


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 8))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )


def gpt2() -> nn.Module:
    """Its head and its embedding are one tensor, and its projections are transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 11, "n_positions": 16}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "lstm": Recurrent,
    "gpt2": gpt2,
}
# Beside its layer, scaling it, in place of it, and without any tensor that is trained.
GRAFTS = {
    "mlp": [
        ("0", "mlp_gelu_2048"),
        ("3", "proj_lora_64"),
        ("1", "ln_rms"),
        ("0", "clamp_grad_norm"),
    ],
    "convolutions": [("3", "proj_lora_64"), ("1", "proj_ia3"), ("5", "mlp_swiglu_4096")],
    "lstm": [("lstm", "expert_mlp_1d"), ("norm", "ln_rms"), ("embed", "mon_act_stats")],
    "gpt2": [
        ("transformer.h.0.mlp.c_fc", "mlp_gelu_2048"),
        ("lm_head", "proj_lora_64"),
        ("transformer.h.1.attn.c_attn", "proj_ia3"),
    ],
}
# A graft that spans layers.
SPANS = {("mlp", "3", "mlp_gelu_2048"): {"since": "0", "hidden": 6}}
KINDS = [(kind, layer, slug) for kind, grafts in GRAFTS.items() for layer, slug in grafts]
KINDS += SPANS


def batch_of(kind: str, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind in ("gpt2", "lstm"):
        return torch.randint(11, (4, 6), generator=generator)
    shape = (4, 16) if kind == "mlp" else (4, 3, 4, 4)
    return torch.randn(shape, generator=generator)


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    logits: Tensor = y if isinstance(y, Tensor) else y.logits
    return logits


def computed(model: nn.Module, kind: str) -> Tensor:
    """What the model computes in eval mode."""
    was = model.training
    model.eval()
    with torch.no_grad():
        y = logits_of(model, batch_of(kind, 99))
    model.train(was)
    return y


class Run:
    """One model in training, watched by a session."""

    def __init__(self, kind: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.kind, self.steps = kind, 0
        self.model = MODELS[kind]().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.session: Session = esper.attach(self.model, self.optimizer, **options)
        self.train(2)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.steps += 1
            y = logits_of(self.model, batch_of(self.kind, self.steps))
            rows = y.reshape(-1, y.shape[-1])
            loss = F.cross_entropy(rows, torch.arange(len(rows)) % y.shape[-1])
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.session.step(loss)

    def graft(self, layer: str, slug: str, **config: Any) -> Receipt:
        """Trained a little, and not at its first output any more."""
        span = SPANS.get((self.kind, layer, slug), {})
        receipt = self.session.graft(layer, slug, **{**span, **config})
        self.train(3)
        if receipt.graft.alpha is not None:
            receipt.graft.alpha.fill_(0.5)
        return receipt

    @property
    def grafts(self) -> list[tuple[str, str]]:
        return [(layer, slug) for layer, _, slot in slots(self.model) for slug in slot.grafts()]


def fresh(kind: str) -> nn.Module:
    torch.manual_seed(7)
    return MODELS[kind]().train()


def deepcopied(state: State, folder: Path) -> State:
    return copy.deepcopy(state)


def cloned(state: State, folder: Path) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def in_a_file(state: State, folder: Path) -> State:
    kept = io.BytesIO()
    torch.save(state, kept)
    kept.seek(0)
    loaded: State = torch.load(kept, weights_only=True)
    return loaded


def safe_tensors(state: State, folder: Path) -> State:
    """As transformers and PEFT write it."""
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "state")
    loaded: State = load_file(folder / "state")
    return loaded


KEEPING = {keep.__name__: keep for keep in (deepcopied, cloned, in_a_file, safe_tensors)}
