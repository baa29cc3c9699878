"""Short measurements of a model that trains. Each reads, and changes nothing.

Shape legend: N rows of a batch, C features or classes, R sampled rows of a matrix.

A probe is armed for one step, costs tens of microseconds for each layer, and leaves no hook behind.
All reads are detached; no random number is drawn.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.diagnosis.observation import (
    LayerPass,
    LossKind,
    ModelPass,
    TensorFacts,
)
from esper.fail_closed import FailClosed
from esper.grafting.compiled import Compilation, anything_was_compiled
from esper.grafting.graph import kind_of, layer_modules
from esper.grafting.hooks import PassingHook, register_alike
from esper.grafting.saved_values import numbers_of
from esper.grafting.slot import SLOT_NAME, first_tensor, is_opaque, is_transformed
from esper.health.optimizer_steps import has_numbers, spread_sample
from esper.health.transfers import HostTransfer

ROWS = 64
COLUMNS = 512
EQUAL_ROWS = 0.5
ALIKE = 0.05  # relative distance
CLOSE = 1e-3
FEW = 64  # elements of a tensor
TOKENS = 1024  # of a model's input
LAGS = (1, 0, 2)  # the right one first
COMPARED, DIFFERENT = 32, 8  # rows, and the tokens among them, that no chance makes equal
SOME = 8  # rows
LARGEST_TARGET = 1e5  # float32 has no room for decimals of much larger numbers
ROUND = 0.05  # of a target that somebody chose
TARGET_ERROR = 0.05  # of a target that is computed from its gradient
EXTREME = 0.99
INITIALISED_ALIKE = ("Linear", "Conv1d", "Conv2d", "Conv3d")
FEWEST_OF_UNIFORM, MOST_OF_UNIFORM = 64, 2048  # elements
FEWEST_OF_NORMAL = 512
UNIFORM = 2.0  # / sqrt(elements): Kolmogorov and Smirnov's distance, which 0.1 % exceed by chance
BEYOND = 1.005  # of the limit; rounding of bfloat16
TABLES = ("Embedding", "EmbeddingBag")  # rows that a batch does not use have no gradient
TRANSPOSED = ("Conv1D", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_SHAPING = (
    "View",
    "Unsafe",
    "Squeeze",
    "Unsqueeze",
    "Alias",
    "Reshape",
    "Select",
    "Clone",
    "ToCopy",
)
PART = "diagnosis"
UNMEASURED = "Some rules of the diagnosis are not checked."


def read_tensors(model: nn.Module) -> tuple[TensorFacts, ...]:
    """The parameters as they are now, from a sample of each one's elements."""
    modules = dict(model.named_modules())
    found: list[TensorFacts] = []
    seen: dict[tuple[Any, ...], str] = {}
    for name, parameter in model.named_parameters():
        if not has_numbers(parameter) or not parameter.numel() or is_graft(name):
            continue
        layer = name.rpartition(".")[0]
        kind = plain_kind_of(modules.get(layer, model))  # a class may give names of its own
        sample = sampled(parameter.detach()).float().cpu()
        facts = _tensor_facts(name, layer, kind, parameter, sample)
        if facts.is_matrix and facts.std > 0:
            key = (facts.shape, numbers_of(sample).tobytes())
            facts = replace(facts, twin=seen.get(key, ""))
            seen.setdefault(key, name)
        found.append(facts)
    return tuple(found)


def still_symmetric(model: nn.Module, tensors: Sequence[TensorFacts]) -> tuple[str, ...]:
    """Those that started with equal rows, or as a copy of another tensor, and still nearly are."""
    found = []
    parameters = dict(model.named_parameters())
    for facts in tensors:
        own = parameters.get(facts.name)
        if own is None or own.shape != facts.shape:
            continue
        sample = sampled(own.detach()).float()
        if facts.equal_rows >= EQUAL_ROWS and not facts.all_zero and facts.shape[0] > 2:
            alike = _distance(sample[1:], sample[:-1]) < ALIKE
            if float(alike.float().mean()) >= EQUAL_ROWS:
                found.append(facts.name)
        elif facts.twin in parameters:
            other = sampled(parameters[facts.twin].detach()).float().to(sample.device)
            if float(_distance(sample, other).median()) < ALIKE:
                found.append(facts.name)
    return tuple(found)


