"""Checkpoints of the full model's training state; independent of the layout that wrote them."""

from deepspeed_sdp.checkpoint.background import BackgroundWriter
from deepspeed_sdp.checkpoint.folder import has_checkpoint, is_complete
from deepspeed_sdp.checkpoint.index import Place
from deepspeed_sdp.checkpoint.reading import Checkpoint, open_checkpoint
from deepspeed_sdp.checkpoint.region import Entry, Region, regions_of_range, without_groups
from deepspeed_sdp.checkpoint.tensor_files import TensorFileReader
from deepspeed_sdp.checkpoint.writing import write_checkpoint

__all__ = [
    "BackgroundWriter",
    "Checkpoint",
    "Entry",
    "Place",
    "Region",
    "TensorFileReader",
    "has_checkpoint",
    "is_complete",
    "open_checkpoint",
    "regions_of_range",
    "without_groups",
    "write_checkpoint",
]
