"""``meta.json``: what a job says of itself, with the bounds within which it is believed."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, StringConstraints

from deepspeed_sdp.checkpoint.json_files import Count, Hash, Schema, read_as
from deepspeed_sdp.errors import CheckpointError, PlanError, SDPError
from deepspeed_sdp.plan import SubnetworkPlan

META = "meta.json"
PLAN = "plan.json"
STATE = "state.pt"

_Word = Annotated[str, StringConstraints(pattern=r"^\w[\w.+-]{0,199}$")]
# Numbers of modules; sizes of tensors cost nothing before there is memory for them.
_MODULES = re.compile(r"layer|expert|block|depth|stage")


class _Copies(Schema):
    model_config = ConfigDict(extra="allow")

    copies: Annotated[int, Field(ge=1, le=1 << 20)]


class _Block(Schema):
    """What of the SDP block counts later."""

    model_config = ConfigDict(extra="allow")

    masking: Literal["forward", "backward"]
    granularity: Literal["neuron", "branch", "layer"]
    output_scaling: Literal["none", "inverse_sqrt_coverage", "inverse_coverage"]
    coverage: Any
    checkpoint: _Copies


class _Versions(Schema):
    model_config = ConfigDict(extra="allow")

    torch: _Word
    deepspeed: _Word
    transformers: _Word


class _Meta(Schema):
    model_config = ConfigDict(extra="allow")

    global_steps: Count
    global_samples: Count
    micro_steps: Count
    skipped_steps: Count
    world_size: Annotated[int, Field(ge=1, le=1 << 24)]
    workers: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 24)]], Field(max_length=1 << 24)]
    zero_stage: Annotated[int, Field(ge=0, le=3)]
    dtype: Literal["float32", "float16", "bfloat16"]
    optimizer: _Word
    optimizer_state: Annotated[list[_Word], Field(max_length=64)]
    plan_hash: Hash
    full_scale: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0
    subnetwork_data_parallel: _Block
    model_class: _Word
    model_config_: Annotated[dict[str, Any], Field(alias="model_config")]
    versions: _Versions


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The checked content of ``meta.json``, by its own keys.

    Raises:
        CheckpointError: it is missing, broken, or of another form.
    """
    return read_as(checkpoint / META, _Meta).model_dump(by_alias=True)


def read_plan(checkpoint: Path) -> SubnetworkPlan:
    """The plan of the job that wrote it.

    Raises:
        CheckpointError: it is missing, or no plan.
    """
    try:
        return SubnetworkPlan.from_json((checkpoint / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError, PlanError) as error:
        raise CheckpointError(f"checkpoint: {checkpoint / PLAN}: {error}") from None


def full_model(meta: Mapping[str, Any], shapes: Mapping[str, torch.Size]) -> tuple[Any, torch.nn.Module]:
    """Config and full model, on the meta device, of a checkpoint that has all of its weights and no others.

    A model whose class is the user's own is only known as what transformers makes of its config: it may have others.

    Args:
        shapes: of the weights that the checkpoint holds.

    Raises:
        CheckpointError: the model cannot be built, or its weights and those in the checkpoint are not the same.
    """
    import transformers
    from transformers import AutoConfig, PreTrainedModel

    from deepspeed_sdp.subnetwork import meta_model

    _check_sizes(meta["model_config"], len(shapes))
    try:
        config = AutoConfig.for_model(**meta["model_config"])
        config.architectures = [meta["model_class"]]
        model_class: Any = getattr(transformers, meta["model_class"], None)
        is_known = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
        if is_known:
            with torch.device("meta"):
                model = model_class(config)
        else:
            model = meta_model(config, META)
    except SDPError as error:
        raise CheckpointError(f"checkpoint: {error}") from None
    except Exception as error:  # configs raise almost anything for values that they do not take
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint: {META}: model_config: {reason}") from None
    wanted = {name: value.shape for name, value in model.named_parameters()}
    known = {name: value.shape for name, value in model.state_dict(keep_vars=True).items()}
    for name in (*wanted, *shapes) if is_known else wanted.keys() & shapes.keys():
        if known.get(name) != shapes.get(name):
            raise CheckpointError(
                f"checkpoint: {name} has shape {_shown(shapes.get(name))}; the model in {META} takes "
                f"{_shown(known.get(name))}"
            )
    return config, model


def _shown(shape: Iterable[int] | None) -> str:
    return "none" if shape is None else str(list(shape))


def _check_sizes(config: Mapping[str, Any], tensors: int) -> None:
    """A model has no more modules of a kind than tensors, or elements in lists that say what they are."""
    for key, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, tensors)
        elif isinstance(value, int) and _MODULES.search(key) and value > max(tensors, 1024):
            raise CheckpointError(f"checkpoint: {META}: model_config.{key[:80]}: got {value} with {tensors} tensors")
