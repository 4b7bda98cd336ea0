"""What the extension relies on inside DeepSpeed, in one place, and the check that it is still there.

Everything below is private to DeepSpeed or only implied by its code. ``contract_violations`` is run by a test and, in
its cheap form, before the first engine is built: a new DeepSpeed release must fail here, in words, and not in a hang.
"""

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import deepspeed
import deepspeed.utils.tensor_fragment
from deepspeed.monitor.monitor import Monitor, MonitorMaster
from deepspeed.runtime import utils as runtime_utils
from deepspeed.runtime.base_optimizer import BackwardHookStateManager, ZeROOptimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.fp16 import loss_scaler
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.partition_parameters import GatheredParameters, Init
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

# The module; ``deepspeed.utils`` has a class of this name.
tensor_fragment = sys.modules["deepspeed.utils.tensor_fragment"]

TESTED_DEEPSPEED = "0.19.8"

# Methods and properties that SDPEngine overrides or uses, with the parameters it passes.
_ENGINE_NAMES = (
    "_backward_epilogue", "_backward_prologue", "_broadcast_model", "allreduce_gradients", "backward",
    "clip_fp32_gradients", "coalesce_grad_reduction", "destroy", "dynamic_loss_scale", "dynamic_loss_scale_args",
    "forward", "fp16_enabled", "get_data_types", "get_global_grad_norm", "gradient_accumulation_steps",
    "gradient_clipping", "is_gradient_accumulation_boundary", "loss_scale", "managed_gradient_accumulation",
    "offload_states", "reload_states", "zero_grad", "zero_optimization", "zero_optimization_partition_gradients",
    "zero_optimization_partition_weights", "zero_optimization_stage",
)  # fmt: skip
ENGINE_METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_ENGINE_NAMES, ()),
    "__init__": ("args", "model", "optimizer", "model_parameters", "lr_scheduler", "config", "config_class"),
    "_configure_basic_optimizer": ("model_parameters",),
    "_configure_optimizer": ("client_optimizer", "model_parameters"),
    "_configure_zero_optimizer": ("optimizer",),
    "_do_optimizer_sanity_check": ("basic_optimizer",),
    "load_checkpoint": ("load_dir",),
    "save_16bit_model": ("save_dir",),
    "save_checkpoint": ("save_dir",),
    "step": ("lr_kwargs",),
}

# Methods and properties of the base class of ZeRO's optimizers that SDPOptimizer overrides or uses.
_OPTIMIZER_NAMES = (
    "__init__", "_backward_active_depth", "_epilogue_ran_this_backward", "_max_expected_hooks_seen",
    "clear_backward_seen_flag", "enter_backward", "exit_backward", "is_gradient_accumulation_boundary",
    "needs_scaler", "reenter_backward_if_needed", "should_refresh_expected_hook_count",
)  # fmt: skip
OPTIMIZER_METHODS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_OPTIMIZER_NAMES, ()),
    "scale_if_loss": ("value",),
    "set_gradient_accumulation_boundary": ("is_boundary",),
    "update_hook_state_and_maybe_run_epilogue": ("current_expected_count",),
}

# The same of other classes, and functions of modules.
METHODS: dict[Any, dict[str, tuple[str, ...]]] = {
    DeepSpeedEngine: ENGINE_METHODS,
    ZeROOptimizer: OPTIMIZER_METHODS,
    Monitor: {"write_events": ("event_list",)},
    loss_scaler: {"CreateLossScaler": ("dtype", "static_loss_scale", "dynamic_scaling", "dynamic_loss_args")},
    loss_scaler.LossScalerBase: {"update_scale": ("overflow",)},
    runtime_utils: {"count_used_parameters_in_backward": ("parameters",)},
    GatheredParameters: {
        "__init__": ("params", "modifier_rank", "fwd_module", "enabled"),
        "__enter__": (),
        "__exit__": (),
    },
}

ZERO_CONFIG_FIELDS = ("prefetch_bucket_size", "offload_param", "offload_optimizer")

