"""A sample of a tensor stands for all of it."""

from __future__ import annotations

import pytest
import torch

from esper.health.optimizer_steps import spread_sample

SHAPES = [(512, 64), (512, 784), (10, 512), (64, 64, 3, 3), (4096, 4096), (1, 1), (7,), (3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("most", [64, 4096])
def test_it_takes_many_columns_and_many_rows(shape: tuple[int, ...], most: int) -> None:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    sample = spread_sample(numbers, most)
    columns = numbers[0].numel() if numbers.ndim > 1 else 1
    taken = len(sample)
    assert min(most, numbers.numel()) / 2 <= taken <= most
    assert len(set((sample % columns).tolist())) >= min(columns, taken) / 2
    assert len(set((sample // columns).tolist())) >= min(shape[0], taken) / 2
