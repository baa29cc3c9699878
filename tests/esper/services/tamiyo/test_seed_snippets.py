"""The document that the project began with promises code; here it is run as printed."""

from __future__ import annotations

import asyncio
import re
import textwrap
from typing import Any

import pytest
import torch
from torch import nn

from esper import blueprints
from esper.contracts import AdaptationType
from esper.services.tamiyo import (
    AdaptationDecision,
    EnhancedTamiyoService,
    ModelState,
    Phase2IntegrationOrchestrator,
)
from tests.esper.services.tamiyo.conftest import seed_document

SNIPPETS = re.findall(r"```python\n(.*?)```", seed_document(), re.DOTALL)


def snippet_with(text: str) -> str:
    (found,) = [snippet for snippet in SNIPPETS if text in snippet]
    return str(found)


async def run_as_printed(snippet: str, names: dict[str, Any]) -> dict[str, Any]:
    """Runs a snippet inside an ``async def``, since it awaits; gives its names back."""
    body = textwrap.indent(snippet, "    ") + "\n    return dict(locals())\n"
    exec(compile(f"async def snippet():\n{body}", "seed document", "exec"), names)
    found: dict[str, Any] = await names["snippet"]()
    return found


class Transformer(nn.Module):
    """A layer with the name that the snippet uses, on [batch, time, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_layer_4 = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.transformer_layer_4(x)
        return y


@pytest.fixture
def current_state() -> ModelState:
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters())
    return ModelState(model=model, optimizer=optimizer, sample=torch.randn(2, 6, 32))


async def test_the_pipeline_snippet_grafts_attention_and_changes_nothing_at_birth(
    current_state: ModelState,
) -> None:
    assert current_state.model is not None
    before = current_state.model(current_state.sample)
    orchestrator = Phase2IntegrationOrchestrator()

    names = await run_as_printed(
        snippet_with("execute_adaptation_pipeline"),
        {
            "AdaptationDecision": AdaptationDecision,
            "orchestrator": orchestrator,
            "current_state": current_state,
        },
    )

    assert names["success"], names["details"]
    chosen = blueprints.get_blueprint(names["details"]["blueprint"])
    assert chosen.adaptation_type is AdaptationType.ADD_ATTENTION
    assert names["details"]["certificate"]["max_abs_diff"] == 0.0
    assert torch.equal(current_state.model(current_state.sample), before)
    assert len(list(current_state.model.parameters())) > 2


async def test_the_service_snippet_starts_and_prints_its_status(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with asyncio.timeout(300):
        names = await run_as_printed(snippet_with("EnhancedTamiyoService"), {})
        service = names["service"]
        await service.stop()

    assert isinstance(service, EnhancedTamiyoService)
    printed = capsys.readouterr().out
    assert f"Blueprints loaded: {names['status']['blueprints_loaded']}" in printed
    assert "Active adaptations: 0" in printed
    assert names["status"]["blueprints_loaded"] >= 6


async def test_the_status_snippet_has_the_keys_that_it_shows(current_state: ModelState) -> None:
    snippet = snippet_with("get_integration_status")
    call, _, shown = snippet.partition("# Returns:")
    orchestrator = Phase2IntegrationOrchestrator()
    await orchestrator.execute_adaptation_pipeline(
        decision=AdaptationDecision("transformer_layer_4", AdaptationType.ADD_ATTENTION, 0.85),
        model_state=current_state,
    )

    names = await run_as_printed(call, {"orchestrator": orchestrator})

    assert set(names["status"]) == set(re.findall(r'"(\w+)":', shown))
    assert len(names["status"]["active_adaptations"]) == 1
    assert names["status"]["blueprint_cache_stats"]["misses"] == 1
    assert names["status"]["execution_metrics"]["succeeded"] == 1
    assert names["status"]["safety_violations"] == []
