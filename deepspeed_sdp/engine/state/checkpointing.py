"""``save_checkpoint`` and ``load_checkpoint``: what of a job is in a checkpoint, and how it comes back."""

import copy
import functools
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.utils import logger

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.checkpoint import (
    FULL_SCALE,
    Checkpoint,
    Entry,
    Placed,
    Snapshot,
    Streamed,
    factor_on,
    header,
    keepers_of,
    layout_file,
    open_checkpoint,
    write_checkpoint,
    writes_of,
)
from deepspeed_sdp.engine.state.memory_room import make_room
from deepspeed_sdp.engine.state.random_state import random_state, set_random_state
from deepspeed_sdp.engine.state.schedule import follow_schedule
from deepspeed_sdp.engine.state.staging import staged
from deepspeed_sdp.engine.state.training_state import TrainingState
from deepspeed_sdp.engine.state.universal import open_universal
from deepspeed_sdp.engine.zero.behaviour import GROUP_KEY
from deepspeed_sdp.engine.zero.own_state import fits_own, own_state, take_own_state
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.ranks import gather_objects
from deepspeed_sdp.subnetwork import Subnetwork

# Options of a group that say how a step is computed, on this device and by this implementation.
_OF_IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")

_NUMBERS = (int, float, torch.Tensor)

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def save_checkpoint(
    engine: Any,
    folder: Path,
    tag: str | None,
    client_state: Mapping[str, Any] | None,
    is_latest: bool,
    *,
    is_in_memory: bool = False,
) -> None:
    """Collective; see :meth:`SDPEngine.save_checkpoint` and :meth:`SDPEngine.save_in_memory`."""
    engine.optimizer.refresh.settle()
    own = _own(engine)
    with engine.averaged():
        _save(engine, folder, tag, client_state, is_latest, own, is_in_memory)


def _save(
    engine: Any,
    folder: Path,
    tag: str | None,
    client_state: Mapping[str, Any] | None,
    is_latest: bool,
    own: dict[str, Any] | None,
    is_in_memory: bool,
) -> None:
    state, settings, groups = _state_of(engine), engine.sdp_config.checkpoint, engine._owner_groups
    scalars, copies = state.scalars(), 1 if is_in_memory else settings.copies
    layout, rank, worker = state.layout(copies), dist.get_rank(), groups.subnetwork_index
    head = agreed(lambda: header(layout, rank))
    keepers = None
    if is_in_memory:
        keepers = keepers_of(folder)
        agreed(lambda: make_room(folder, layout, rank, keepers))
    content = chain([memoryview(head)], staged(state.values(copies), engine.optimizer.device))
    # What training changes from here on is not saved.
    is_async = settings.is_async or is_in_memory
    tensors = Placed(content, folder) if is_in_memory else Snapshot(content) if is_async else Streamed(content)
    write = functools.partial(
        write_checkpoint,
        folder,
        tag or f"global_step{engine.global_steps}",
        tensors,
        (layout_file(worker), layout.to_json()) if groups.workers.index(worker) == rank else None,
        _meta(engine, state),
        engine.plan.to_json(),
        copy.deepcopy(
            {
                "client_state": dict(client_state or {}),
                "optimizer_groups": _group_options(engine),
                "optimizer_scalars": scalars,
                "lr_scheduler": engine.lr_scheduler.state_dict() if engine.lr_scheduler is not None else None,
                "loss_scaler": {
                    "class": type(engine.optimizer.loss_scaler).__name__,
                    "state": _plain(vars(engine.optimizer.loss_scaler)),
                },
            }
        ),
        {"random": random_state(), "apart": own},
        engine._checkpoint_locks,
        keepers=keepers,
        is_latest=is_latest,
        keep_last=1 if is_in_memory else settings.keep_last,
        keep_every=0 if is_in_memory else settings.keep_every,
    )
    if is_async:
        engine._checkpoint_writer.start(functools.partial(write, group=groups.for_checkpoints().handle))
    else:
        write()


def load_checkpoint(
    engine: Any, folder: Path, tag: str | None, *, with_optimizer: bool, with_scheduler: bool
) -> tuple[str | None, dict[str, Any] | None]:
    """Collective; see :meth:`SDPEngine.load_checkpoint`."""
    engine.wait_for_checkpoint()
    checkpoint = open_universal(folder, tag) or open_checkpoint(folder, tag, engine._owner_groups.subnetwork_index)
    if checkpoint is not None and checkpoint.damage and dist.get_rank() == 0:
        what = "; ".join(checkpoint.damage.values())
        logger.warning(
            f"checkpoint: {what}. Other owners' copies are read instead; random numbers of lost ranks are new"
        )
    if checkpoint is None:
        logger.warning(f"{folder} has no checkpoint: nothing is loaded")
        return None, None
    return take_checkpoint(engine, checkpoint, with_optimizer=with_optimizer, with_scheduler=with_scheduler)


