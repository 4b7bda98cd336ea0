"""A job's own settings, from its DeepSpeed config."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepspeed_sdp.config import BLOCK, SDPConfig
from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.estimate.job import DTYPES, Job

_MOMENTS = {"adam": 2, "adamw": 2, "fusedadam": 2, "sgd": 0, "lion": 1, "adagrad": 1}


def job_of(ds_config: Mapping[str, Any], job: Job) -> Job:
    """``job`` with what a DeepSpeed config says about memory; what it leaves open, or to ``"auto"``, stays.

    Raises:
        ConfigError: a key that matters here has a value that no job could have.
    """
    zero = _mapping(ds_config, "zero_optimization")
    changes: dict[str, Any] = {
        "stage": _number(zero, "stage", "zero_optimization.stage", job.stage, (0, 3)),
        "micro_batch": _number(
            ds_config, "train_micro_batch_size_per_gpu", "train_micro_batch_size_per_gpu", job.micro_batch
        ),
        "accumulation": _number(
            ds_config, "gradient_accumulation_steps", "gradient_accumulation_steps", job.accumulation
        ),
        "bucket": _number(zero, "reduce_bucket_size", "zero_optimization.reduce_bucket_size", job.bucket),
        "gather_bucket": _number(
            zero, "allgather_bucket_size", "zero_optimization.allgather_bucket_size", job.gather_bucket
        ),
        "offload_optimizer": _is_offloaded(zero, "offload_optimizer", job.offload_optimizer),
        "offload_param": _is_offloaded(zero, "offload_param", job.offload_param),
        "overlap_comm": bool(zero.get("overlap_comm") is True),
        "prefetch": zero.get("stage3_prefetch_bucket_size", 1) != 0,
        "accumulate": _dtype(_mapping(ds_config, "data_types").get("grad_accum_dtype"), "data_types.grad_accum_dtype"),
        "reduce": _dtype(ds_config.get("communication_data_type"), "communication_data_type"),
    }
    if isinstance(ds_config.get("train_batch_size"), int) and "gradient_accumulation_steps" not in ds_config:
        # As DeepSpeed derives it.
        changes["accumulation"] = max(1, ds_config["train_batch_size"] // (changes["micro_batch"] * job.world_size))
    for name in ("bf16", "fp16"):
        if _mapping(ds_config, name).get("enabled") is True:
            changes["dtype"] = DTYPES[name]
    if ds_config and not any(_mapping(ds_config, name) for name in ("bf16", "fp16")) and zero:
        changes["dtype"] = DTYPES["fp32"]
    optimizer = _mapping(ds_config, "optimizer")
    kind = str(optimizer.get("type", "")).lower()
    if kind in _MOMENTS:
        parameters = _mapping(optimizer, "params")
        changes["moments"] = int(bool(parameters.get("momentum"))) if kind == "sgd" else _MOMENTS[kind]
        changes["step_temporaries"] = (
            2 if parameters.get("torch_adam") and changes["moments"] == 2 else job.step_temporaries
        )
    if ds_config.get(BLOCK) is not None:
        sdp = SDPConfig.parse(ds_config[BLOCK])
        changes["sdp"] = sdp if sdp.enabled else None
    return replace(job, **changes)


def _mapping(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(
    config: Mapping[str, Any], key: str, name: str, default: int | None, among: tuple[int, int] | None = None
) -> int | None:
    value = config.get(key, "auto")
    if value in ("auto", None):
        return default
    low, high = among or (1, None)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value < low
        or (high is not None and value > high)
    ):
        raise ConfigError(f"{name}: got {value!r}; takes {f'{low} to {high}' if high else f'a number from {low} on'}")
    return int(value)


def _is_offloaded(zero: Mapping[str, Any], key: str, default: bool) -> bool:
    return _mapping(zero, key).get("device") == "cpu" if key in zero else default


def _dtype(value: Any, name: str) -> Any:
    if value in (None, "auto"):
        return None
    if value not in DTYPES:
        raise ConfigError(f"{name}: got {value!r}; takes one of {', '.join(DTYPES)}")
    return DTYPES[value]
