"""What the extension relies on inside DeepSpeed, in one place, and the check that it is still there.

Everything below is private to DeepSpeed or only implied by its code. ``contract_violations`` is run by a test and, in
its cheap form, before the first engine is built: a new DeepSpeed release must fail here, in words, and not in a hang.
"""

import inspect
from collections.abc import Iterable

import deepspeed
from deepspeed.runtime import utils as ds_utils
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

TESTED_DEEPSPEED = "0.19.8"

# Methods that SDPEngine overrides or calls, with the parameters it passes.
ENGINE_METHODS: dict[str, tuple[str, ...]] = {
    "__init__": ("args", "model", "optimizer", "model_parameters", "lr_scheduler", "config", "config_class"),
    "_broadcast_model": (),
    "_do_optimizer_sanity_check": ("basic_optimizer",),
    "_configure_basic_optimizer": ("model_parameters",),
    "_configure_zero_optimizer": ("optimizer",),
    "_configure_optimizer": ("client_optimizer", "model_parameters"),
    "forward": (),
    "backward": (),
    "step": ("lr_kwargs",),
    "_backward_prologue": (),
    "_backward_epilogue": (),
    "allreduce_gradients": (),
    "clip_fp32_gradients": (),
    "zero_grad": (),
    "coalesce_grad_reduction": (),
    "is_gradient_accumulation_boundary": (),
    "zero_optimization_partition_gradients": (),
    "save_checkpoint": ("save_dir",),
    "load_checkpoint": ("load_dir",),
    "save_16bit_model": ("save_dir",),
    "destroy": (),
}

# Methods of the ZeRO-1/2 optimizer that SDPZeroOptimizer overrides or calls.
OPTIMIZER_METHODS: dict[str, tuple[str, ...]] = {
    "__init__": (
        "init_optimizer",
        "param_names",
        "timers",
        "optimizer_params",
        "dp_process_group",
        "expert_parallel_group",
        "expert_data_parallel_group",
        "partition_grads",
        "has_moe_layers",
        "clip_grad",
        "reduce_bucket_size",
        "gradient_accumulation_dtype",
        "communication_data_type",
        "check_grad_overflow",
    ),
    "_configure_moe_settings": (),
    "initialize_optimizer_states": (),
    "process_gradients": ("param", "i"),
    "reduce_gradients": ("pipeline_parallel",),
    "overlapping_partition_gradients_reduce_epilogue": (),
    "scaled_global_norm": ("norm_type",),
    "step": ("closure",),
    "get_gradient_for_reduction": ("param",),
    "clear_grad_attribute": ("param",),
    "_fill_param_grad_accum_attribute": ("param",),
    "_use_compact_grad_partition_buffer": ("group_idx",),
    "_get_compact_grad_partition_buffer": ("group_idx",),
    "_get_preflattened_grad_partition": ("group_idx",),
    "set_gradient_accumulation_boundary": ("is_boundary",),
    "get_param_id": ("param",),
}

# Names that must appear in the source of a method: attributes that are set or read there.
SOURCE_MARKS: dict[tuple[type, str], tuple[str, ...]] = {
    (DeepSpeedZeroOptimizer, "__init__"): (
        "self.real_dp_process_group = ",
        "self.partition_count = ",
        "if self.has_moe_layers:",
        "self._configure_moe_settings()",
        "self.initialize_optimizer_states()",
        "self.bit16_groups_flat",
        "self.parallel_partitioned_bit16_groups",
        "self.single_partition_of_fp32_groups",
        "self.partition_size",
        "self.use_grad_accum_attribute",
        "self.create_gradient_handling_hooks()",
    ),
    (DeepSpeedZeroOptimizer, "initialize_gradient_partition"): (
        "self.grad_start_offset",
        "self.grad_partition_insertion_offset",
    ),
    (DeepSpeedZeroOptimizer, "create_gradient_handling_hooks"): ("self.process_gradients(param, i)",),
    (DeepSpeedZeroOptimizer, "step"): (
        "self.scaled_global_norm()",
        "self._get_preflattened_grad_partition(i)",
        "self.averaged_gradients[i] = None",
        "all_gather_dp_groups(",
        "dp_process_group=self.real_dp_process_group",
    ),
    (DeepSpeedEngine, "_configure_optimizer"): (
        "self._configure_basic_optimizer(model_parameters)",
        "self._do_optimizer_sanity_check(basic_optimizer)",
        "optimizer_wrapper == ZERO_OPTIMIZATION",
        "self._configure_zero_optimizer(basic_optimizer)",
    ),
    (DeepSpeedEngine, "_backward_epilogue"): ("self.allreduce_gradients()", "self.inside_no_sync_ctxt"),
    (DeepSpeedEngine, "_configure_distributed_model"): ("self._broadcast_model()", "self.seq_data_parallel_group"),
    (DeepSpeedEngine, "_take_model_step"): ("self.clip_fp32_gradients()", "self.optimizer._global_grad_norm"),
}


def contract_violations() -> list[str]:
    """Every way in which the installed DeepSpeed differs from what this package builds on; empty if it fits."""
    problems = list(_missing_methods(DeepSpeedEngine, ENGINE_METHODS))
    problems += _missing_methods(DeepSpeedZeroOptimizer, OPTIMIZER_METHODS)
    for (owner, method), marks in SOURCE_MARKS.items():
        if not hasattr(owner, method):
            problems.append(f"{owner.__name__}.{method} is gone")
            continue
        source = inspect.getsource(getattr(owner, method))
        problems += [f"{owner.__name__}.{method} no longer says {mark!r}" for mark in marks if mark not in source]
    if not issubclass(DeepSpeedZeroOptimizer, ZeROOptimizer):
        problems.append("DeepSpeedZeroOptimizer is no ZeROOptimizer")
    if getattr(deepspeed, "DeepSpeedEngine", None) is not DeepSpeedEngine:
        problems.append("deepspeed.DeepSpeedEngine is not deepspeed.runtime.engine.DeepSpeedEngine")
    if "engine = DeepSpeedEngine(args=args," not in inspect.getsource(deepspeed.initialize):
        problems.append("deepspeed.initialize no longer builds the global DeepSpeedEngine")
    if stage_1_and_2.all_gather_dp_groups is not ds_utils.all_gather_dp_groups:
        problems.append("stage_1_and_2.all_gather_dp_groups is not deepspeed.runtime.utils.all_gather_dp_groups")
    return problems


def _missing_methods(owner: type, methods: dict[str, tuple[str, ...]]) -> Iterable[str]:
    for name, parameters in methods.items():
        method = getattr(owner, name, None)
        if method is None:
            yield f"{owner.__name__}.{name} is gone"
            continue
        known = inspect.signature(method).parameters
        for parameter in parameters:
            if parameter not in known:
                yield f"{owner.__name__}.{name} takes no {parameter!r}"
