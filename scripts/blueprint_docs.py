"""Write ``docs/blueprints.md`` from the catalogue: facts, costs, and the contract as measured.

python -m scripts.blueprint_docs            write
python -m scripts.blueprint_docs --check    exit 1 where the file differs

Every number comes from the code: costs from the formulas, the contract from grafting into the
layers below. Latency is left out, since it is this machine's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from esper import blueprints
from esper.blueprints import Blueprint, Composition
from esper.contracts import BlueprintCategory, Certificate, CostForecast, GraftKind, LayerInfo
from esper.exceptions import IncompatibleLayerError
from esper.grafting import apply_graft, trace_layers
from esper.grafting.changes.certify import Conv1D
from scripts.generated_page import write_or_check

TARGET = Path(__file__).resolve().parents[1] / "docs" / "blueprints.md"
WIDTH = 64
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear 64 → 64": (lambda: nn.Linear(WIDTH, WIDTH), (4, 16, WIDTH)),
    "Conv1D 64 → 192 (Hugging Face)": (lambda: Conv1D(WIDTH, 3 * WIDTH), (4, 16, WIDTH)),
    "LayerNorm 64": (lambda: nn.LayerNorm(WIDTH), (4, 16, WIDTH)),
    "Conv2d 16 → 32, 3 × 3, stride 2": (
        lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1),
        (4, 16, 12, 12),
    ),
    "BatchNorm2d 16": (lambda: nn.BatchNorm2d(16), (4, 16, 12, 12)),
    "LSTM 32 → 64": (lambda: nn.LSTM(32, WIDTH, batch_first=True), (4, 16, 32)),
    "MultiheadAttention 64": (
        lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True),
        (4, 16, WIDTH),
    ),
    "Embedding 100 × 64": (lambda: nn.Embedding(100, WIDTH), (4, 16)),
}
# The first layer of the feed-forward block of GPT-2 small, at 8 sequences of 1,024 tokens.
LARGE = LayerInfo(
    name="transformer.h.0.mlp.c_fc",
    kind="Conv1D",
    in_shape=(8, 1024, 768),
    out_shape=(8, 1024, 3072),
    dtype="float32",
    parameters=769 * 3072,
    graftable=True,
    features_in=768,
    features_out=3072,
)
LARGE_NORM = replace(
    LARGE,
    name="transformer.h.0.ln_1",
    kind="LayerNorm",
    out_shape=LARGE.in_shape,
    parameters=2 * 768,
    features_out=768,
)
HEADER = """# Blueprints

Written by `python -m scripts.blueprint_docs`; a test compares it with the code.

The costs come from the formulas, at each blueprint's default settings. Memory is weights,
gradients, two moments and the activations that are kept, in float32. The column *contract* is
measured: the blueprint is grafted into the layer on a CPU. Its first number is the largest
difference of any output number right after the graft. *refused* is followed by the reason that
Esper gives.
"""


class Around(nn.Module):
    """A model around one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        out = self.layer(*arguments)
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found


def render() -> str:
    """The whole file."""
    catalogue, all_of_them = blueprints.catalogue(), blueprints.list_blueprints()
    parts = [HEADER]
    for category in BlueprintCategory:
        mine = [blueprint for blueprint in catalogue if blueprint.category is category]
        parts.append(f"## {category.replace('_', ' ').capitalize()}\n")
        parts += [_section(blueprint) for blueprint in mine]
    parts.append("## Compositions\n")
    parts.append(
        "Trees of the above; `esper/blueprints/compositions/`, and the folder named by "
        "`ESPER_COMPOSITIONS`.\n"
    )
    parts += [_section(b) for b in all_of_them if isinstance(b, Composition)]
    return "\n".join(parts)


def _section(blueprint: Blueprint) -> str:
    lines = [
        f"### {blueprint.slug}",
        "",
        f"**{blueprint.title}** · `{blueprint.id}` · {blueprint.kind} · risk {blueprint.risk}"
        + (" · can be merged" if blueprint.mergeable else ""),
        "",
        blueprint.idea,
        "",
        f"- When: {blueprint.when}",
        f"- Source: {blueprint.source}",
    ]
    if isinstance(blueprint, Composition):
        lines.append(f"- Tree: {blueprint.way} of {', '.join(blueprint.members)}")
    if blueprint.conflicts:
        lines.append(f"- Not together with: {', '.join(sorted(blueprint.conflicts))}")
    if blueprint.requires:
        lines.append(f"- Needs on the layer: {' or '.join(sorted(blueprint.requires))}")
    if blueprint.scaler_refusal:
        lines.append(f"- With a gradient scaler: refused, {blueprint.scaler_refusal}")
    if blueprint.replicas_refusal:
        lines.append(f"- On several ranks: refused, {blueprint.replicas_refusal}")
    if blueprint.kind is GraftKind.DISTRIBUTED:
        lines += ["- Where: on the whole model, on CPU; needs at least 2 ranks. No parameters.", ""]
    else:
        lines += ["", *_large(blueprint), *_table(blueprint), ""]
    return "\n".join(lines)


def _large(blueprint: Blueprint) -> Iterator[str]:
    for layer, words in ((LARGE, "768 → 3072"), (LARGE_NORM, "LayerNorm 768")):
        if not blueprint.supports(layer):
            config = blueprint.default_config(layer)
            cost = _cost(blueprint.forecast(layer, config))
            yield f"At GPT-2 small's {words}, 8 × 1,024 positions: {cost}."
            yield f"Settings: `{json.dumps(config)}`"
            yield ""
            return


def _cost(forecast: CostForecast) -> str:
    return (
        f"{forecast.parameters:,} parameters, {forecast.flops / 1e9:,.3g} GFLOPs, "
        f"{forecast.memory_mib:,.4g} MiB in training"
    )


def _table(blueprint: Blueprint) -> Iterator[str]:
    yield "| layer | parameters | MFLOPs | MiB forecast | MiB measured | contract |"
    yield "|---|---|---|---|---|---|"
    for name in LAYERS:
        yield f"| {name} | {_row(blueprint, name)} |"


def _row(blueprint: Blueprint, name: str) -> str:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = Around(make())
    x = torch.randint(0, 100, shape) if name.startswith("Embedding") else torch.randn(shape)
    layer = next(i for i in trace_layers(model, lambda: model(x)) if i.name == "layer")
    try:
        if blueprint.requires:
            apply_graft(model, layer, blueprints.get_blueprint(max(blueprint.requires)))
        receipt = apply_graft(model, layer, blueprint, thorough=True)
    except IncompatibleLayerError as error:
        reason = blueprint.supports(layer) or error.reason
        return f"| | | | refused: {reason}"
    forecast = blueprint.forecast(layer, receipt.config)
    return (
        f"{forecast.parameters:,} | {forecast.flops / 1e6:.3g} | {forecast.memory_mib:.3g} | "
        f"{receipt.certificate.memory_mib:.3g} | {_contract(receipt.certificate)}"
    )


def _contract(certificate: Certificate) -> str:
    kept = {
        "alive": certificate.live,
        "undo exact": certificate.undo_exact,
        "host untouched": certificate.host_untouched,
        "no random numbers drawn": certificate.rng_neutral,
    }
    return ", ".join(
        [f"{certificate.max_abs_diff:g}", *(word for word, true in kept.items() if true)]
    )


if __name__ == "__main__":
    sys.exit(write_or_check(TARGET, render, __doc__))
