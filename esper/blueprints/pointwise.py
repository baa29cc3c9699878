"""A matrix that is applied at each position, for any channel axis.

Shape legend: N all axes but the channels, I channels in, O channels out.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from esper.blueprints import layout
from esper.contracts import LayerInfo

_BY_DIMENSION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MAX_SPATIAL = max(_BY_DIMENSION)


def project(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    *,
    channel_axis: int = -1,
    stride: tuple[int, ...] = (),
) -> Tensor:
    """[N, I] -> [N, O]; with the channels at axis 1 it is a 1×1 convolution.

    Why a convolution and not ``movedim``: moving the axis copies ``x`` and keeps the copy for the
    backward pass.
    """
    if channel_axis == -1 or x.dim() == 2:
        return F.linear(x, weight_OI, bias_O)
    spatial = x.dim() - 2
    kernel = weight_OI.reshape(*weight_OI.shape, *([1] * spatial))
    return _BY_DIMENSION[spatial](x, kernel, bias_O, stride=stride or 1)


def why_not_aligned(layer: LayerInfo) -> str:
    """Why a 1×1 branch does not match the layer's output positions; empty if it does.

    With padding ``2 p = d (k - 1)`` a convolution's output ``i`` is centred on input
    ``i · stride``, like that of a strided 1×1 convolution.
    """
    reason = layout.why_not_parallel(layer)
    if reason or layer.channel_axis == -1:
        return reason
    if len(layer.in_shape) - 2 > MAX_SPATIAL:
        return f"inputs with {len(layer.in_shape)} axes are not supported"
    geometry = zip(layer.kernel_size, layer.padding, layer.dilation, strict=True)
    if any(2 * padding != dilation * (size - 1) for size, padding, dilation in geometry):
        return "its padding shifts or trims positions, and a point-wise branch does neither"
    return ""
