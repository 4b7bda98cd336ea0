"""How documents in one packed sequence are kept apart."""

from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from transformers import PretrainedConfig

from deepspeed_sdp.errors import ConfigError

Reset = Literal["none", "positions", "attention"]

_IGNORED = -100


def packed_example(ids: npt.NDArray[Any], starts: npt.NDArray[np.int64], reset: Reset) -> dict[str, torch.Tensor]:
    """What a model takes for one packed sequence: int64 ``[T]`` each; models shift the labels.

    transformers (``masking_utils.find_packed_sequence_indices``) makes attention causal within documents where
    positions restart and there is no attention mask, and plainly causal where there is one, were it of ones alone. So:

    - ``none``: ``input_ids`` and ``labels``; documents are told apart by the end-of-sequence token alone.
    - ``positions``: ``position_ids`` restart at each document, and an ``attention_mask`` of ones lets attention cross.
    - ``attention``: ``position_ids`` alone. Nothing of an earlier document can tell the first token of the next, so its
      label is -100.

    A document that began in an earlier sequence has position 0 at the start of this one.

    Args:
        ids: token ids ``[T]``.
        starts: where documents begin in ``ids``, ascending.
        reset: one of the above.
    """
    input_ids = torch.from_numpy(np.asarray(ids, dtype=np.int64))
    example = {"input_ids": input_ids, "labels": input_ids.clone()}
    if reset == "none":
        return example
    places = np.arange(len(ids), dtype=np.int64)
    begins = np.zeros(len(ids), dtype=np.int64)
    begins[starts] = starts
    example["position_ids"] = torch.from_numpy(places - np.maximum.accumulate(begins))
    if reset == "positions":
        example["attention_mask"] = torch.ones_like(input_ids)
    else:
        example["labels"][torch.from_numpy(starts)] = _IGNORED
    return example


def check_reset(reset: str) -> Reset:
    """``reset`` if it is one.

    Raises:
        ConfigError: it is not.
    """
    if reset not in get_args(Reset):
        raise ConfigError(f"data.document_reset: got {reset!r}; takes {', '.join(get_args(Reset))}")
    return cast(Reset, reset)


def separate_documents(config: PretrainedConfig, reset: Reset, micro_batch: int) -> None:
    """Make a model of this ``config`` do what ``reset`` says, in training and in evaluation; before its first batch.

    With a cache of keys and values transformers does not look for documents, so the cache is turned off. (In a
    subnetwork it is off anyway; in the full model, in a dense one, and in one loaded from a folder it is not.)

    Args:
        micro_batch: the most sequences of a forward pass.

    Raises:
        ConfigError: flash attention would let documents see each other: transformers finds them there in batches of
            one sequence only.
    """
    if check_reset(reset) != "attention":
        return
    attention = str(getattr(config, "_attn_implementation", None))
    if "flash" in attention and micro_batch > 1:
        raise ConfigError(
            f"data.document_reset: got attention with {attention} and micro-batches of {micro_batch}; takes "
            "micro-batches of 1 there, or attn_implementation sdpa"
        )
    config.use_cache = False
