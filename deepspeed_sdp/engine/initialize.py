"""``deepspeed_sdp.initialize``: ``deepspeed.initialize`` for a subnetwork."""

import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn

from deepspeed_sdp.adapters import Adapter, find_adapter
from deepspeed_sdp.adapters.claims import claims_digest
from deepspeed_sdp.agreement import agree, agreed, from_first_rank
from deepspeed_sdp.config import BLOCK, SDPConfig, SDPSource, read_json, split_block
from deepspeed_sdp.engine.comm.description import (
    describe_module,
    describe_optimizer,
    describe_options,
    describe_scheduler,
    digest,
)
from deepspeed_sdp.engine.comm.mesh import OwnerGroups
from deepspeed_sdp.engine.deepspeed.contract import TESTED_DEEPSPEED, contract_violations
from deepspeed_sdp.engine.deepspeed.param_groups import as_groups, describe_groups, translate_optimizer
from deepspeed_sdp.engine.deepspeed.refusals import check_apart, check_batch_sizes, check_supported, zero_stage
from deepspeed_sdp.engine.deepspeed.start import say_world_of_one, start_communication
from deepspeed_sdp.engine.engine import SDPEngine
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.failures import report_uncaught
from deepspeed_sdp.patches import patched
from deepspeed_sdp.plan import SubnetworkPlan, place_workers
from deepspeed_sdp.subnetwork import (
    ClientMap,
    Subnetwork,
    check_as_configured,
    cut_model,
    is_meta,
    kinds_of,
    materialize,
    plan_for,
    unit_spaces,
)


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: Mapping[str, Any] | str | Path | None = None,
    mesh_param: Any = None,
    config_params: Mapping[str, Any] | str | Path | None = None,
    sdp_config: SDPSource | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Build the engine of this rank's subnetwork. Mirrors ``deepspeed.initialize``, collective like it.

    Args:
        model: the full model, cut in place to this rank's subnetwork; or one made on the meta device, of which only the
            subnetwork is ever given memory, with initial values drawn unit by unit from ``seed``.
        optimizer, model_parameters, lr_scheduler: as in DeepSpeed, with parameters (or groups) of the full model.
        sdp_config: the SDP block, as a dict, a path to a JSON file or an :class:`SDPConfig`; without it the block
            ``"subnetwork_data_parallel"`` of the DeepSpeed config counts (or ``args.sdp_config``).

    The other arguments are DeepSpeed's. With ``"enabled": false`` this is ``deepspeed.initialize``.

    Returns:
        ``engine, optimizer, training_dataloader, lr_scheduler``; the engine is an :class:`SDPEngine`.

    Raises:
        ConfigError: an invalid block, something DeepSpeed offers that SDP cannot, or ranks that differ.
        ModelError: no adapter knows the model.
        PlanError: no plan exists for these numbers.
    """
    report_uncaught()
    start_communication(distributed_port, dist_init_required)
    model_parameters = list(model_parameters) if model_parameters is not None else None
    client = _Client(optimizer, model_parameters, lr_scheduler, mpu)
    job = _agree_on_job(lambda: model, args, config if config is not None else config_params, sdp_config, client)
    if not job.sdp.enabled and model is not None and is_meta(model):
        raise ConfigError("subnetwork_data_parallel.enabled: got false; takes true for a model on the meta device")
    with _building_subnetworks(job, optimizer) if job.sdp.enabled else nullcontext():
        return deepspeed.initialize(  # type: ignore[no-any-return]
            args=job.args,
            model=model,
            optimizer=optimizer,
            model_parameters=model_parameters,
            training_data=training_data,
            lr_scheduler=lr_scheduler,
            distributed_port=distributed_port,
            mpu=mpu,
            dist_init_required=dist_init_required,
            collate_fn=collate_fn,
            config=job.ds_config,
            mesh_param=mesh_param,
        )


@contextmanager
def _building_subnetworks(job: "_Job", optimizer: Any) -> Iterator[None]:
    """Collective. Cut the model; inside, ``deepspeed.initialize`` builds the engine of what is left."""
    if dist.get_world_size() == 1:
        say_world_of_one()
    _check_deepspeed()
    on_meta, client_map = is_meta(job.model), ClientMap(job.model)
    # Held until the client's references are translated, so that no new parameter takes over the id of an old one.
    before_cut = list(job.model.parameters())
    subnetwork = agreed(lambda: _cut(job, optimizer, client_map))
    del before_cut
    groups = OwnerGroups(job.plan.owner_sets, job.workers, job.ranks_per_node)
    build_engine = functools.partial(
        SDPEngine,
        sdp_config=job.sdp,
        subnetwork=subnetwork,
        groups=groups,
        client=client_map,
        agreed_weights=on_meta,
    )
    try:
        with patched(deepspeed, "DeepSpeedEngine", build_engine):
            yield
    except BaseException:
        # There may be no engine yet to do so.
        groups.destroy()
        raise


def check_job(
    build_model: Callable[[], nn.Module], args: Any = None, config: Any = None, sdp_config: SDPSource | None = None
) -> SDPConfig:
    """Collective. Everything that :func:`initialize` can find wrong, found before anything expensive is done.

    Args:
        build_model: makes the full model, best on the meta device; an SDPError it raises counts as found.

    Returns:
        the validated SDP block.

    Raises:
        ConfigError, ModelError, PlanError: see :func:`initialize`; the same on every rank.
    """
    return _agree_on_job(build_model, args, config, sdp_config, _Client()).sdp


def _agree_on_job(
    build_model: Callable[[], nn.Module | None], args: Any, config: Any, sdp_config: Any, client: "_Client"
) -> "_Job":
    job = _Job()

    def describe() -> Mapping[str, Any]:
        job.read(args, config, sdp_config)
        model = build_model()
        units = {}
        if job.sdp.enabled:
            check_supported(job.ds_config, job.sdp, model, client.optimizer, client.mpu)
            check_batch_sizes(job.ds_config, dist.get_world_size())
            stage = zero_stage(job.ds_config)
            check_apart(stage, job.sdp, dist.get_world_size() // job.sdp.subnetworks(dist.get_world_size()))
            # Every stage has a plan.
            for coverage, _ in job.sdp.schedule.stages():
                job.sdp.schedule.coverage_at(0)
                job.sdp.model_copy(update={"coverage": coverage}).owners(job.sdp.subnetworks(dist.get_world_size()))
            assert model is not None
            adapter = find_adapter(model)
            check_as_configured(model)
            job.model = model
            units = _describe_units(job, adapter)
        return {**_describe(job, model), **units, **client.describe(model)}

    agree(describe)
    if job.sdp.enabled:
        job.plan, job.workers, job.ranks_per_node = from_first_rank(lambda: _plan(job))
        agree(lambda: {"plan_hash": job.plan.hash, "subnetwork_of_ranks": job.workers})
    return job


def _plan(job: "_Job") -> tuple[SubnetworkPlan, tuple[int, ...], int]:
    plan = plan_for(job.model, job.sdp, dist.get_world_size(), dist.get_backend())
    check_copies(job.sdp, plan)
    ranks_per_node = _ranks_per_node()
    return plan, place_workers(plan, dist.get_world_size(), ranks_per_node, job.sdp.plan.rank_order), ranks_per_node


@dataclass(frozen=True)
class _Client:
    """What the caller built before; ranks must have built the same."""

    optimizer: Any = None
    model_parameters: list[Any] | None = None
    lr_scheduler: Any = None
    mpu: Any = None

    def describe(self, model: nn.Module | None) -> dict[str, Any]:
        if model is None:
            return {}
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        described = {
            "parameters": describe_module(model),
            "trainable": _summary([trainable]),
            **describe_optimizer(self.optimizer),
            **describe_scheduler(self.lr_scheduler),
        }
        if isinstance(self.optimizer, torch.optim.Optimizer):
            described["optimizer.param_groups"] = _summary(describe_groups(self.optimizer.param_groups, model))
        if self.model_parameters is not None:
            groups = as_groups(self.model_parameters)
            described["model_parameters"] = _summary(describe_groups(groups, model))
            described.update(describe_options(groups, "model_parameters"))
        return described


def _summary(groups: list[list[str]]) -> str:
    """Sizes and a digest: the lists are as long as the model."""
    return f"{', '.join(str(len(group)) for group in groups)} parameters ({digest(groups)})"


class _Job:
    """What the arguments of one call amount to; where SDP is not enabled, without model and plan."""

    args: Any
    ds_config: dict[str, Any]
    sdp: SDPConfig
    model: nn.Module
    plan: SubnetworkPlan
    workers: tuple[int, ...]
    ranks_per_node: int

    def read(self, args: Any, config: Any, sdp_config: Any) -> None:
        if config is None:
            config = getattr(args, "deepspeed_config", None)
        if config is None:
            raise ConfigError("config: got nothing; takes a DeepSpeed config as a dict or a path (--deepspeed_config)")
        self.ds_config = dict(config) if isinstance(config, Mapping) else read_json(config, "deepspeed_config")
        sdp_config = sdp_config if sdp_config is not None else getattr(args, "sdp_config", None)
        self.sdp = split_block(self.ds_config, sdp_config)
        self.args = copy.copy(args)
        if hasattr(self.args, "deepspeed_config"):
            self.args.deepspeed_config = None


def check_copies(sdp: SDPConfig, plan: SubnetworkPlan) -> None:
    """Whether every unit has owners enough to write all copies of a checkpoint.

    Raises:
        ConfigError: it has not.
    """
    fewest = min(map(len, plan.owner_sets))
    if sdp.checkpoint.copies > fewest:
        raise ConfigError(
            f"{BLOCK}.checkpoint.copies: got {sdp.checkpoint.copies} with {fewest} owners per unit; takes 1 to {fewest}"
        )


def _describe(job: _Job, model: nn.Module | None) -> dict[str, Any]:
    model_config: Any = getattr(model, "config", None)
    return {
        "deepspeed_config": job.ds_config,
        "subnetwork_data_parallel": job.sdp.written(),
        "model": type(model).__name__,
        "model_config": model_config.to_dict() if hasattr(model_config, "to_dict") else {},
        "model_on_meta_device": model is not None and is_meta(model),
        "versions": {"torch": torch.__version__, "deepspeed": deepspeed.__version__},
    }


def _describe_units(job: _Job, adapter: Adapter) -> dict[str, Any]:
    """What the plan is made of besides the configuration: rank 0's plan is all ranks' then."""
    block = job.sdp.block_unit
    units = unit_spaces(job.model, job.sdp, adapter)
    described: dict[str, Any] = {
        "adapter": claims_digest(
            job.model, adapter, kinds_of(job.sdp, adapter), block, adapter.task.size(job.sdp.plan.seq_length)
        ),
        "units": f"{len(units)} spaces ({digest(units)})",
    }
    if job.sdp.plan.rank_order.startswith("owners"):
        described["ranks_per_node"] = _ranks_per_node()
    return described


def _ranks_per_node() -> int:
    # torchrun's name, then the DeepSpeed launcher's.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or dist.get_world_size())


@functools.cache
def _check_deepspeed() -> None:
    problems = contract_violations()
    if problems:
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} differs from what this version builds on ({TESTED_DEEPSPEED}): "
            + "; ".join(problems)
        )


def _cut(job: _Job, optimizer: Any, client_map: ClientMap) -> Subnetwork:
    on_meta = is_meta(job.model)
    subnetwork = cut_model(
        job.model,
        job.plan,
        job.workers[dist.get_rank()],
        masking=job.sdp.masking,
        output_scaling=job.sdp.output_scaling,
        block_unit=job.sdp.block_unit,
        recompute_frozen=job.sdp.backward.recompute_frozen,
        client=client_map,
    )
    if on_meta:
        materialize(subnetwork, get_accelerator().current_device_name(), job.sdp.plan.seed, client_map)
    if isinstance(optimizer, torch.optim.Optimizer):
        translate_optimizer(optimizer, subnetwork, client_map)
    return subnetwork