def _distance(a_RC: Tensor, b_RC: Tensor) -> Tensor:
    """float [R]: relative distance of each pair of rows."""
    size = a_RC.norm(dim=1).clamp_min(1e-30)
    distance: Tensor = (a_RC - b_RC).norm(dim=1) / size
    return distance


def same_modules(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Pairs of places in one container that hold the same module with parameters."""
    found = []
    for path, container in model.named_modules():
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            continue
        first: dict[int, str] = {}
        for name, child in container._modules.items():  # named_children() skips them
            if not any(True for _ in child.parameters()):
                continue
            place = f"{path}.{name}" if path else name
            if id(child) in first:
                found.append((first[id(child)], place))
            first.setdefault(id(child), place)
    return tuple(found)


def is_graft(name: str) -> bool:
    """The parameter belongs to a graft, which has rules of its own at birth."""
    return SLOT_NAME in name.split(".")


def sampled(tensor: Tensor) -> Tensor:
    """A view of at most 64 x 512 elements; of a matrix, rows of one unit each."""
    if tensor.ndim < 2:
        return tensor.reshape(-1)[: ROWS * COLUMNS]
    return tensor[:ROWS].flatten(1)[:, :COLUMNS]


def plain_kind_of(module: nn.Module) -> str:
    """As ``kind_of``, but a class made from a table or a transposed layer counts as that one."""
    made_from = (kind.__name__ for kind in type(module).__mro__)
    return next((name for name in made_from if name in (*TABLES, *TRANSPOSED)), kind_of(module))


def fan_in(shape: Sequence[int], kind: str) -> int:
    """Number of inputs of one unit."""
    return shape[0] if kind in TRANSPOSED else math.prod(shape[1:])


def _tensor_facts(
    name: str, layer: str, kind: str, parameter: nn.Parameter, sample: Tensor
) -> TensorFacts:
    std = float(sample.std(correction=0))
    equal, gain = math.nan, math.nan
    if parameter.ndim >= 2:
        # Rows of one number in another class scale one feature each, as those of (IA)³ do.
        units = sample.shape[1] > 1 or kind in INITIALISED_ALIKE
        if len(sample) > 1 and kind not in TABLES and units:
            equal = float((sample[1:] == sample[:-1]).all(1).float().mean())
        if kind not in TABLES:
            gain = std * math.sqrt(fan_in(parameter.shape, kind))
    return TensorFacts(
        name=name,
        layer=layer,
        kind=kind,
        shape=tuple(parameter.shape),
        trainable=parameter.requires_grad,
        std=std,
        equal_rows=equal,
        all_zero=not bool(sample.any()),
        gain=gain,
        untrained=_is_untrained(sample, parameter.shape, kind),
    )


def _is_untrained(sample: Tensor, shape: Sequence[int], kind: str) -> bool:
    """It is uniform between -1 / sqrt(inputs) and its opposite, as torch's own layers start.

    Training moves some elements beyond the limit, and most of them by different amounts. Tables
    start normal, with a standard deviation of 1.
    """
    if kind in TABLES and sample.numel() >= FEWEST_OF_NORMAL:
        return _is_spread_as(torch.special.ndtr(sample.flatten()))
    if kind not in INITIALISED_ALIKE or len(shape) < 2 or sample.numel() < FEWEST_OF_UNIFORM:
        return False
    share = sample.flatten().abs() * math.sqrt(fan_in(shape, kind))
    if float(share.max()) > BEYOND:
        return False
    return _is_spread_as(share)


def _is_spread_as(share: Tensor) -> bool:
    """It is uniform between 0 and 1."""
    share = share[:: math.ceil(share.numel() / MOST_OF_UNIFORM)]
    spread = share.sort().values - torch.linspace(
        0, 1, share.numel(), dtype=torch.float32, device="cpu"
    )
    return float(spread.abs().max()) < UNIFORM / math.sqrt(share.numel())


class ForwardProbe:
    """Reads one forward pass that trains: each layer's input and output, and the model's own.

    The gradient at the model's output shows the loss function, whatever computes it. Layers inside
    compiled code are not read: torch guards on the number of a layer's hooks.
    """

    def __init__(
        self, model: nn.Module, fail_closed: FailClosed, compilation: Compilation | None = None
    ) -> None:
        self._model = model
        self._compilation = compilation or Compilation(model)
        self._closed = partial(fail_closed.wrap, part=PART, unmeasured=UNMEASURED)
        self._handles: dict[str, RemovableHandle] = {}  # by layer; empty name: the model's own
        self._armed = False
        self._layers: dict[str, tuple[str, bool, Tensor]] = {}
        self._linear: dict[int, str] = {}  # node of the gradient's graph -> linear layer
        self._follows: dict[str, str] = {}
        self._values: dict[str, int] = {}  # of each channel, by norm over the batch
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._gradient: Tensor | None = None
        self._tokens: Tensor | None = None
        self._targets: Tensor | None = None
        self._end = ""
        self._axis: int | None = None

    @torch.no_grad()
    def arm(self) -> None:
        """For the next forward pass that trains."""
        self.disarm()
        self._layers, self._input, self._output, self._gradient = {}, None, None, None
        self._linear, self._follows, self._values = {}, {}, {}
        self._end, self._axis, self._tokens, self._targets = "", None, None, None
        for name, module in layer_modules(self._model).items():
            self._register(name, module, partial(self._see_layer, name))
        if not is_opaque(self._model):
            self._register("", self._model, self._see_model)
        self._armed = True

    def disarm(self) -> None:
        self._armed = False
        for name in list(self._handles):
            # Code that was compiled with the hook would be compiled again without it. The hook of a
            # layer that was not seen may be in such code, where it does nothing.
            seen = name in self._layers if name else self._output is not None
            if seen or not anything_was_compiled():
                self._handles.pop(name).remove()

    def close(self) -> None:
        """Removes all hooks."""
        self._armed = False
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _register(self, name: str, module: nn.Module, see: Callable[..., None]) -> None:
        if name not in self._handles and not self._compilation.covers(name):
            hook = self._hook(see)
            self._handles[name] = register_alike("probe", module, hook)

    def collect(self, step: int, transfer: HostTransfer) -> Callable[[], ModelPass] | None:
        """Sends what was seen to the host; None where no forward pass was.

        Returns:
            What makes the result, once the numbers have arrived.
        """
        armed = self._armed
        self.disarm()
        if not armed or (not self._layers and self._output is None):
            return None
        transfer.add("layers", [numbers for _, _, numbers in self._layers.values()])
        sent = {
            "input": self._input, "output": self._output, "gradient": self._gradient,
            "tokens": self._tokens, "targets": self._targets,
        }  # fmt: skip
        forms = {name: tensor.shape for name, tensor in sent.items() if tensor is not None}
        for name in forms:
            transfer.add(name, [tensor.flatten() for tensor in (sent[name],) if tensor is not None])
        seen = ModelPass(step=step, layers=(), output_end=self._end, softmax_axis=self._axis)
        shape = self._shape if self._output is not None else ()
        return partial(
            _model_pass, seen, transfer, dict(self._layers), forms, shape, dict(self._follows),
            dict(self._values),
        )  # fmt: skip

    def _hook(self, see: Callable[..., None]) -> PassingHook:
        def seen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._armed and torch.is_grad_enabled():
                with torch.no_grad():
                    see(module, args, kwargs, output)

        return PassingHook(self._closed(seen), takes=4)

    def _see_layer(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        x, y = first_tensor((*args, *kwargs.values())), first_tensor(output)
        if name in self._layers or x is None or y is None or not _readable(y):
            return
        numbers = _input_numbers(x) if _readable(x) else _unknown_numbers(y)
        std = rows_of(y).std(correction=0).reshape(1)
        joined = torch.cat([numbers.to(y.device, non_blocking=True), std])
        self._layers[name] = plain_kind_of(module), module.training, joined
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and y.ndim > 1:
            self._values[name] = y.numel() // max(1, y.shape[1])
        if kind_of(module) == "Linear":
            # By its number: torch makes a node's Python object anew each time it is asked for, so
            # that its id is soon that of another node.
            if x.grad_fn is not None:
                self._follows[name] = self._linear.get(x.grad_fn._sequence_nr(), "")
            if y.grad_fn is not None:
                self._linear[y.grad_fn._sequence_nr()] = name

    def _see_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._output is not None:
            return
        x, y = first_tensor((*args, *kwargs.values())), output_of(output)
        if x is not None and _readable(x):
            self._input = rows_of(x).clone()
        if y is None or not _readable(y) or not y.requires_grad or not y.ndim:
            return
        self._output, self._shape = rows_of(y).clone(), tuple(y.shape)
        self._end, self._axis = end_of(y), softmax_axis_of(y)
        if x is not None and _are_tokens(x) and y.shape[:-1] == x.shape:
            self._tokens = x.flatten()[:TOKENS].float()
        y.register_hook(self._closed(self._see_gradient))  # type: ignore[no-untyped-call]

    def _see_gradient(self, gradient: Tensor) -> None:
        if self._gradient is None and _readable(gradient):
            self._gradient = rows_of(gradient.detach()).clone()
            if self._tokens is not None:
                self._targets = _classes_of(gradient.detach().flatten(0, -2)[:ROWS])


def _model_pass(
    seen: ModelPass,
    transfer: HostTransfer,
    layers: Mapping[str, tuple[str, bool, Tensor]],
    forms: Mapping[str, torch.Size],
    output_shape: tuple[int, ...],
    follows: Mapping[str, str],
    values: Mapping[str, int],
) -> ModelPass:
    """From what has arrived on the host.

    Args:
        forms: shapes of the tensors that were sent whole.
        follows: linear layer -> the linear layer whose output it reads.
        values: norm over the batch -> values of each channel.
    """
    host = {
        name: torch.from_numpy(transfer.take(name, not_a_number=math.nan)).float().reshape(form)
        for name, form in forms.items()
    }
    passes = tuple(
        replace(entry, follows=follows.get(entry.layer, ""), values=values.get(entry.layer, 0))
        for entry in _layer_passes(transfer, layers)
    )
    seen = replace(seen, layers=passes)
    if "input" in host:
        x = host["input"]
        finite = bool(x.isfinite().all())
        rms = float(x.square().mean().sqrt()) if finite else math.inf
        seen = replace(seen, input_rms=rms, input_finite=finite)
    if "output" in host:
        seen = _with_output(seen, host["output"], output_shape, host.get("gradient"))
    if "targets" in host:
        tokens, targets = host["tokens"].long(), host["targets"].long()
        seen = replace(seen, lag=_lag_of(tokens, targets, output_shape[:-1]))
    return seen


def _layer_passes(
    transfer: HostTransfer, layers: Mapping[str, tuple[str, bool, Tensor]]
) -> tuple[LayerPass, ...]:
    if not layers:
        return ()
    numbers = transfer.take("layers", not_a_number=math.nan).tolist()
    return tuple(
        LayerPass(name, kind, std, spread, zeros, extremes, out_std, training)
        for (name, (kind, training, _)), (std, spread, zeros, extremes, out_std) in zip(
            layers.items(), numbers, strict=True
        )
    )


def output_of(output: Any) -> Tensor | None:
    """The model's output: a tensor, the first of several, or the ``logits`` of a mapping."""
    if isinstance(output, Mapping):
        named = output.get("logits")
        output = named if named is not None else tuple(output.values())
    return first_tensor(output)


def end_of(output: Tensor) -> str:
    """Name of the function that computed the output, without what only changes its shape."""
    node = output.grad_fn
    for _ in range(6):
        if node is None:
            return ""
        if not node.name().startswith(_SHAPING):
            return node.name()
        node = node.next_functions[0][0] if node.next_functions else None
    return ""


def softmax_axis_of(output: Tensor) -> int | None:
    """The axis, counted from the first, where a softmax is the last function of all."""
    node = output.grad_fn
    if node is None or not node.name().startswith(("SoftmaxBackward", "LogSoftmaxBackward")):
        return None
    axis = getattr(node, "_saved_dim", None)
    if not isinstance(axis, int):
        return None
    # torch saves a negative axis as a number without a sign.
    axis = axis - 2**64 if axis >= 2**63 else axis
    return axis % max(1, output.ndim)


def rows_of(tensor: Tensor) -> Tensor:
    """float [at most 64, at most 512]: features last; of an image, all of it is one row."""
    if tensor.ndim >= 4:
        flat = tensor[:ROWS].flatten(1)
    elif tensor.ndim:
        flat = tensor.reshape(-1, tensor.shape[-1])[:ROWS]
    else:
        flat = tensor.reshape(1, 1)
    return flat[:, :COLUMNS].detach().float()


def _are_tokens(x: Tensor) -> bool:
    """int [batch, places], or the places first."""
    return x.ndim == 2 and x.dtype in (torch.int64, torch.int32) and not is_transformed(x)


def _classes_of(g_NC: Tensor) -> Tensor:
    """float [N]: the class with the lowest gradient, the target of cross-entropy; -1: no target."""
    lowest, classes = g_NC.min(1)
    return torch.where(lowest < 0, classes, -1).float()


def _lag_of(tokens: Tensor, targets: Tensor, form: tuple[int, ...]) -> int:
    """The targets are the tokens so many places later, along either axis; -1: they are not.

    Args:
        tokens: int, those of the input [batch, places], flattened, as far as they were sent.
        targets: int [N], of its first N places; below 0 for a place that the loss ignores.
        form: of the input.
    """
    place = torch.arange(len(targets), device="cpu")
    for lag in LAGS:
        for apart, room in ((1, form[1] - place % form[1]), (form[1], form[0] - place // form[1])):
            later = place + lag * apart
            compared = (targets >= 0) & (room > lag) & (later < len(tokens))
            wanted = tokens[later[compared]]
            if len(wanted) < COMPARED or len(set(wanted.tolist())) < DIFFERENT:
                continue
            if bool((targets[compared] == wanted).all()):
                return lag
    return -1


def _readable(tensor: Tensor) -> bool:
    if is_transformed(tensor):
        return False
    return tensor.is_floating_point() and has_numbers(tensor) and tensor.numel() > 0


def _unknown_numbers(y: Tensor) -> Tensor:
    """As :func:`_input_numbers`, of an input that cannot be read; ``y`` is the layer's output."""
    return torch.full((4,), math.nan, dtype=torch.float32, device=y.device)


def _input_numbers(x: Tensor) -> Tensor:
    """float [4]: std, spread over the rows, share of zeros, share of extremes."""
    rows = rows_of(x)
    rms = rows.square().mean().sqrt()
    spread = (rows - rows.mean(0)).square().mean().sqrt() / rms.clamp_min(1e-30)
    if len(rows) < 2:
        spread = torch.full_like(rms, math.nan)
    zeros, low, high = (rows == 0).float().mean(), rows.min(), rows.max()
    # Behind a ReLU or in one-hot data there are zeros, and those are no end of a range.
    sigmoid = ((rows > EXTREME) | (rows < 1 - EXTREME)).float().mean()
    tanh = (rows.abs() > EXTREME).float().mean()
    unknown = torch.full_like(tanh, math.nan)
    extremes = torch.where(low > 0, sigmoid, torch.where(low < 0, tanh, unknown))
    extremes = torch.where((high <= 1) & (low >= -1), extremes, unknown)
    return torch.stack([rows.std(correction=0), spread, zeros, extremes])


def _with_output(
    seen: ModelPass, y_NC: Tensor, shape: tuple[int, ...], gradient_NC: Tensor | None
) -> ModelPass:
    size = float(y_NC.abs().max())
    spread = float((y_NC.amax(0) - y_NC.amin(0)).max()) / max(size, 1e-30)
    seen = replace(
        seen,
        output_shape=shape,
        row_sum=float(y_NC.sum(1).mean()) if shape[-1] == y_NC.shape[1] else math.nan,
        output_low=float(y_NC.min()),
        output_high=float(y_NC.max()),
        output_spread=spread if len(y_NC) > 1 else math.nan,
        log_sum_near_zero=float(y_NC.logsumexp(1).abs().max()) < CLOSE,
    )
    if gradient_NC is None or gradient_NC.shape != y_NC.shape or shape[-1] != y_NC.shape[1]:
        return seen
    return _with_loss(seen, y_NC.double(), gradient_NC.double(), shape)


def _with_loss(seen: ModelPass, y_NC: Tensor, g_NC: Tensor, shape: tuple[int, ...]) -> ModelPass:
    rows, elements = math.prod(shape[:-1]), math.prod(shape)
    used = g_NC.abs().sum(1) > 0  # a row that the loss ignores has no gradient
    if not used.any() or not bool(g_NC.isfinite().all()):
        return seen
    if g_NC.numel() == elements:
        seen = replace(seen, gradient_square=float(g_NC.square().sum()))
    every_row, (y_NC, g_NC) = bool(used.all()), (y_NC[used], g_NC[used])
    if y_NC.shape[1] > 1:
        # Rows that a loss of rewards leaves out have a reward of zero; the others may be punished.
        normed = seen.log_sum_near_zero or _are_probabilities(y_NC)
        if normed and every_row and len(g_NC) >= SOME and _is_likelihood(-g_NC):
            return replace(
                seen, loss_kind=LossKind.LIKELIHOOD, loss_scale=float(-g_NC.max()) * rows
            )
        if _is_likelihood(g_NC):
            return replace(
                seen, loss_kind=LossKind.LIKELIHOOD, loss_scale=float(-g_NC.min()) * rows
            )
        sums, sizes = g_NC.sum(1).abs(), g_NC.abs().sum(1)
        # A row that is already right has a gradient of rounding errors.
        if bool((sums < CLOSE * sizes + 1e-6 * sizes.max()).all()):
            if every_row and (found := _with_unusual_sign(y_NC, g_NC, rows)):
                return replace(seen, loss_kind=found[0], loss_scale=found[1])
            weight = _softmax_weight(y_NC, g_NC)
            targets_NC = torch.softmax(y_NC, 1) - g_NC / weight
            if not _are_distributions(targets_NC):
                if _are_of_two_softmaxes(y_NC, g_NC):
                    return replace(seen, loss_kind=LossKind.TWO_SOFTMAXES)
                return seen  # of rewards, say, or of rows with weights of their own
            classes = targets_NC.argmax(1)
            top, count = _most_frequent(classes)
            return replace(
                seen,
                loss_kind=LossKind.CROSS_ENTROPY,
                loss_scale=weight * rows,
                target_low=float(classes.min()),
                target_high=float(classes.max()),
                cross_entropy=float(_cross_entropy(y_NC, targets_NC)),
                target_class=top,
                target_share=count / len(classes),
                answered_share=float((y_NC.argmax(1) == top).float().mean()),
            )
        if _is_softmax_over_rows(y_NC, g_NC):
            return replace(seen, loss_kind=LossKind.OVER_ROWS)
    for kind, targets in _targets(y_NC, g_NC * elements):
        if float(targets.abs().max()) > LARGEST_TARGET:
            continue
        if bool(((targets - targets.round()).abs() < CLOSE).all()):
            whole = targets.round()
            return replace(
                seen,
                loss_kind=kind,
                loss_scale=1.0,
                target_low=float(whole.min()),
                target_high=float(whole.max()),
            )
    if found := _other_binary(y_NC, g_NC, elements):
        return replace(seen, loss_kind=found[0], loss_scale=found[1], target_low=0, target_high=1)
    wanted = y_NC - g_NC * elements / 2
    if shape[-1] == 1 and len(y_NC) > 2 and not _are_equal(y_NC):
        soft = torch.sigmoid(y_NC) - g_NC * elements
        for kind, averaged in ((LossKind.SQUARED, wanted), (LossKind.BINARY_LOGITS, soft)):
            if _are_equal(averaged) and not _is_round(float(averaged.mean())):
                return replace(seen, loss_kind=kind, loss_scale=1.0, targets_averaged=True)
    if math.isnan(seen.gradient_square):
        return seen
    return replace(seen, target_low=float(wanted.min()), target_high=float(wanted.max()))


def _with_unusual_sign(y_NC: Tensor, g_NC: Tensor, rows: int) -> tuple[LossKind, float] | None:
    """(kind, weight of a row x rows) of a probability, or of cross-entropy with a minus sign.

    All rows have the same weight; those of rewards do not. Two classes do not show the sign.
    """
    if y_NC.shape[1] < 3 or len(y_NC) < SOME:
        return None
    for sign in (1.0, -1.0):
        if (weight := _probability_weight(y_NC, sign * g_NC)) > 0:
            return LossKind.PROBABILITY, sign * weight * rows
    weight = _softmax_weight(y_NC, -g_NC)
    targets_NC = torch.softmax(y_NC, 1) + g_NC / weight
    whole = (targets_NC - targets_NC.round()).abs() < CLOSE
    if bool(whole.all()) and _are_distributions(targets_NC):
        return LossKind.CROSS_ENTROPY, -weight * rows
    return None


def _cross_entropy(y_NC: Tensor, targets_NC: Tensor) -> Tensor:
    return -(targets_NC * torch.log_softmax(y_NC, 1)).sum(1).mean()


def _most_frequent(classes_N: Tensor) -> tuple[int, int]:
    """(class, how many rows have it)."""
    counts = torch.bincount(classes_N)
    return int(counts.argmax()), int(counts.max())


def _are_probabilities(y_NC: Tensor) -> bool:
    return bool((y_NC >= 0).all() and ((y_NC.sum(1) - 1).abs() < CLOSE).all())


def _probability_weight(y_NC: Tensor, g_NC: Tensor) -> float:
    """The weight w of a row in ``-w p[target]`` with p = softmax(y), or NaN for another loss.

    Its gradient is ``w p[t] (p - t)``, lowest at the target. Where all p[t] are equal, it is also
    that of cross-entropy.
    """
    p_NC, target_N1 = torch.softmax(y_NC, 1), g_NC.argmin(1, keepdim=True)
    p_t_N1 = p_NC.gather(1, target_N1)
    if p_t_N1.std() < ALIKE * p_t_N1.mean():
        return math.nan
    t_NC = torch.zeros_like(p_NC).scatter_(1, target_N1, 1.0)
    u_NC = p_t_N1 * (p_NC - t_NC)
    w_N = (u_NC * g_NC).sum(1) / u_NC.square().sum(1).clamp_min(1e-30)
    w, error_N = w_N.median(), (g_NC - w_N[:, None] * u_NC).norm(dim=1)
    fits = bool((error_N <= CLOSE * g_NC.norm(dim=1)).all() and ((w_N - w).abs() < 0.01 * w).all())
    return float(w) if fits and w > 0 else math.nan


def _is_softmax_over_rows(y_NC: Tensor, g_NC: Tensor) -> bool:
    """The gradient is that of nll_loss of a softmax over axis 0, with some target in each row.

    It is ``K[c] exp(y[n, c])`` where c is not the target of row n, and lower by the same w there.
    Each row of a contrastive loss has a target of its own, and may have its softmax over the rows.
    """
    if len(y_NC) < SOME or y_NC.shape[1] < 2:
        return False
    e_NC = torch.exp(y_NC - y_NC.amax(0))
    k_NC = torch.where(g_NC > 0, g_NC / e_NC, math.nan)
    k_C = k_NC.nanmedian(0).values
    below_NC = torch.where(k_C.isnan(), -g_NC, k_C * e_NC - g_NC)
    target_N, w_N = below_NC.argmax(1), below_NC.amax(1)
    w = float(w_N.median())
    rest_NC = below_NC.scatter(1, target_N[:, None], 0.0)
    # A class that no row of the batch has gets no gradient.
    return bool(
        w > 0
        and ((w_N - w).abs() < 0.01 * w).all()
        and (rest_NC.abs() < CLOSE * w).all()
        and 1 < len(set(target_N.tolist())) < len(target_N)
    )


def _is_round(number: float) -> bool:
    """As people choose it, such as 0.9 for the real samples of a GAN; no mean of samples is."""
    return abs(number / ROUND - round(number / ROUND)) < CLOSE


def _are_equal(values_N1: Tensor) -> bool:
    return float(values_N1.max() - values_N1.min()) < 1e-5 * max(1.0, float(values_N1.abs().max()))


def _is_likelihood(g_NC: Tensor) -> bool:
    """One element of each row has a gradient, the same negative number in all of them."""
    used = g_NC != 0
    values = g_NC[used]
    return bool((used.sum(1) == 1).all()) and bool(
        ((values - values[0]).abs() < CLOSE * values[0].abs()).all() and values[0] < 0
    )


def _softmax_weight(y_NC: Tensor, g_NC: Tensor) -> float:
    """The weight w of a row in ``w (softmax(y) - target)``, from a class that is not the target."""
    p_NC = torch.softmax(y_NC, 1)
    others = g_NC > 0
    ratios = (g_NC / p_NC.clamp_min(1e-12))[others & (p_NC > 1e-6)]
    return float(ratios.median()) if len(ratios) else math.nan


def _are_of_two_softmaxes(y_NC: Tensor, g_NC: Tensor) -> bool:
    """The rows of the gradient are those of cross-entropy of ``softmax(y)`` with some class.

    With p = softmax(y), q = softmax(p) and the class t that is
    ``w p (q - t - <p, q - t>)``: each class is tried, and must fit with the same w.
    """
    p_NC = torch.softmax(y_NC, 1)
    d_NTC = torch.softmax(p_NC, 1)[:, None, :] - torch.eye(
        y_NC.shape[1], dtype=y_NC.dtype, device=y_NC.device
    )
    u_NTC = p_NC[:, None, :] * (d_NTC - (p_NC[:, None, :] * d_NTC).sum(2, keepdim=True))
    w_NT = (u_NTC * g_NC[:, None, :]).sum(2) / u_NTC.square().sum(2).clamp_min(1e-30)
    error_NT = (g_NC[:, None, :] - w_NT[:, :, None] * u_NTC).norm(dim=2)
    best_N = error_NT.argmin(1, keepdim=True)
    w_N, error_N = w_NT.gather(1, best_N)[:, 0], error_NT.gather(1, best_N)[:, 0]
    size = float(g_NC.norm(dim=1).max())
    w = w_N.median()
    # With two classes any gradient whose sum is zero fits, but not with the same w.
    return bool(
        w > 0
        and len(y_NC) > 2
        and (error_N <= CLOSE * g_NC.norm(dim=1) + 1e-6 * size).all()
        and ((w_N - w).abs() < 0.01 * w).all()
    )


def _are_distributions(targets_NC: Tensor) -> bool:
    return bool(((targets_NC > -TARGET_ERROR) & (targets_NC < 1 + TARGET_ERROR)).all())


def _targets(y_NC: Tensor, g_NC: Tensor) -> list[tuple[LossKind, Tensor]]:
    """The targets that each mean loss would need for this gradient (times the elements)."""
    found = [
        (LossKind.BINARY_LOGITS, torch.sigmoid(y_NC) - g_NC),
        (LossKind.SQUARED, y_NC - g_NC / 2),
    ]
    if bool(((y_NC > 0) & (y_NC < 1)).all()):
        found.insert(0, (LossKind.BINARY, y_NC - g_NC * y_NC * (1 - y_NC)))
    return found


def _other_binary(y_NC: Tensor, g_NC: Tensor, elements: int) -> tuple[LossKind, float] | None:
    """A binary loss that is a sum, or has a minus sign: (kind, weight of an element x elements)."""
    for weight in (1.0, -1.0, -1.0 / elements):
        for kind, targets in _targets(y_NC, g_NC / weight):
            if kind is LossKind.SQUARED:
                continue
            # Outputs at the ends would look like targets themselves, whatever the gradient is.
            outputs = y_NC if kind is LossKind.BINARY else torch.sigmoid(y_NC)
            inside = (outputs - outputs.round()).abs() > 10 * CLOSE
            whole = (targets - targets.round()).abs() < CLOSE
            if bool(inside.all() and whole.all() and (targets.abs() < 1.5).all()):
                return kind, weight * elements
    return None


@torch.no_grad()
def weights_digest(model: nn.Module) -> float:
    """A number that is equal for equal weights: a checksum of a few elements of each tensor."""
    parts = [
        spread_sample(p.detach(), FEW).double().cpu() for p in model.parameters() if has_numbers(p)
    ]
    return float(zlib.crc32(torch.cat(parts).numpy().tobytes())) if parts else 0.0
