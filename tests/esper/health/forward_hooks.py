"""A ``watch`` for the sampler that needs no slots."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from esper.health.activations import Watch, Watcher


def forward_hook_watch(model: nn.Module) -> Watch:
    """A forward hook on the layer until the returned function is called.

    ``fn`` receives the first tensor argument and the first tensor of the output; a layer
    without them is not reported.
    """
    modules = dict(model.named_modules())

    def watch(layer: str, fn: Watcher) -> Callable[[], None]:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            x, y = first_tensor(args), first_tensor(output)
            if x is not None and y is not None:
                fn(x, y)

        undo: Callable[[], None] = modules[layer].register_forward_hook(hook).remove
        return undo

    return watch


def first_tensor(value: object) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, tuple | list):
        return next((item for item in value if isinstance(item, Tensor)), None)
    return None
