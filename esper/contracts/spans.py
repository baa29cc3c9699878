"""The place of a graft that spans layers: from the input of one to the output of a later one.

It is described like a layer, with the input of the first and the output of the last, so that costs,
certificates, kernels and manifests need no second form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from esper.contracts.health import LayerInfo


def why_no_span(since: LayerInfo, layer: LayerInfo) -> str:
    """Why no graft can span from ``since`` to ``layer``, a sentence; empty if one can."""
    for end in (since, layer):
        if not end.graftable:
            return f"{end.name!r} takes no graft: {end.reason or 'unknown'}"
        if not end.in_shape:
            return f"{end.name!r} did not run in the traced forward pass"
        if end.calls > 1:
            return f"{end.name!r} runs {end.calls} times in a forward pass, so its calls differ"
    return _why_not_in_order(since, layer) or _why_not_compatible(since, layer)


def _why_not_in_order(since: LayerInfo, layer: LayerInfo) -> str:
    if since.name == layer.name:
        return "a span needs an earlier layer; leave since= out for a graft beside one layer"
    if since.order == layer.order:
        return f"it is not known whether {since.name!r} runs before {layer.name!r}; pass sample="
    if since.order > layer.order:
        return f"{since.name!r} runs after {layer.name!r}, and a span reads an earlier input"
    if since.recomputed != layer.recomputed:
        return (
            f"activation checkpointing recomputes {since.name!r} and {layer.name!r} apart, and the "
            "input of one is not there when the other is recomputed"
        )
    return ""


def _why_not_compatible(since: LayerInfo, layer: LayerInfo) -> str:
    if not since.features_in or not layer.features_out:
        return f"{since.name!r} reads token numbers, not activations"
    if (since.dtype, since.device) != (layer.dtype, layer.device):
        return (
            f"{since.name!r} is {since.dtype} on {since.device}, {layer.name!r} is {layer.dtype} "
            f"on {layer.device}"
        )
    shapes = f"{list(since.in_shape)} and {list(layer.out_shape)}"
    if since.channel_axis != layer.channel_axis or len(since.in_shape) != len(layer.out_shape):
        return f"the axes of its input and of the output do not correspond: {shapes}"
    if _stride(since, layer) is None:
        return f"its input and the output have other batches or positions: {shapes}"
    return ""


def hidden_layers(layers: Sequence[LayerInfo]) -> list[tuple[LayerInfo, LayerInfo]]:
    """Pairs of layers with one activation function and nothing else between them.

    What the first one returns is a hidden layer. A residual stream, a low-rank pair without an
    activation, and layers behind a pooling or a normalisation are none.
    """
    by_name = {layer.name: layer for layer in layers}
    pairs = [(one, by_name.get(one.feeds[0])) for one in layers if len(one.feeds) == 1]
    return [(one, other) for one, other in pairs if other is not None and other.activation]


def span(since: LayerInfo, layer: LayerInfo) -> LayerInfo:
    """The place of a graft from the input of ``since`` to the output of ``layer``.

    Only where :func:`why_no_span` is empty.
    """
    stride = _stride(since, layer) or ()
    ones, nothing = tuple(1 for _ in stride), tuple(0 for _ in stride)
    return replace(
        layer,
        since=since.name,
        in_shape=since.in_shape,
        features_in=since.features_in,
        activation=layer.activation if since.feeds == (layer.name,) else "",
        kernel_size=ones,
        stride=stride,
        padding=nothing,
        dilation=ones,
        groups=1,
        head_width=0,
        cached_channels=(),
        sequence_axis=since.sequence_axis,
    )


def _positions(shape: tuple[int, ...], channel_axis: int) -> tuple[int, ...]:
    """The shape without its channel axis."""
    axis = channel_axis % len(shape)
    return shape[:axis] + shape[axis + 1 :]


def _stride(since: LayerInfo, layer: LayerInfo) -> tuple[int, ...] | None:
    """How many positions of the input there are for each of the output; None: not so regular."""
    axis = layer.channel_axis
    given = _positions(since.in_shape, axis)
    wanted = _positions(layer.out_shape, axis)
    if axis == -1:
        return () if given == wanted else None
    if given[:1] != wanted[:1]:
        return None
    strides = tuple(-(-a // b) for a, b in zip(given[1:], wanted[1:], strict=True))
    pairs = zip(given[1:], wanted[1:], strides, strict=True)
    fits = all(-(-positions // step) == b for positions, b, step in pairs)
    return strides if fits else None


def place_of(
    find: Callable[[str], LayerInfo | None], layer: str, since: str = ""
) -> LayerInfo | None:
    """The layer with this name, or the span that ends in it; None: there is no such place.

    Args:
        find: the layer with a name.
        since: the layer where the span begins; empty: it is no span.
    """
    last, first = find(layer), find(since) if since else None
    if last is None or not since:
        return last
    return None if first is None or why_no_span(first, last) else span(first, last)
