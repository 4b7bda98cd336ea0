"""What of DeepSpeed cannot be combined with SDP, refused at start and in words."""

from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.pipe import PipelineModule

from deepspeed_sdp.config import BLOCK, SDPConfig
from deepspeed_sdp.errors import ConfigError, ModelError

# (key of the DeepSpeed config, values that are fine, first of all the default, why the rest is not).
_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("zero_optimization.stage", (0, 1, 2, 3), "takes 0, 1, 2 or 3"),
    ("zero_optimization.offload_optimizer.device", ("none", None, "cpu"), 'takes "cpu" or "none"'),
    ("zero_optimization.offload_param.device", ("none", None, "cpu"), 'takes "cpu" or "none"'),
    ("zero_optimization.cpu_offload", (False, None), 'takes "offload_optimizer": {"device": "cpu"}'),
    ("zero_optimization.round_robin_gradients", (False,), "gradients are reduced in the order of the plan"),
    ("zero_optimization.zero_quantized_gradients", (False,), "quantised reduction has no owner groups"),
    ("zero_optimization.zero_quantized_weights", (False,), "weights travel in the dtype they are trained in"),
    (
        "zero_optimization.zero_quantized_nontrainable_weights",
        (False,),
        "weights travel in the dtype they are trained in",
    ),
    ("zero_optimization.zero_hpz_partition_size", (1,), "shards lie on the owners; takes 1"),
    ("zero_optimization.mics_shard_size", (-1,), "shards lie on the owners; takes -1"),
    ("zero_optimization.offload_optimizer.ratio", (1, 1.0), "all of the state is offloaded or none"),
    ("zero_optimization.zenflow", (None,), "ZenFlow replaces the optimizer that SDP extends"),
    ("fp16.fp16_master_weights_and_grads", (False,), "master weights are fp32"),
    ("fp16.auto_cast", (False, None), "weights and activations are of one dtype"),
    ("amp.enabled", (False,), "takes bf16, fp16 or fp32"),
    ("torch_autocast.enabled", (False,), "takes bf16, fp16 or fp32"),
    ("bf16.bf16_master_weights_and_grads", (False,), "master weights are fp32"),
    ("bf16.bf16_optimizer_states", (False,), "optimizer states are fp32"),
    ("sparse_gradients", (False,), "sparse gradients are not reduced over owners"),
    ("prescale_gradients", (False,), "gradients are divided by the number of owners"),
    ("gradient_predivide_factor", (1, 1.0), "gradients are divided by the number of owners"),
    ("gradient_allreduce_op", ("mean",), "gradients are averaged over owners"),
    ("tensor_parallel.autotp_size", (0, 1), "tensor parallelism cannot be combined with SDP"),
    ("sequence_parallel_size", (1,), "sequence parallelism cannot be combined with SDP"),
    ("expert_parallel.enabled", (False,), "expert parallelism cannot be combined with SDP"),
    ("hybrid_engine.enabled", (False,), "the hybrid engine replaces the engine that SDP extends"),
    ("compile.deepcompile", (False,), "DeepCompile replaces the gradient path that SDP extends"),
)


# Refused by name before anything is built; what other optimizers do is tried (engine/zero/behaviour.py).
_NEED_WHOLE_WEIGHTS = ("muon", "lamb", "lars", "adafactor", "shampoo", "lbfgs", "muadam", "musgd")
_COMMUNICATE_THEMSELVES = ("onebit", "zeroone")
_OF_DEEPSPEED = ("Adam", "AdamW", "Adagrad", "Lion")


def check_stage(stage: int, sdp: SDPConfig) -> None:
    """Refuse what no engine does at a ZeRO stage; ``estimate`` estimates none either.

    Raises:
        ConfigError: names the key, what it got and what it takes.
    """
    if sdp.comm.transport == "all_to_all" and stage == 0:
        raise ConfigError(
            f'{BLOCK}.comm.transport: got "all_to_all" with ZeRO stage 0; takes "auto" or "owner_sets" there, where '
            "every owner needs the whole average"
        )
    if stage == 3 and sdp.masking == "backward":
        raise ConfigError(
            f'{BLOCK}.masking: got "backward" with ZeRO stage 3; takes stage 0, 1 or 2, as every rank computes with '
            'the whole model, or masking "forward"'
        )


def check_apart(stage: int, sdp: SDPConfig, replicas: int) -> None:
    """Refuse ZeRO over owners where workers train apart; ``replicas`` is how many ranks each has.

    Raises:
        ConfigError: names the key, what it got and what it takes.
    """
    if not sdp.schedule.is_apart or stage == 0 or (stage < 3 and replicas > 1):
        return
    raise ConfigError(
        f"DeepSpeed config: zero_optimization.stage: got {stage} with local steps ({BLOCK}.schedule.sync_interval or "
        f"outer_optimizer) and {replicas} rank(s) per subnetwork; takes 0 there, as owners have states of their own "
        "between rounds; 1 or 2 with several ranks per subnetwork, which share theirs"
    )


