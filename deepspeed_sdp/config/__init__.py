"""The SDP block, and how it is read."""

from deepspeed_sdp.config.blocks import BLOCK, MAX_WORKERS, OuterOptimizer, read_coverage
from deepspeed_sdp.config.defaults import default_bucket_numel, default_subnetworks
from deepspeed_sdp.config.json_file import read_json
from deepspeed_sdp.config.messages import block_of, in_words
from deepspeed_sdp.config.sdp import (
    MOST_UNASKED_SUBNETWORKS,
    SDPConfig,
    SDPSource,
    more_ranks,
    read_block,
    say_total_steps,
    split_block,
)

__all__ = [
    "BLOCK",
    "MAX_WORKERS",
    "MOST_UNASKED_SUBNETWORKS",
    "OuterOptimizer",
    "SDPConfig",
    "SDPSource",
    "block_of",
    "default_bucket_numel",
    "default_subnetworks",
    "in_words",
    "more_ranks",
    "read_block",
    "read_coverage",
    "read_json",
    "say_total_steps",
    "split_block",
]
