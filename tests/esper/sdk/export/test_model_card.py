"""The model card says which grafts an exported model has, and what became of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import esper


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 2))


def card_of(model: nn.Module, folder: Path) -> list[str]:
    esper.export(model, folder)
    return (folder / "model_card.md").read_text(encoding="utf-8").splitlines()


def test_each_graft_has_its_row(model: nn.Module, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    sample = torch.randn(4, 8)
    for layer, slug, since in (
        ("4", "mlp_gelu_2048", ""),
        ("4", "mon_act_stats", ""),
        ("2", "widen_hidden", "0"),
    ):
        esper.graft(model, layer, slug, optimizer=optimizer, sample=sample, since=since)
    rows = [line for line in card_of(model, tmp_path) if "by hand" in line]
    assert len(rows) == 3
    for slug, place, became in (
        ("mlp_gelu_2048", "4", "a GraftedLayer"),
        ("mon_act_stats", "4", "nothing: it acts in training only"),
        ("widen_hidden", "0 … 2", "more hidden units"),
    ):
        (row,) = [row for row in rows if slug in row]
        assert f"| {place} |" in row
        assert f"| {became} |" in row


def test_a_merged_graft_is_said_to_be_merged(model: nn.Module, tmp_path: Path) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    esper.graft(model, "0", "proj_lora_64", optimizer=optimizer, sample=torch.randn(4, 8))
    (row,) = [line for line in card_of(model, tmp_path) if "proj_lora_64" in line]
    assert "merged into the layer's weights" in row


def test_a_model_without_grafts_has_no_card(model: nn.Module, tmp_path: Path) -> None:
    esper.export(model, tmp_path)
    assert not (tmp_path / "model_card.md").exists()