def check_supported(ds_config: Mapping[str, Any], sdp: SDPConfig, model: Any, optimizer: Any, mpu: Any) -> None:
    """Refuse what would be ignored or go wrong.

    Raises:
        ConfigError: names the key, what it got and why it is refused.
    """
    for key, fine, reason in _REFUSED:
        value = _lookup(ds_config, key, fine[0])
        if value not in fine:
            raise ConfigError(f"DeepSpeed config: {key}: got {value!r}; {reason}")
    stage = zero_stage(ds_config)
    check_stage(stage, sdp)
    if sdp.schedule.is_apart and _lookup(ds_config, "fp16.enabled", False):
        raise ConfigError(
            f"DeepSpeed config: fp16.enabled: got true with local steps ({BLOCK}.schedule.sync_interval or "
            "outer_optimizer); takes bf16 or fp32 there, as workers would find loss scales of their own"
        )
    if stage != 3 and _lookup(ds_config, "zero_optimization.offload_param.device", None) == "cpu":
        raise ConfigError(
            f'DeepSpeed config: zero_optimization.offload_param: got "cpu" with ZeRO stage {stage}; takes it with '
            "stage 3"
        )
    if isinstance(model, PipelineModule):
        raise ConfigError("model: got a PipelineModule; pipeline parallelism cannot be combined with SDP")
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model: got {type(model).__name__}; takes a torch.nn.Module")
    _check_model(model)
    if mpu is not None:
        raise ConfigError("mpu: model parallelism cannot be combined with SDP; takes None")
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        raise ConfigError(
            "model: built under deepspeed.zero.Init, whose shards are not an owner's; takes a model built on the meta "
            "device, or one built before TrainingArguments are, which switch zero.Init on at ZeRO stage 3"
        )
    asked = _lookup(ds_config, "optimizer.type", None)
    if optimizer is None and asked is None:
        raise ConfigError(
            'optimizer: got none; takes one as an argument, or an "optimizer" with a "type" in the DeepSpeed config'
        )
    name = str(asked) if optimizer is None else type(optimizer).__name__
    if any(whole in name.lower() for whole in _NEED_WHOLE_WEIGHTS):
        raise ConfigError(
            f"optimizer: got {name}, which needs whole weights; takes an element-wise optimizer (AdamW, ...)"
        )
    if any(own in name.lower() for own in _COMMUNICATE_THEMSELVES):
        raise ConfigError(f"optimizer: got {name}, which averages gradients over the world; takes AdamW, ...")
    is_known = name.lower() in {known.lower() for known in _OF_DEEPSPEED}
    if optimizer is None and not is_known and not isinstance(getattr(torch.optim, name, None), type):
        raise ConfigError(
            f"DeepSpeed config: optimizer.type: got {name!r}; takes {', '.join(_OF_DEEPSPEED)} or the name of a class "
            "of torch.optim (SGD, RMSprop, ...)"
        )


def zero_stage(ds_config: Mapping[str, Any]) -> Any:
    """As a DeepSpeed config says it."""
    return _lookup(ds_config, "zero_optimization.stage", 0)


def check_batch_sizes(config: Mapping[str, Any], world: int) -> None:
    """DeepSpeed works out the batch sizes that are absent, and asserts the rest.

    Raises:
        ConfigError: names the key, what it got and what it takes.
    """
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    train, micro, accumulation = values = [config.get(key) for key in keys]
    if "auto" in values:
        return  # an integration fills them in
    for key, value in zip(keys, values, strict=True):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"DeepSpeed config: {key}: got {value!r}; takes a whole number from 1 on")
    if train is None and micro is None:
        raise ConfigError(f"DeepSpeed config: {keys[0]}: got nothing; takes it, or {keys[1]}, or both")
    if train is not None:
        step, is_settled = (micro or 1) * (accumulation or 1) * world, None not in values
        if train % step or (is_settled and train != step):
            given = "".join(f", {key} {value}" for key, value in zip(keys[1:], values[1:], strict=True) if value)
            takes = step if is_settled else f"a multiple of {step}"
            raise ConfigError(
                f"DeepSpeed config: {keys[0]}: got {train} with {world} rank(s){given}; takes {takes}, the product of "
                "the others"
            )


def _check_model(model: torch.nn.Module) -> None:
    """What torch, transformers, peft and accelerate make of a model that cannot be cut any more."""
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            "model: got one that torch.compile wraps; takes the model itself: call engine.compile() when it is built"
        )
    if hasattr(model, "peft_config") or type(model).__module__.startswith("peft."):
        raise ModelError(
            f"model: got {type(model).__name__} with PEFT adapters; SDP trains the weights themselves: merge "
            "them first (merge_and_unload), or train them without SDP"
        )
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ModelError("model: got quantised weights; takes fp32, bf16 or fp16: load it without quantization_config")
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1:
        raise ModelError(
            f"model: got a device_map over {', '.join(sorted(places))}; takes a whole model on one device: load it "
            "without device_map"
        )


def _lookup(config: Mapping[str, Any], dotted: str, default: Any) -> Any:
    value: Any = config
    for part in dotted.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return default
        value = value[part]
    return value
