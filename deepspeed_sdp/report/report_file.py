"""``report.json`` as a file that somebody hands over."""

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from deepspeed_sdp.errors import ConfigError
from deepspeed_sdp.schemas import Count, Schema, read_object

_NAME = "report.json"
# Not finite: null.
_LOSSES = ("train_loss", "full_model_val_loss", "unigram_val_loss")


class _State(Schema):
    weights: Count
    gradients: Count
    optimizer: Count
    total: Count


class _States(Schema):
    sdp: list[_State] = Field(min_length=1)
    dense: list[_State] | None


class _Report(Schema):
    steps: Count
    tokens: Count
    run: dict[str, Any] = Field(default_factory=dict)
    parameters: Count
    trained: str
    train_loss: float | None
    full_model_val_loss: float | None
    unigram_val_loss: float | None
    seconds: Annotated[float, Field(ge=0)]
    timed_steps: Count
    tokens_per_second: float | None
    is_gradient_peak_measured: bool
    reduce_bucket_numel: Count | None
    per_rank_model_state_bytes: _States
    bytes_sent_per_step_per_rank: list[Count | None]
    owned_parameters_per_rank: list[Count]
    plan: dict[str, Any] | None
    versions: dict[str, str]


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run, as :meth:`RunReport.write` left it.

    Raises:
        ConfigError: there is none, or it is no such report.
    """
    data = read_object(folder / _NAME, _Report, ConfigError)
    ranks = len(data["per_rank_model_state_bytes"]["sdp"])
    for key in ("bytes_sent_per_step_per_rank", "owned_parameters_per_rank"):
        if len(data[key]) != ranks:
            raise ConfigError(
                f"{folder / _NAME}: {key}: got {len(data[key])} values; takes one for each of {ranks} ranks"
            )
    return data


def with_nan(data: dict[str, Any]) -> dict[str, Any]:
    """For a page to read: losses that are not finite by their name."""
    return {**data, **{key: math.nan for key in _LOSSES if data[key] is None}}
