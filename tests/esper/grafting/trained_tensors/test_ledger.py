"""The audit: what an optimizer and its companions train, compared with the model."""

from __future__ import annotations

import torch
from torch import nn

from esper.grafting import accompany, audit
from tests.esper.tiny_models import make_training


def test_a_healthy_run_has_no_findings() -> None:
    training = make_training()
    training.run(2)
    assert audit(training.model, [training.optimizer]) == []
    assert audit(training.model, []) == []


def test_the_audit_names_what_is_wrong_and_what_to_do() -> None:
    training = make_training("none")
    training.run(1)
    model, optimizer = training.model, training.optimizer
    group = optimizer.param_groups[0]
    lost = model.blocks[0].wide.weight
    group["params"] = [p for p in group["params"] if p is not lost]
    model.blocks[1].narrow.bias.requires_grad_(False)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    group["params"].append(model.head.weight)
    findings = {(f.layer, f.observed): f for f in audit(model, [optimizer])}
    observed = {key: finding.severity for key, finding in findings.items()}
    assert observed == {
        (
            "blocks.0.wide",
            "weight: trainable, but in no optimizer: it will never change",
        ): "serious",
        ("blocks.1.narrow", "bias: frozen, after an optimizer has trained it"): "caution",
        ("embed", "weight: held 2 times: it is updated more than once a step"): "serious",
        ("", "1 tensors held by an optimizer are not in the model"): "caution",
        ("", "1 entries of optimizer state belong to no group"): "caution",
    }
    assert all(f.remedy and f.rule == "optimizer_ledger" for f in findings.values())


def test_what_is_frozen_from_the_start_is_the_users_choice() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert audit(model, [optimizer]) == []


def test_one_problem_of_many_tensors_is_one_finding() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(10)))
    (finding,) = audit(model, [torch.optim.SGD(model[0].parameters(), lr=0.1)])
    assert finding.layer == ""
    assert finding.observed.startswith("18 tensors, the first is 1.weight: trainable, but in no")


def test_weights_that_a_companion_trains_are_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    assert len(audit(model, [optimizer])) == 2
    companion = accompany(optimizer, list(model[1].parameters()), layer="1")
    assert audit(model, [optimizer]) == []
    companion.leave()
    assert len(audit(model, [optimizer])) == 2
