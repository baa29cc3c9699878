"""Building kernels: what is in them, what is refused, and what a trainer makes of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from esper import blueprints
from esper.blueprints import Graft
from esper.blueprints.catalog.proj_ia3 import ProjIa3 as Ia3
from esper.compilation import build_kernel, capability, kernel_key, open_kernel
from esper.compilation.instantiate import instantiate
from esper.contracts import KernelReport, KernelSpec, LayerInfo, signing
from esper.exceptions import (
    ConfigurationError,
    IncompatibleLayerError,
    KernelBuildError,
    KernelError,
    UnknownBlueprintError,
)

PRIVATE_KEY = signing.generate_private_key()
TRUSTED_KEY = signing.public_key(PRIVATE_KEY)
LAYER = LayerInfo(
    name="fc",
    kind="Linear",
    in_shape=(4, 6, 32),
    out_shape=(4, 6, 16),
    dtype="float32",
    parameters=33 * 16,
    graftable=True,
    features_in=32,
    features_out=16,
)


def built(layer: LayerInfo, slug: str) -> tuple[KernelSpec, KernelReport]:
    bundle = build_kernel(layer, slug, private_key=PRIVATE_KEY)
    key, spec, report = open_kernel(bundle.files, bundle.digest, TRUSTED_KEY)
    assert key == kernel_key(layer, slug, {})
    return spec, report


@pytest.mark.parametrize("slug", [blueprint.slug for blueprint in blueprints.list_blueprints()])
def test_every_blueprint_that_fits_becomes_a_certified_and_measured_kernel(slug: str) -> None:
    if blueprints.get_blueprint(slug).supports(LAYER):
        with pytest.raises(KernelBuildError) as refused:
            build_kernel(LAYER, slug, private_key=PRIVATE_KEY)
        assert refused.value.permanent
        return

    _, report = built(LAYER, slug)

    assert report.certificate.passed
    assert report.certificate.parameters == report.forecast.parameters
    assert 0 <= report.certificate.latency_ms < 1000
    assert 0 <= report.certificate.memory_mib < 1
    assert set(report.stage_ms) == {"specialise", "certify", "measure"}


def test_equal_keys_give_equal_weights_and_other_layers_other_ones() -> None:
    first, _ = built(LAYER, "proj_lora_64")
    second, _ = built(replace(LAYER, name="elsewhere"), "proj_lora_64")
    wider, _ = built(replace(LAYER, in_shape=(8, 6, 32), out_shape=(8, 6, 16)), "proj_lora_64")

    assert first == second
    assert first.seed != wider.seed
    one, other = instantiate(first, LAYER), instantiate(second, LAYER)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_building_moves_no_random_stream() -> None:
    before = torch.get_rng_state()

    build_kernel(LAYER, "mlp_gelu_2048", private_key=PRIVATE_KEY)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("slug", "config"),
    [
        ("no_such_blueprint", None),
        ("proj_lora_64", {"rank": -3}),
        ("proj_lora_64", {"rnak": 4}),
    ],
)
def test_what_can_never_be_built_is_refused_for_good(slug: str, config: dict[str, int]) -> None:
    with pytest.raises(KernelBuildError) as refused:
        build_kernel(LAYER, slug, config, private_key=PRIVATE_KEY)

    assert refused.value.permanent
    assert str(refused.value)


def test_a_layer_on_a_device_that_is_not_here_is_no_final_no() -> None:
    elsewhere = replace(LAYER, device="cuda:7")
    if capability() != "cpu":
        elsewhere = replace(LAYER, device="cuda:99")

    with pytest.raises(KernelBuildError) as refused:
        build_kernel(elsewhere, "proj_ia3", private_key=PRIVATE_KEY)

    assert not refused.value.permanent


class Shouting(Graft):
    """Changes the layer's output right after the graft, which no graft may."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((16,), 1.5))

    def combine(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * self.gain


def test_a_graft_that_changes_the_output_is_refused_by_its_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Ia3, "make", lambda self, layer, config, weights: Shouting())

    with pytest.raises(KernelBuildError, match="output right after the graft") as refused:
        build_kernel(LAYER, "proj_ia3", private_key=PRIVATE_KEY)

    assert refused.value.permanent


def test_without_a_signing_key_nothing_is_built() -> None:
    with pytest.raises(ConfigurationError):
        build_kernel(LAYER, "proj_ia3", private_key="not a key")


def test_a_trainer_refuses_a_spec_that_it_would_build_differently() -> None:
    spec, _ = built(LAYER, "proj_ia3")

    with pytest.raises(KernelError, match="same Esper"):
        instantiate(replace(spec, blueprint_version="0" * 16), LAYER)
    with pytest.raises(UnknownBlueprintError):
        instantiate(replace(spec, blueprint="from_the_future"), LAYER)
    with pytest.raises(IncompatibleLayerError):
        instantiate(spec, replace(LAYER, graftable=False, reason="it is a container"))


def test_convolutions_of_equal_shapes_and_other_geometry_share_no_kernel() -> None:
    layer = replace(
        LAYER,
        kind="Conv2d",
        in_shape=(2, 8, 9, 9),
        out_shape=(2, 8, 9, 9),
        features_in=8,
        features_out=8,
        channel_axis=1,
        kernel_size=(3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    )
    wide = replace(layer, kernel_size=(5, 5), padding=(2, 2))

    assert kernel_key(layer, "proj_ia3", None).hash != kernel_key(wide, "proj_ia3", None).hash
