"""``esper.blueprints.for_layer``: what fits, at which cost, and why not each of the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import esper
from esper.exceptions import (
    ConfigurationError,
    IncompatibleLayerError,
    UnknownBlueprintError,
    UnknownLayerError,
)

LAYERS: dict[str, tuple[nn.Module, torch.Tensor]] = {
    "linear": (nn.Linear(16, 16), torch.ones(4, 16)),
    "sequence": (nn.Linear(16, 16), torch.ones(2, 5, 16)),
    "conv": (nn.Conv2d(3, 8, 3), torch.ones(2, 3, 8, 8)),
    "norm": (nn.LayerNorm(16), torch.ones(4, 16)),
    "embedding": (nn.Embedding(10, 8), torch.zeros(2, 3, dtype=torch.long)),
}


class Caller(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.host, self.sample = LAYERS[kind]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.host(x)  # type: ignore[no-any-return]


@pytest.fixture(params=LAYERS)
def caller(request: pytest.FixtureRequest) -> Caller:
    return Caller(request.param)


def test_what_is_said_to_fit_can_be_grafted_and_the_rest_cannot(caller: Caller) -> None:
    fits = esper.blueprints.for_layer(caller, "host", sample=caller.sample)
    assert {fit.blueprint for fit in fits} == {entry.slug for entry in esper.blueprints.all()}
    for fit in fits:
        if not fit.fits:
            assert fit.reason
            with pytest.raises(IncompatibleLayerError):
                esper.graft(
                    caller, "host", fit.blueprint, optimizer=None, sample=caller.sample
                ).undo()
            continue
        receipt = esper.graft(
            caller, "host", fit.blueprint, optimizer=None, sample=caller.sample, **fit.config
        )
        assert fit.cost is not None
        assert receipt.certificate.parameters == fit.cost.parameters
        receipt.undo()


def test_the_smallest_comes_first_and_the_table_has_a_row_for_each(caller: Caller) -> None:
    fits = esper.blueprints.for_layer(caller, "host", sample=caller.sample)
    costs = [fit.cost.parameters for fit in fits if fit.cost is not None]
    assert costs == sorted(costs)
    assert [fit.fits for fit in fits] == sorted((fit.fits for fit in fits), reverse=True)
    lines = str(fits).splitlines()
    assert len(lines) == 2 + len(fits)
    assert lines[0].startswith(f"{len(fits.fitting)} of {len(fits)} blueprints fit host: ")
    for fit, line in zip(fits, lines[2:], strict=True):
        assert line.startswith(fit.blueprint)
        assert "\n" not in str(fit)
    assert fits._repr_html_().count("<tr>") == 1 + len(fits)


def test_a_session_knows_shapes_grafts_and_what_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with esper.attach(model, optimizer, mode="supervised", slots=["0"]) as session:
        loss = model(torch.ones(4, 8)).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        session.step(loss)
        assert "proj_lora_64" in esper.blueprints.for_layer(session, "0").fitting
        session.graft("0", "proj_lora_64")
        reasons = {fit.blueprint: fit.reason for fit in esper.blueprints.for_layer(session, "0")}
        assert reasons["proj_lora_64"] == "the layer has it already"
        assert "conflicts with proj_lora_64" in reasons["proj_lora_ia3"]
        assert esper.blueprints.for_layer(session, "2").fitting == ()
        assert "leave it alone" in str(esper.blueprints.for_layer(session, "2"))
        assert "proj_lora_64" not in esper.blueprints.for_layer(model, "0").fitting


def test_a_mistyped_layer_or_blueprint_or_setting_gets_the_near_names() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)})
    with pytest.raises(UnknownLayerError, match=r"did you mean 'fc[12]' or 'fc[12]'"):
        esper.blueprints.for_layer(model, "fc")
    with pytest.raises(UnknownLayerError, match="did you mean"):
        esper.graft(model, "fc3", "proj_lora_64")
    for typed, meant in (("proj_lora", "proj_lora_64"), ("BP-PROJ-LORA-64", "BP-PROJ-LoRA-64")):
        with pytest.raises(UnknownBlueprintError, match=f"did you mean .*'{meant}'"):
            esper.graft(model, "fc1", typed)
    with pytest.raises(ConfigurationError, match="did you mean 'rank'"):
        esper.graft(model, "fc1", "proj_lora_64", rnk=2)
    with pytest.raises(ConfigurationError, match="did you mean 'observe'"):
        esper.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), mode="observ")  # type: ignore[arg-type]


def test_a_graft_without_an_optimizer_says_that_nothing_trains_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    receipt = esper.graft(model, "0", "proj_lora_64")
    assert "nothing trains the new weights of proj_lora_64 in '0'" in capsys.readouterr().err
    assert "no optimizer trains it" in str(receipt)
    receipt.undo()
    esper.graft(model, "0", "proj_lora_64", optimizer=None).undo()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    receipt = esper.graft(model, "0", "proj_lora_64", optimizer=optimizer)
    assert "no optimizer" not in str(receipt)
    receipt.undo()
    esper.graft(model, "0", "mon_act_stats")  # has nothing to train
    assert capsys.readouterr().err == ""
