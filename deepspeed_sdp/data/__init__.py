"""From raw text to training sequences."""

from deepspeed_sdp.data.faults import FaultPolicy
from deepspeed_sdp.data.packing import RankSampler, unigram_loss
from deepspeed_sdp.data.separation import check_reset, separate_documents
from deepspeed_sdp.data.shard_dataset import Shards, ShardSequences, open_shards
from deepspeed_sdp.data.shard_options import ShardOptions
from deepspeed_sdp.data.shards import prepare_shards
from deepspeed_sdp.data.source import SourceSpec
from deepspeed_sdp.data.stream_state import merge_states, sequences_seen
from deepspeed_sdp.data.streaming import StreamedSequences, lanes_for
from deepspeed_sdp.data.tokenizer import load_tokenizer, train_tokenizer, vocab_size

__all__ = [
    "FaultPolicy",
    "RankSampler",
    "ShardOptions",
    "ShardSequences",
    "Shards",
    "SourceSpec",
    "StreamedSequences",
    "check_reset",
    "lanes_for",
    "load_tokenizer",
    "merge_states",
    "open_shards",
    "prepare_shards",
    "separate_documents",
    "sequences_seen",
    "train_tokenizer",
    "unigram_loss",
    "vocab_size",
]
