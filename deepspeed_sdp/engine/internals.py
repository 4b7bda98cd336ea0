"""What the extension relies on inside DeepSpeed, in one place, and the check that it is still there.

Everything below is private to DeepSpeed or only implied by its code. ``contract_violations`` is run by a test and, in
its cheap form, before the first engine is built: a new DeepSpeed release must fail here, in words, and not in a hang.
"""

import inspect
from collections.abc import Iterable

import deepspeed
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

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
    "zero_optimization_partition_weights": (),
    "get_data_types": (),
    "loss_scale": (),
    "dynamic_loss_scale": (),
    "dynamic_loss_scale_args": (),
    "save_checkpoint": ("save_dir",),
    "load_checkpoint": ("load_dir",),
    "save_16bit_model": ("save_dir",),
    "offload_states": (),
    "reload_states": (),
    "managed_gradient_accumulation": (),
    "destroy": (),
}

# Methods of the base class of ZeRO's optimizers that SDPOptimizer overrides or calls.
OPTIMIZER_METHODS: dict[str, tuple[str, ...]] = {
    "__init__": (),
    "is_gradient_accumulation_boundary": (),
    "set_gradient_accumulation_boundary": ("is_boundary",),
    "should_refresh_expected_hook_count": (),
    "reenter_backward_if_needed": (),
    "update_hook_state_and_maybe_run_epilogue": ("current_expected_count",),
    "needs_scaler": (),
    "scale_if_loss": ("value",),
    "enter_backward": (),
    "exit_backward": (),
    "clear_backward_seen_flag": (),
}

# Names that must appear in the source of a method: attributes that are set or read there.
SOURCE_MARKS: dict[tuple[type, str], tuple[str, ...]] = {
    (ZeROOptimizer, "__init__"): ("self._backward_hook_state", "self._is_gradient_accumulation_boundary"),
    (ZeROOptimizer, "needs_scaler"): (
        "self.custom_loss_scaler",
        "self.torch_autocast_gradscaler",
        "self.dynamic_loss_scale",
    ),
    (ZeROOptimizer, "scale_if_loss"): ("self.external_loss_scale", "self.loss_scaler.scale_loss(value)"),
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
}


def contract_violations() -> list[str]:
    """Every way in which the installed DeepSpeed differs from what this package builds on; empty if it fits."""
    problems = list(_missing_methods(DeepSpeedEngine, ENGINE_METHODS))
    problems += _missing_methods(ZeROOptimizer, OPTIMIZER_METHODS)
    for (owner, method), marks in SOURCE_MARKS.items():
        if not hasattr(owner, method):
            problems.append(f"{owner.__name__}.{method} is gone")
            continue
        source = inspect.getsource(getattr(owner, method))
        problems += [f"{owner.__name__}.{method} no longer says {mark!r}" for mark in marks if mark not in source]
    if getattr(deepspeed, "DeepSpeedEngine", None) is not DeepSpeedEngine:
        problems.append("deepspeed.DeepSpeedEngine is not deepspeed.runtime.engine.DeepSpeedEngine")
    if "engine = DeepSpeedEngine(args=args," not in inspect.getsource(deepspeed.initialize):
        problems.append("deepspeed.initialize no longer builds the global DeepSpeedEngine")
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
