"""Loads of frameworks that no hook of torch sees; they build a saved model's grafts too.

``LightningModule.load_from_checkpoint`` and ``PreTrainedModel.from_pretrained`` make the model
themselves, so nothing of Esper is in it when they load. PEFT writes and reads adapters alone, so
grafts get a file of their own beside them. ``torch.distributed.checkpoint`` reads the names alone
that it is asked for, so it would leave grafts out in silence. :func:`install` replaces these
methods, once a model of the framework is grafted or Esper's callback for it is imported; that of
distributed checkpoints once a model is attached. Without grafts they do what they did.

``torch.jit.script`` compiles each hook of a module, and raises at one that it cannot compile. It is
replaced too once a model is attached, and leaves out the hooks of Esper that only look.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from functools import partial, wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from esper import grafting
from esper.exceptions import ConfigurationError
from esper.fail_closed import FailClosed
from esper.grafting.hooks import hidden_hooks
from esper.grafting.manifest import MANIFEST_KEY
from esper.grafting.slot import SLOT_NAME
from esper.grafting.state_dicts import is_followed, pop_grafts

logger = logging.getLogger("esper")

GRAFTS_FILE = "esper_grafts.safetensors"  # beside PEFT's adapter_model.safetensors
PLANNER = "torch.distributed.checkpoint.default_planner"
SCRIPT = "torch.jit._recursive"
_MARK = "_builds_grafts_of_esper"


def install(names: Iterable[str] | None = None) -> None:
    """For those of the frameworks that the script has imported. A second call does nothing.

    Args:
        names: of their modules; None for all.
    """
    closed = FailClosed()
    missing = "Grafts in a checkpoint are not built by the framework's own load."
    for name, replace in _REPLACED.items():
        module = sys.modules.get(name)
        if module is not None and (names is None or name in names):
            closed.run(partial(replace, module), part=f"load of {name}", unmeasured=missing)


def _in_lightning(lightning: Any) -> None:
    kind = lightning.LightningModule
    load = kind.load_state_dict
    if hasattr(load, _MARK):
        return

    @wraps(load)
    def load_state_dict(self: nn.Module, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if not pop_grafts(dict(state_dict)) or is_followed(self):
            return load(self, state_dict, *args, **kwargs)
        if _begins_to_fit(self):
            raise ConfigurationError(
                "the checkpoint holds grafts, whose weights nothing would train in this fit: give "
                "Trainer(callbacks=[esper.sdk.lightning.EsperCallback()]) to go on from it"
            )
        hooks = grafting.build_grafts_of_loaded_states(self)
        try:
            return load(self, state_dict, *args, **kwargs)
        finally:
            hooks.close()

    setattr(load_state_dict, _MARK, True)
    kind.load_state_dict = load_state_dict


def _begins_to_fit(module: Any) -> bool:
    """Its trainer has restored the module, and makes the optimizers next."""
    trainer = getattr(module, "_trainer", None)
    fitting = getattr(getattr(trainer, "state", None), "fn", None) == "fit"
    return fitting and not getattr(trainer, "optimizers", None)


def _in_transformers(transformers: Any) -> None:
    kind = transformers.PreTrainedModel
    load = kind.from_pretrained.__func__
    if hasattr(load, _MARK):
        return

    @wraps(load)
    def from_pretrained(cls: type[nn.Module], name: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        saved = _grafts_of_folder(name, kwargs.get("subfolder", ""))
        if saved:
            _build(model, saved)
        return loaded

    setattr(from_pretrained, _MARK, True)
    kind.from_pretrained = classmethod(from_pretrained)


def _in_peft(peft: Any) -> None:
    kind = peft.PeftModel
    save, make, load = kind.save_pretrained, kind.from_pretrained.__func__, kind.load_adapter
    if hasattr(save, _MARK):
        return

    @wraps(save)
    def save_pretrained(self: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_directory, *args, **kwargs)
        FailClosed().run(
            partial(_write_grafts, self, Path(save_directory)),
            part="part of PEFT's save_pretrained",
            unmeasured="The saved adapter has no grafts.",
        )
        return result

    @wraps(make)
    def from_pretrained(
        cls: type[nn.Module], model: nn.Module, model_id: Any, *args: Any, **kwargs: Any
    ) -> Any:
        loaded = make(cls, model, model_id, *args, **kwargs)
        _read_grafts(loaded, Path(str(model_id)))
        return loaded

    @wraps(load)
    def load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        again = adapter_name in self.peft_config and Path(str(model_id)).is_dir()
        result = load(self, model_id, adapter_name, *args, **kwargs)
        if again:  # as a Trainer loads its best checkpoint
            _read_grafts(self, Path(str(model_id)))
        return result

    setattr(save_pretrained, _MARK, True)
    kind.save_pretrained, kind.load_adapter = save_pretrained, load_adapter
    kind.from_pretrained = classmethod(from_pretrained)


def _write_grafts(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save_file  # comes with PEFT

    grafts = pop_grafts(model.state_dict())
    file = folder / GRAFTS_FILE
    if not grafts:
        file.unlink(missing_ok=True)
        return
    save_file({name: tensor.contiguous() for name, tensor in grafts.items()}, file)
    logger.warning(
        "PEFT saves adapters alone; the grafts are in %s. PeftModel.from_pretrained builds them in "
        "a script that imports esper.sdk.huggingface; without it, they are missing.",
        file,
    )


def _read_grafts(model: nn.Module, folder: Path) -> None:
    """Gives the model the grafts that were saved beside an adapter, and takes the others out."""
    from safetensors.torch import load_file

    file = folder / GRAFTS_FILE
    saved = load_file(file) if file.is_file() else {}
    wanted = {key.partition(".esper.")[0] for key in saved}
    for layer, _, slot in [*grafting.slots(model)]:
        for slug in list(slot.grafts()) if layer not in wanted else []:
            slot.leave(slug)
    if saved and is_followed(model):
        model.load_state_dict(saved, strict=False)  # the session knows what trains them
    elif saved:
        grafting.load_state_dict(model, saved, strict=False)


def _grafts_of_folder(name: Any, subfolder: str) -> dict[str, Tensor]:
    """The entries of grafts in a folder that ``save_pretrained`` wrote; none for a model's id."""
    folder = Path(str(name)) / subfolder
    if not folder.is_dir():
        return {}
    from safetensors import safe_open  # comes with transformers

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in pop_grafts(dict.fromkeys(tensors.keys())):
                found[key] = tensors.get_tensor(key)
    return found


