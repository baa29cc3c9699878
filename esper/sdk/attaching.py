"""``esper.attach``: from a model and its optimizer to a watched run."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from esper import grafting
from esper.by_identity import WeaklyByIdentity
from esper.contracts import MAX_NAME_LENGTH, RunMode, SafetyPolicy
from esper.exceptions import ConfigurationError
from esper.fail_closed import is_the_scripts
from esper.grafting import RankGroup, Replicas, ShardedRanks, Surroundings
from esper.grafting.compiled import without_compiler
from esper.grafting.layers.graph import layer_modules, why_never_graftable
from esper.grafting.optimizers import unwrap_optimizer
from esper.grafting.ranks.replicas import Call
from esper.health.pace import periods_of
from esper.near_names import did_you_mean
from esper.sdk import framework_loads
from esper.sdk.evaluation_pace import pace_of
from esper.sdk.parts import Setup
from esper.sdk.session import Session
from esper.sdk.shadow import Shadow
from esper.sdk.snapshot_limit import folder_for_snapshots, snapshot_limit
from esper.sdk.tracking import Mirror, Tracker, trackers_of
from esper.sdk.transport.queues import Pace
from esper.sharding import Kind, group_ranks, kind_of, why_no_graft

logger = logging.getLogger("esper")

Mode: TypeAlias = Literal["observe", "supervised", "automatic"]  # the members of RunMode
# model -> its latest session
_sessions: MutableMapping[nn.Module, weakref.ref[Session]] = WeaklyByIdentity()


def attach(
    model: nn.Module,
    optimizer: Any,
    *,
    run: str = "run",
    server: str | None = None,
    token: str | None = None,
    mode: Mode | RunMode = "observe",
    scheduler: Any = None,
    scaler: Any = None,
    slots: Literal["auto"] | Iterable[str] = "auto",
    evaluate: Callable[[], float | None] | None = None,
    checkpoint: Callable[[], object] | None = None,
    target_steps: int | None = None,
    safety_policy: SafetyPolicy | None = None,
    copies: Any = None,
    sampling: int | Iterable[Sequence[int]] | None = None,
    evaluate_every: int | Iterable[Sequence[int]] | None = None,
    snapshot_memory: float | None = None,
    snapshot_folder: str | Path | None = None,
    good_states: str | Path | None = None,
    trackers: Iterable[str | Tracker | Any] | None = None,
    shadow: Shadow | None = None,
    verbose: bool = True,
) -> Session:
    """Watch a model while it trains, and adapt it where the mode allows.

    Returns at once, whether the server can be reached or not: the run registers in the
    background after its first step.

    On several ranks (``DistributedDataParallel``) every rank attaches with the same arguments, and
    calls the session's methods in the same order; rank 0 alone decides and talks to the server.

    Args:
        model: as it is trained; a compiled model is watched through its original.
        optimizer: one, or several in a list; Accelerate's wrapper is fine.
        run: its name; attaching again with the name of an open run continues that run.
        server: base URL, default ``ESPER_SERVER``; without either, local mode: the same loop in
            this process.
        token: of scope ``runs:create``, default ``ESPER_TOKEN``.
        mode: ``observe`` adds nothing to the model, ``supervised`` asks a person for each graft,
            ``automatic`` lets the policy act alone above its threshold.
        scheduler: one or several learning-rate schedulers, which a hard undo rewinds too. Grafts
            follow every scheduler, named or not.
        scaler: the ``GradScaler``, where there is one; else it is noticed at the first steps.
        slots: layers that may be grafted, ``"auto"`` for all that can be.
        evaluate: held-out loss on always the same data, lower is better; it judges grafts.
        checkpoint: saves the run, when a person asks for the remedy ``checkpoint_now``; called
            between two steps. What it returns, such as a path, is shown. On several ranks each
            calls it.
        target_steps: how many steps are planned, for the progress shown.
        safety_policy: local mode: thresholds of the gates. A server brings its own.
        copies: one or several running averages of the model, such as torch's ``AveragedModel``.
            Grafts are put into them too; otherwise an average pairs the wrong tensors.
        sampling: steps between health frames, or the ``session.sampling`` of another run, to
            measure at the same steps. By default Esper chooses, so that it costs less than 1 %.
        evaluate_every: steps between two calls of ``evaluate``, or the
            ``session.evaluate_every`` of another run, to evaluate at the same steps. By default
            Esper chooses, so that it costs at most 2 %.
        snapshot_memory: GiB that the snapshots for hard undos may take together, default
            ``ESPER_SNAPSHOT_MEMORY_GIB`` or a quarter of the machine's memory. Where it holds
            fewer than three, older changes can only be undone softly, and a finding says so.
        snapshot_folder: where snapshots go that do not fit in ``snapshot_memory``, default
            ``ESPER_SNAPSHOT_FOLDER``. The training waits while one is written. Its files have no
            name, so nothing is left of them; a graft for which the disk has no room is refused.
        good_states: folder in which the last good states of the run are kept on disk too, so that
            a run that goes on from a checkpoint can be rewound. It takes up to four times the size
            of a checkpoint; delete it with the checkpoints. By default they are in memory only.
        trackers: where findings, grafts, remedies and gains are written too, as markers and
            metrics with the link of the decision: ``"tensorboard"``, ``"wandb"``, ``"mlflow"``,
            ``"trackio"``, a ``SummaryWriter``, a run of wandb, or any object with ``write(event)``
            and ``close()``; with ``"kubeflow"`` the progress goes into the TrainJob's status.
            Default: the names in ``ESPER_TRACKERS``, separated by commas. They are written in a
            thread; one that fails is left out.
        shadow: how a graft is tried on a copy of this run when a person asks for it on the page of
            a decision: batches, training loss and held-out loss of any model, and the share of the
            time that it may take. Without it such a request is refused.
        verbose: say what a user must know on stderr, one line each, on rank 0. False, or
            ``ESPER_VERBOSE=0`` in the environment: the logger ``esper`` alone gets the lines.

    Raises:
        ConfigurationError: an argument is invalid; the model is untouched.
        UnknownLayerError: ``slots`` names a layer that the model does not have.
    """
    run_mode = _mode(mode)
    wrapper = without_compiler(model)
    bare = _unwrap(wrapper)
    optimizers = _optimizers(optimizer)
    address, secret = _server(server, token) if _is_lead(wrapper, bare) else ("", "")
    takes_no_graft = _why_no_graft(wrapper)
    names = () if takes_no_graft else _slot_names(bare, slots)
    periods, evaluated = periods_of(sampling), pace_of(evaluate_every)
    _check(run, target_steps, evaluate, checkpoint)
    snapshot_bytes = snapshot_limit(snapshot_memory)
    spill_folder = folder_for_snapshots(snapshot_folder)
    followers = _several(copies)
    for copied in followers:
        grafting.check_copy(bare, copied)
    mirror = Mirror(trackers_of(trackers) if _is_lead(wrapper, bare) else ())
    replicas = _ranks_of(wrapper, bare)
    if replicas is not None:
        arguments = [run, run_mode, names, evaluate is not None, len(optimizers), len(followers)]
        arguments += [periods, evaluated, checkpoint is not None]
        replicas.meet(Call.ATTACH, 0, key=f"{arguments} {replicas.checksum()}")
    older = _older_session(bare)
    if run_mode is not RunMode.OBSERVE:  # there, a graft by hand gets its slot when it comes
        names = _prepare(bare, names, all_or_none=slots != "auto")
    session = Session(
        Setup(
            model=bare,
            surroundings=Surroundings(
                optimizers,
                _several(scheduler),
                scaler,
                followers,
                replicas,
                takes_no_graft,
            ),
            run=run,
            server=address,
            token=secret,
            mode=run_mode,
            slots=names,
            evaluate=evaluate,
            checkpoint=checkpoint,
            target_steps=target_steps,
            safety_policy=safety_policy or SafetyPolicy(),
            pace=Pace(),
            sampling=periods,
            evaluate_every=evaluated,
            snapshot_limit=snapshot_bytes,
            snapshot_folder=spill_folder,
            good_states=None if good_states is None else Path(good_states).absolute(),
            mirror=mirror,
            shadow=shadow,
            verbose=verbose,
            trained=model,
        )
    )
    if older is not None:
        session.say_attached_twice(older)
    _sessions[bare] = weakref.ref(session)
    # Before any graft: a checkpoint of an earlier process may hold some.
    framework_loads.install([framework_loads.PLANNER, framework_loads.SCRIPT])
    return session


def _older_session(model: nn.Module) -> Session | None:
    """An open session of the same model, which from now on measures and decides nothing.

    Two that act on one model would each count the other's grafts as the user's. Calls of the older
    one's ``step`` do no harm, so it is not closed.
    """
    entry = _sessions.get(model)
    older = entry() if entry is not None else None
    if older is None or older.closed:
        return None
    older.detach()
    return older


def _mode(mode: str) -> RunMode:
    try:
        return RunMode(mode)
    except ValueError:
        raise ConfigurationError(
            f"unknown mode {mode!r}{did_you_mean(str(mode), RunMode)}; "
            f"known are: {', '.join(RunMode)}"
        ) from None


def _unwrap(model: Any) -> nn.Module:
    """The module that holds the layers, out of the wrappers of torch.compile, DDP and others."""
    model = without_compiler(model)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if isinstance(model, wrappers) or _is_deepspeed(model):
        return _unwrap(model.module)
    return model


def _why_no_graft(wrapper: Any) -> str:
    """With one device, or none, nn.DataParallel calls the model itself."""
    if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
        return (
            "nn.DataParallel copies the model to each device in each step, which a graft does not "
            "survive: use DistributedDataParallel, or one device"
        )
    return ""


def _is_deepspeed(model: nn.Module) -> bool:
    return any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__)


def _sharding_of(wrapper: Any, model: nn.Module) -> Kind | None:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return Kind.ZERO if _is_deepspeed(wrapper) else kind_of(model)


def _is_lead(wrapper: Any, model: nn.Module) -> bool:
    if _sharding_of(wrapper, model) is not None:
        return int(torch.distributed.get_rank()) == group_ranks(model)[0]
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return int(torch.distributed.get_rank(wrapper.process_group)) == 0
    return True


def _ranks_of(wrapper: Any, model: nn.Module) -> RankGroup | None:
    """The other ranks, None where there are none; making it waits for all of them."""
    kind = _sharding_of(wrapper, model)
    if kind is not None:
        return ShardedRanks(model, kind)
    if not isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return None
    if torch.distributed.get_world_size(wrapper.process_group) == 1:
        return None
    return Replicas(wrapper)


def _optimizers(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    if optimizer is None:
        raise ConfigurationError("attach needs the optimizer that trains the model")
    try:
        return tuple(unwrap_optimizer(entry) for entry in _several(optimizer))
    except TypeError as error:
        raise ConfigurationError(str(error)) from error


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _server(server: str | None, token: str | None) -> tuple[str, str]:
    address = server if server is not None else os.environ.get("ESPER_SERVER", "")
    if not address:
        return "", ""
    if not address.startswith(("http://", "https://")):
        raise ConfigurationError(f"server must start with http:// or https://, got {address!r}")
    secret = token if token is not None else os.environ.get("ESPER_TOKEN", "")
    if not secret:
        raise ConfigurationError(
            "a server needs a token: make one on its page Account and settings with the scope "
            "runs:create, and "
            "pass token=… or set ESPER_TOKEN"
        )
    return address.rstrip("/"), secret


def _slot_names(model: nn.Module, slots: Literal["auto"] | Iterable[str]) -> tuple[str, ...]:
    if slots == "auto":
        layers = {} if why_no_graft(kind_of(model)) else layer_modules(model)
        return tuple(name for name in layers if not why_never_graftable(model, name, layers))
    if isinstance(slots, str):
        raise ConfigurationError(f'slots must be "auto" or a list of layer names, got {slots!r}')
    names = tuple(slots)
    for name in names:
        grafting.find_host(model, name)
        reason = why_never_graftable(model, name)
        if reason:
            raise ConfigurationError(f"layer {name!r} can have no slot: {reason}")
    return () if why_no_graft(kind_of(model)) else names  # such a graft is refused when it is asked


def _prepare(model: nn.Module, names: tuple[str, ...], *, all_or_none: bool) -> tuple[str, ...]:
    """Prepares a slot for each layer; a layer of a class that takes no hook or child goes without.

    The session's findings name it: its recorder finds no place there either.
    """
    try:
        grafting.prepare_slots(model, names)
    except Exception as error:
        if all_or_none or is_the_scripts(error):
            raise
        return tuple(name for name in names if _takes_slot(model, name))
    return names


def _takes_slot(model: nn.Module, name: str) -> bool:
    try:
        grafting.prepare_slots(model, [name])
    except Exception as error:
        if is_the_scripts(error):
            raise
        logger.debug("%r takes no slot", name, exc_info=error)
        return False
    return True


def _check(run: str, target_steps: int | None, evaluate: object, checkpoint: object) -> None:
    if not 0 < len(run) <= MAX_NAME_LENGTH:
        raise ConfigurationError(f"run must be a name of 1 to {MAX_NAME_LENGTH} characters")
    if target_steps is not None and target_steps <= 0:
        raise ConfigurationError(f"target_steps must be above 0, got {target_steps}")
    if evaluate is not None and not callable(evaluate):
        raise ConfigurationError("evaluate must be a function that returns the held-out loss")
    if checkpoint is not None and not callable(checkpoint):
        raise ConfigurationError("checkpoint must be a function that saves the run")