def take_checkpoint(
    engine: Any, checkpoint: Checkpoint, *, with_optimizer: bool = True, with_scheduler: bool = True
) -> tuple[str, dict[str, Any]]:
    """Collective. Make what was saved the engine's; its path and the client state.

    Raises:
        CheckpointError: it does not fit; on every rank.
    """
    saved = checkpoint.state()
    if checkpoint.has_weights_only:
        with_optimizer = with_scheduler = False
    engine.optimizer.refresh.settle()
    engine.optimizer.zero_grad()
    if with_optimizer:
        # The subnetworks that were trained then: what a schedule says of that step.
        follow_schedule(engine, checkpoint.meta["global_steps"])
    state = _state_of(engine)
    keys = checkpoint.meta["optimizer_state"] if with_optimizer else []
    scalars: list[dict[str, Any]] = []
    if with_optimizer:
        found = saved["optimizer_scalars"]
        # DeepSpeed's universal format, and older checkpoints: of all groups alike.
        scalars = [found] * len(saved["optimizer_groups"]) if isinstance(found, dict) else found
        _check_optimizer(engine, checkpoint.meta["optimizer"], saved["optimizer_groups"], len(scalars))
        state.check(keys, scalars)
        for group, options in zip(engine.optimizer.param_groups, saved["optimizer_groups"], strict=True):
            _check_options(group, options, "optimizer_groups")
        _check_options(vars(engine.optimizer.loss_scaler), saved["loss_scaler"]["state"], "loss_scaler")
    has_random = with_optimizer and checkpoint.meta["world_size"] == dist.get_world_size()
    own = agreed(lambda: _checked_own(checkpoint)) if has_random else None
    generators = own and own["random"]
    if with_scheduler and saved["lr_scheduler"] is not None and engine.lr_scheduler is not None:
        _load_scheduler(engine.lr_scheduler, saved["lr_scheduler"])
    entries = state.to_read(keys)
    checkpoint.read(entries)
    _take_full_scale(engine, checkpoint, entries)
    if with_optimizer:
        state.take_state(scalars)
        for group, options in zip(engine.optimizer.param_groups, saved["optimizer_groups"], strict=True):
            _take_options(group, options)
        scaler = engine.optimizer.loss_scaler
        if saved["loss_scaler"]["class"] == type(scaler).__name__:
            vars(scaler).update(saved["loss_scaler"]["state"])
        for counter in _COUNTERS:
            setattr(engine, counter, checkpoint.meta[counter])
        if generators is not None:
            set_random_state(generators)
    engine.optimizer.spread()
    if engine._parts.outer is not None:
        engine.__dict__.update(_agreed_at=engine.global_steps, _is_agreeing=False)
        engine._parts.outer.begin()
        if with_optimizer:
            _take_own(engine, own)
    return str(checkpoint.path), saved["client_state"]


def _take_full_scale(engine: Any, checkpoint: Checkpoint, entries: Sequence[Entry]) -> None:
    """The full model stays what it was: a job that cannot have its scale beside the weights takes it into them."""
    subnetwork: Subnetwork = engine._subnetwork
    scale = float(checkpoint.meta.get(FULL_SCALE, 1.0))
    engine.full_scale = 1.0
    if scale == 1.0:
        return
    writes = writes_of(checkpoint.path, checkpoint.meta, copy.deepcopy(subnetwork.full.config))
    if subnetwork.is_louder and writes == subnetwork.writes:
        engine.full_scale = scale
        return
    for entry in entries:
        for run, values in entry.parts():
            if run.name in writes:
                values.mul_(factor_on(entry.kind, scale))


def _state_of(engine: Any) -> TrainingState:
    return TrainingState(engine._subnetwork, engine.optimizer, engine._owner_groups)


def _meta(engine: Any, state: TrainingState) -> dict[str, Any]:
    subnetwork = engine._subnetwork
    config = subnetwork.full.config
    return {
        **{counter: getattr(engine, counter) for counter in _COUNTERS},
        "world_size": dist.get_world_size(),
        "workers": engine._owner_groups.workers,
        "zero_stage": engine.zero_optimization_stage(),
        "dtype": str(next(iter(subnetwork.module.parameters())).dtype).removeprefix("torch."),
        "optimizer": type(engine.basic_optimizer).__name__,
        "optimizer_state": state.state_keys(),
        "plan_hash": engine.plan.hash,
        FULL_SCALE: engine.full_scale,
        "subnetwork_data_parallel": engine.sdp_config.written(),
        "model_class": subnetwork.full.model_class.__name__,
        "model_config": config.to_dict() if hasattr(config, "to_dict") else {},
        "versions": {
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
    }


def _group_options(engine: Any) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in group.items() if key not in ("params", GROUP_KEY)}
        for group in engine.optimizer.param_groups
    ]