def _build(model: nn.Module, saved: dict[str, Tensor]) -> None:
    """Builds those grafts whose layer this class of model has, under one of its names."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    fitting = {}
    for key, tensor in saved.items():
        for name in (key, key.removeprefix(prefix), prefix + key):
            if _has_layer(model, name.partition(".esper.")[0]):
                fitting[name] = tensor
                break
    if not fitting:
        return
    try:
        grafting.load_state_dict(model, fitting, strict=False)
    except ConfigurationError as error:
        raise ConfigurationError(
            f"the folder holds grafts that cannot be built in this {type(model).__name__}: {error}"
        ) from error
    layers = sorted({name.partition(".esper.")[0] for name in fitting})
    logger.warning("The saved model's grafts at %s were built again.", ", ".join(layers))


def _has_layer(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _in_distributed_checkpoint(planners: Any) -> None:
    kind = planners.DefaultLoadPlanner
    plan = kind.create_local_plan
    if hasattr(plan, _MARK):
        return

    @wraps(plan)
    def create_local_plan(self: Any) -> Any:
        left_out = _left_out(self.state_dict, self.metadata.state_dict_metadata)
        if left_out:
            raise ConfigurationError(
                f"the checkpoint holds grafts at {', '.join(left_out)} that the state to load does "
                "not ask for, so they would be left out: convert it by torch.distributed."
                "checkpoint.format_utils.dcp_to_torch_save, and call esper.load_state_dict(model, "
                "state)"
            )
        return plan(self)

    setattr(create_local_plan, _MARK, True)
    kind.create_local_plan = create_local_plan


def _in_script(recursive: Any) -> None:
    make = recursive.create_script_module
    if hasattr(make, _MARK):
        return

    @wraps(make)
    def create_script_module(nn_module: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(nn_module, nn.Module):
            return make(nn_module, *args, **kwargs)
        with hidden_hooks(nn_module):
            return make(nn_module, *args, **kwargs)

    setattr(create_script_module, _MARK, True)
    recursive.create_script_module = create_script_module


def _left_out(wanted: Iterable[str], saved: Iterable[str]) -> list[str]:
    """The layers of a checkpoint whose own tensors are read, but not their grafts."""
    names = frozenset(wanted)
    mark = f".{SLOT_NAME}.{MANIFEST_KEY}"
    grafted = [name.removesuffix(mark) for name in saved if name.endswith(mark)]
    return [
        layer
        for layer in grafted
        if f"{layer}{mark}" not in names and any(n.rpartition(".")[0] == layer for n in names)
    ]


_REPLACED = {
    "lightning.pytorch": _in_lightning,
    "pytorch_lightning": _in_lightning,
    "transformers.modeling_utils": _in_transformers,  # transformers imports it when it is asked for
    "peft": _in_peft,
    PLANNER: _in_distributed_checkpoint,
    SCRIPT: _in_script,
}
