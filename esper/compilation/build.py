"""Tier 0: build, certify, measure, package and sign a kernel. Nothing here runs a foreign file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esper import blueprints, grafting
from esper.blueprints import Blueprint, Graft, layout
from esper.compilation import measure
from esper.compilation.bundle import pack
from esper.compilation.instantiate import instantiate
from esper.compilation.key import kernel_key
from esper.contracts import (
    Certificate,
    CostForecast,
    KernelBundle,
    KernelDraft,
    KernelKey,
    KernelReport,
    KernelSpec,
    LayerInfo,
    MeasuredCost,
)
from esper.contracts.signing import generate_private_key
from esper.exceptions import BlueprintError, ConfigurationError, GraftError, KernelBuildError
from esper.grafting.slot import first_tensor


def build_kernel(
    layer: LayerInfo,
    blueprint: str,
    config: dict[str, Any] | None = None,
    *,
    private_key: str,
    seed: int = 0,
) -> KernelBundle:
    """Specialise -> certify -> measure -> package -> sign, all in this process.

    Args:
        layer: the target of the graft; defines shapes, dtype and device.
        blueprint: slug or id.
        config: None: the blueprint's defaults for this layer.
        private_key: base64 Ed25519 key of this worker.
        seed: of the initial weights; 0: derived from the key, so equal keys give equal weights.

    Returns:
        The signed files. ``report.json`` has the times of all stages before packaging.

    Raises:
        KernelBuildError: as :func:`draft_kernel`.
        ConfigurationError: the signing key is not valid.
    """
    return pack(draft_kernel(layer, blueprint, config, seed=seed), private_key=private_key)


def draft_kernel(
    layer: LayerInfo,
    blueprint: str,
    config: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    capability: str | None = None,
    on_step: Callable[[str, CostForecast], None] = lambda _step, _forecast: None,
) -> KernelDraft:
    """Specialise -> certify -> measure, without signing.

    Args:
        capability: target of the kernel; None: this machine's.
        on_step: called after ``forecast``, ``built``, ``certified`` and ``measured``. The forecast
            is computed from shapes, before anything is built.

    Raises:
        KernelBuildError: permanent: unknown or unfit blueprint, refused by the certificate.
            Not permanent: this machine failed now (memory, device).
    """
    stage_ms: dict[str, float] = {}
    try:
        with _timed(stage_ms, "specialise"):
            key, spec, chosen = _specialise(layer, blueprint, config, seed, capability)
            forecast = chosen.forecast(layer, spec.config)
            on_step("forecast", forecast)
            graft = instantiate(spec, layer)
        on_step("built", forecast)
        with _timed(stage_ms, "certify"):
            certificate, host, x = _certify(layer, chosen, graft, spec.config)
        on_step("certified", forecast)
        with _timed(stage_ms, "measure"):
            latency_ms, measured = _measure(layer, host, graft, x)
            certificate = replace(certificate, latency_ms=latency_ms)
        on_step("measured", forecast)
    except (BlueprintError, GraftError, ConfigurationError) as error:
        raise KernelBuildError(str(error), permanent=True) from error
    except (RuntimeError, MemoryError) as error:  # torch: out of memory, a lost device
        raise KernelBuildError(f"{type(error).__name__}: {error}", permanent=False) from error
    report = KernelReport(certificate, forecast, tier=0, stage_ms=stage_ms, measured=measured)
    return KernelDraft(key, spec, report)


def warm_up() -> None:
    """Runs imports, first calls and the allocator before the first job (2-5 s cold)."""
    layer = LayerInfo(
        name="warm_up",
        kind="Linear",
        in_shape=(4, 16),
        out_shape=(4, 16),
        dtype="float32",
        parameters=16 * 17,
        graftable=True,
        features_in=16,
        features_out=16,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    build_kernel(layer, "proj_lora_64", private_key=generate_private_key())


def _specialise(
    layer: LayerInfo,
    slug: str,
    config: dict[str, Any] | None,
    seed: int,
    capability: str | None,
) -> tuple[KernelKey, KernelSpec, Blueprint]:
    chosen = blueprints.get_blueprint(slug)
    config = chosen.config_for(layer, config)
    key = kernel_key(layer, chosen.slug, config, capability=capability)
    spec = KernelSpec(chosen.slug, chosen.version, config, seed or int(key.hash[:12], 16))
    return key, spec, chosen


def _certify(
    layer: LayerInfo, blueprint: Blueprint, graft: Graft, config: dict[str, Any]
) -> tuple[Certificate, nn.Module, Tensor]:
    host, x = grafting.stand_in(layer)
    certificate = grafting.certify(
        host, layer, blueprint, graft, x, config=config, training=True, thorough=True
    )
    if not certificate.passed:
        raise KernelBuildError("; ".join(certificate.failures), permanent=True)
    return certificate, host, x


def _measure(
    layer: LayerInfo, host: nn.Module, graft: Graft, x: Tensor
) -> tuple[float, MeasuredCost]:
    arguments = (x, x, x) if layer.kind in layout.ATTENTION else (x,)
    with torch.no_grad():
        y = first_tensor(host(*arguments))
    assert y is not None  # certify has run this host
    return measure.cost(graft, x, y, rows=layer.in_shape[0])


@contextmanager
def _timed(stage_ms: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    stage_ms[stage] = round((time.perf_counter() - started) * 1e3, 3)
