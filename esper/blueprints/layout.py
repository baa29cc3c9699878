"""How a layer's tensors are laid out: which kinds of layer Esper knows.

Shape legend: N all axes but the channels, C channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esper.contracts import LayerInfo

# Class names, because a LayerInfo is sent between machines. NonDynamicallyQuantizableLinear is the
# output projection of nn.MultiheadAttention.
LINEAR = frozenset({"Linear", "NonDynamicallyQuantizableLinear"})
TRANSPOSED_LINEAR = frozenset({"Conv1D"})  # transformers.pytorch_utils: weight is [in, out]
CONVOLUTION = frozenset({"Conv1d", "Conv2d", "Conv3d"})
TRANSPOSED_CONVOLUTION = frozenset({"ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"})
CHANNELS_FIRST_NORM = frozenset(
    {
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "SyncBatchNorm",
        "GroupNorm",
        "InstanceNorm1d",
        "InstanceNorm2d",
        "InstanceNorm3d",
    }
)
EMBEDDING = frozenset({"Embedding", "EmbeddingBag"})
RECURRENT = frozenset({"RNN", "LSTM", "GRU"})
ATTENTION = frozenset({"MultiheadAttention"})


def is_linear(layer: LayerInfo) -> bool:
    return layer.kind in LINEAR or layer.kind in TRANSPOSED_LINEAR


def is_convolution(layer: LayerInfo) -> bool:
    return layer.kind in CONVOLUTION


def is_norm(layer: LayerInfo) -> bool:
    """Normalisations; transformers names its own ``LlamaRMSNorm``, ``T5LayerNorm`` and so on."""
    return is_norm_kind(layer.kind)


def is_norm_kind(kind: str) -> bool:
    """See :func:`is_norm`."""
    return kind in CHANNELS_FIRST_NORM or kind.endswith(("LayerNorm", "RMSNorm"))


def is_understood(layer: LayerInfo) -> bool:
    """True if the meaning of the axes of input and output is known."""
    known = EMBEDDING | RECURRENT | ATTENTION | TRANSPOSED_CONVOLUTION
    return is_linear(layer) or is_convolution(layer) or is_norm(layer) or layer.kind in known


def channel_axis_of(kind: str) -> int:
    """1 for layers with the channels after the batch, otherwise -1."""
    first = CONVOLUTION | TRANSPOSED_CONVOLUTION | CHANNELS_FIRST_NORM
    return 1 if kind in first else -1


def axes_of(kind: str) -> int:
    """Fewest axes of a batched output: batch, channels, and what a convolution slides over."""
    slides = kind in CONVOLUTION or kind in TRANSPOSED_CONVOLUTION
    return 2 + (int(kind[-2]) if slides else 0)


def why_not_parallel(layer: LayerInfo) -> str:
    """Why ``y + f(x)`` with a point-wise ``f`` is impossible; empty if it is possible."""
    if not layer.graftable:
        return layer.reason
    if layer.kind in EMBEDDING:
        return "its input is token numbers, not activations"
    if layer.kind in TRANSPOSED_CONVOLUTION:
        return "a transposed convolution adds positions, which a point-wise branch cannot do"
    if not is_understood(layer):
        return f"the meaning of the axes of a {layer.kind} is unknown"
    if not layer.features_in or not layer.features_out:
        return "its channels are unknown, because it did not run in the traced forward pass"
    if is_convolution(layer):
        return why_not_geometry(layer)
    if positions(layer.in_shape, layer.channel_axis) != positions(
        layer.out_shape, layer.channel_axis
    ):
        return f"it changes the positions, {layer.in_shape} to {layer.out_shape}, not only channels"
    return ""


def why_not_geometry(layer: LayerInfo) -> str:
    """Why a convolution beside this one would not match its output; empty if it would."""
    if not layer.kernel_size:
        return "its padding is not symmetric zeros, or its geometry is unknown"
    if layer.in_shape and len(layer.in_shape) != len(layer.kernel_size) + 2:
        return "it ran without a batch axis in the traced forward pass"
    return ""


def positions(shape: tuple[int, ...], channel_axis: int) -> tuple[int, ...]:
    """The shape without its channel axis."""
    axis = channel_axis % len(shape) if shape else 0
    return shape[:axis] + shape[axis + 1 :]


def position_count(layer: LayerInfo, *, of_output: bool = False) -> int:
    """Rows N of the traced input (or output): product of all axes but the channels."""
    shape = layer.out_shape if of_output else layer.in_shape
    return math.prod(positions(shape, layer.channel_axis))


def dtype_bytes(layer: LayerInfo) -> int:
    return torch_dtype(layer).itemsize


def torch_dtype(layer: LayerInfo) -> torch.dtype:
    """The dtype of new weights at this layer.

    Raises:
        TypeError: the layer's dtype is not a floating torch dtype.
    """
    dtype = getattr(torch, layer.dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{layer.dtype} of {layer.name} is not a floating-point dtype")
    return dtype


def as_weight_dtype(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` in the dtype of ``weight``; under autocast torch converts it."""
    if torch.is_autocast_enabled(x.device.type) or x.dtype == weight.dtype:
        return x
    return x.to(weight.dtype)


def per_channel(vector_C: Tensor, like: Tensor, channel_axis: int) -> Tensor:
    """[C] -> broadcastable over ``like``."""
    if channel_axis == -1:
        return vector_C
    return vector_C.reshape(1, -1, *([1] * (like.dim() - 2)))
