"""Checkpoints of the full model's training state; independent of the layout that wrote them."""

from deepspeed_sdp.checkpoint.background import BackgroundWriter
from deepspeed_sdp.checkpoint.reading import Checkpoint, open_checkpoint
from deepspeed_sdp.checkpoint.region import Entry, Region, regions_of_range
from deepspeed_sdp.checkpoint.writing import write_checkpoint

__all__ = [
    "BackgroundWriter",
    "Checkpoint",
    "Entry",
    "Region",
    "open_checkpoint",
    "regions_of_range",
    "write_checkpoint",
]