def _check_optimizer(engine: Any, saved_name: str | None, saved: list[dict[str, Any]], scalars: int) -> None:
    name = type(engine.basic_optimizer).__name__
    if saved_name is not None and _method(name) != _method(saved_name):
        raise CheckpointError(
            f"checkpoint: has the state of {saved_name}; the optimizer is {name} (load_optimizer_states=False loads "
            "the weights alone)"
        )
    groups = engine.optimizer.param_groups
    if not len(groups) == len(saved) == scalars:
        raise CheckpointError(
            f"checkpoint: has {len(saved)} parameter groups; the optimizer has {len(groups)} (load_optimizer_states="
            "False loads the weights alone)"
        )


def _check_options(held: Mapping[str, Any], saved: Mapping[str, Any], name: str) -> None:
    """Whether numbers, and tuples of numbers, come where there are some."""
    for key, value in saved.items():
        mine = held.get(key)
        if isinstance(mine, _NUMBERS):
            is_like = isinstance(value, _NUMBERS)
        elif isinstance(mine, tuple | list) and mine and all(isinstance(number, _NUMBERS) for number in mine):
            is_like = isinstance(value, tuple | list) and len(value) == len(mine)
            is_like = is_like and all(isinstance(number, _NUMBERS) for number in value)
        else:
            is_like = True
        if not is_like and key not in _OF_IMPLEMENTATION:
            raise CheckpointError(f"checkpoint: {name}.{key}: got {value!r:.80}; takes something like {mine!r}")


def _load_scheduler(scheduler: Any, saved: dict[str, Any]) -> None:
    try:
        scheduler.load_state_dict(saved)
    except Exception as error:  # schedulers raise almost anything for the state of another one
        raise CheckpointError(
            f"checkpoint: lr_scheduler: {type(scheduler).__name__} does not take its state ({type(error).__name__}: "
            f"{error}); load_lr_scheduler_states=False loads the rest"
        ) from None


def _method(name: str) -> str:
    """What an optimizer does, whoever implements it: AdamW and FusedAdam remember the same."""
    return re.sub(r"^(deepspeedcpu|fused|paged)", "", name.lower()).replace("adamw", "adam").removesuffix("32bit")


def _take_options(group: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """What is saved of a group, where and as its optimizer holds it."""
    for key, value in saved.items():
        if isinstance(group.get(key), torch.Tensor):
            # The very tensor, which a compiled or captured step holds.
            group[key].fill_(float(value))
        elif key not in _OF_IMPLEMENTATION:
            group[key] = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, bool | int | float | str | type(None))}


def _own(engine: Any) -> dict[str, Any] | None:
    """Where workers train apart, what this rank alone knows: weights since owners agreed, and its moments."""
    outer = engine._parts.outer
    if outer is None:
        return None
    own = {
        "agreed_at": engine.agreed_at,
        "is_agreeing": engine._is_agreeing,
        "inner": own_state(engine.optimizer),
        "outer": outer.state(),
    }
    return _on_cpu(own)  # type: ignore[no-any-return]


def _take_own(engine: Any, own: dict[str, Any] | None) -> None:
    """Collective. Go on in the middle of a round, where every rank finds what it left in the same layout.

    Elsewhere a round begins, with the weights that owners would have agreed on and the moments of one of them.
    """
    apart = own and own.get("apart")
    if not all(gather_objects(apart is not None and fits_own(engine.optimizer, apart["inner"]), "resuming a round")):
        return
    assert apart
    take_own_state(engine.optimizer, apart["inner"])
    engine._parts.outer.take(apart["outer"])
    engine.__dict__.update(_agreed_at=apart["agreed_at"], _is_agreeing=apart["is_agreeing"])


def _on_cpu(value: Any) -> Any:
    """A copy of nested containers with their tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value


def _checked_own(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What this rank saved for itself, ``None`` where it is lost.

    Raises:
        CheckpointError: they are not what generators take.
    """
    own = checkpoint.rank_state(dist.get_rank())
    if own is None:
        return None
    before = random_state()
    try:
        set_random_state(own["random"])
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"checkpoint: {checkpoint.path}: random numbers are refused: {what}") from None
    finally:
        set_random_state(before)
    return own