# Names that must appear in the source of a method: attributes that are set or read there.
SOURCE_MARKS: dict[tuple[Any, str], tuple[str, ...]] = {
    (GatheredParameters, "__init__"): ("self.enabled = enabled",),
    (tensor_fragment, "safe_get_full_fp32_param"): ("'ds_id'", "param._z3_optimizer.get_full_hp_param(param)"),
    (tensor_fragment, "safe_set_full_fp32_param"): ("param._z3_optimizer.set_full_hp_param(value, param)",),
    (tensor_fragment, "safe_get_full_optimizer_state"): ("get_full_hp_param(param, optim_state_key)",),
    (tensor_fragment, "safe_set_full_optimizer_state"): ("set_full_hp_param(value, param, optim_state_key)",),
    (tensor_fragment, "safe_get_full_grad"): ("param._z3_optimizer.get_fp32_grad_for_param(param)",),
    (tensor_fragment, "safe_set_full_grad"): ("param._z3_optimizer.set_fp32_grad_for_param(value, param)",),
    (tensor_fragment, "safe_get_local_grad"): ("get_local_fp32_grad_for_param(param)",),
    (tensor_fragment, "safe_set_local_grad"): ("set_local_grad_for_param(value, param)",),
    (tensor_fragment, "safe_get_local_fp32_param"): ("get_local_fp32_param(param)",),
    (tensor_fragment, "safe_set_local_fp32_param"): ("set_local_hp_param(value, param)",),
    (tensor_fragment, "safe_get_local_optimizer_state"): ("get_local_fp32_param(param, optim_state_key)",),
    (tensor_fragment, "safe_set_local_optimizer_state"): ("set_local_hp_param(value, param, optim_state_key)",),
    (tensor_fragment, "safe_update_full_grad_vectorized"): ("update_fp32_grad_for_param_vectorized(",),
    (ZeROOptimizer, "__init__"): ("self._backward_hook_state = ", "self._is_gradient_accumulation_boundary"),
    (BackwardHookStateManager, "__init__"): (
        "self.post_backward_callback_graph_task_id = ",
        "self.post_backward_callback_queued = ",
    ),
    (ZeROOptimizer, "needs_scaler"): (
        "self.custom_loss_scaler",
        "self.torch_autocast_gradscaler",
        "self.dynamic_loss_scale",
    ),
    (ZeROOptimizer, "scale_if_loss"): ("self.external_loss_scale", "self.loss_scaler.scale_loss(value)"),
    (DeepSpeedEngine, "__init__"): (
        "self._config = ",
        "self.basic_optimizer = ",
        "self.enable_backward_allreduce = ",
        "self.global_samples = ",
        "self.global_steps = ",
        "self.inside_no_sync_ctxt = ",
        "self.lr_scheduler = ",
        "self.micro_steps = ",
        "self.module_forward_post_hook = ",
        "self.module_forward_pre_hook = ",
        "self.monitor = ",
        "self.optimizer = ",
        "self.skipped_steps = ",
    ),
    (DeepSpeedEngine, "_set_distributed_vars"): ("self.device = ", "self.global_rank = "),
    (DeepSpeedEngine, "_set_client_model"): ("self.__dict__['module'] = ",),
    (DeepSpeedEngine, "_configure_optimizer"): (
        "self._configure_basic_optimizer(model_parameters)",
        "client_optimizer(model_parameters)",
        "basic_optimizer.param_groups[:] = ",
        "self._do_optimizer_sanity_check(basic_optimizer)",
        "optimizer_wrapper == ZERO_OPTIMIZATION",
        "self._configure_zero_optimizer(basic_optimizer)",
    ),
    (DeepSpeedEngine, "_backward_epilogue"): ("self.allreduce_gradients()", "self.inside_no_sync_ctxt"),
    (DeepSpeedEngine, "_configure_distributed_model"): ("self._broadcast_model()", "self.seq_data_parallel_group"),
    (DeepSpeedEngine, "_take_model_step"): (
        "self.clip_fp32_gradients()",
        "self.optimizer._global_grad_norm",
        "self.optimizer.overflow",
    ),
    (DeepSpeedEngine, "step"): ("self.optimizer.finalize_gradient_accumulation_boundary()",),
    (DeepSpeedConfig, "__init__"): ("self._param_dict = ",),
    (DeepSpeedConfig, "_initialize_params"): ("self.communication_data_type = ", "self.zero_config = "),
    (MonitorMaster, "__init__"): ("self.enabled = ",),
    (loss_scaler.LossScalerBase, "__init__"): ("self.cur_scale = ", "self.dynamic = "),
    # Looked for with a default: without them bytes of DeepSpeed's own optimizers would not be counted, and its sharded
    # parameters not be recognised.
    (DeepSpeedZeroOptimizer, "__init__"): ("self.averaged_gradients = ", "param.grad_accum = "),
    (DeepSpeedZeroOptimizer_Stage3, "__init__"): ("self.averaged_gradients = ", "self.fp32_partitioned_groups_flat = "),
    (Init, "_convert_to_deepspeed_param"): ("param.ds_id = ", "param.ds_tensor = "),
}


def contract_violations() -> list[str]:
    """Every way in which the installed DeepSpeed differs from what this package builds on; empty if it fits."""
    problems = [problem for owner, methods in METHODS.items() for problem in _missing_methods(owner, methods)]
    for (owner, method), marks in SOURCE_MARKS.items():
        found = _defined(owner, method)
        if found is None:
            problems.append(f"{owner.__name__}.{method} is gone")
            continue
        source = inspect.getsource(found)
        problems += [f"{owner.__name__}.{method} no longer says {mark!r}" for mark in marks if mark not in source]
    fields = DeepSpeedZeroConfig.model_fields
    problems += [f"zero_optimization.{field} is gone" for field in ZERO_CONFIG_FIELDS if field not in fields]
    if getattr(deepspeed, "DeepSpeedEngine", None) is not DeepSpeedEngine:
        problems.append("deepspeed.DeepSpeedEngine is not deepspeed.runtime.engine.DeepSpeedEngine")
    if "engine = DeepSpeedEngine(args=args," not in inspect.getsource(deepspeed.initialize):
        problems.append("deepspeed.initialize no longer builds the global DeepSpeedEngine")
    return problems


def _missing_methods(owner: Any, methods: dict[str, tuple[str, ...]]) -> Iterable[str]:
    for name, parameters in methods.items():
        method = _defined(owner, name)
        if method is None:
            yield f"{owner.__name__}.{name} is gone"
            continue
        known = inspect.signature(method).parameters if parameters else {}
        for parameter in parameters:
            if parameter not in known:
                yield f"{owner.__name__}.{name} takes no {parameter!r}"


def _defined(owner: Any, name: str) -> Any:
    """What DeepSpeed itself defines in a class or module; ``None`` for what torch or Python has under this name."""
    for place in getattr(owner, "__mro__", (owner,)):
        if getattr(place, "__module__", owner.__name__).startswith("deepspeed.") and name in vars(place):
            return vars(place)[name]
    return None
