"""Checkpoints of the full model's training state; independent of the layout that wrote them."""

from deepspeed_sdp.checkpoint.background import BackgroundWriter
from deepspeed_sdp.checkpoint.folder import has_checkpoint, is_complete
from deepspeed_sdp.checkpoint.full_scale import FULL_SCALE, factor_on, parameter_of, writes_of
from deepspeed_sdp.checkpoint.index import Place
from deepspeed_sdp.checkpoint.lock import LOCK, FolderLocks
from deepspeed_sdp.checkpoint.model_folder import model_folder
from deepspeed_sdp.checkpoint.reading import Checkpoint, open_checkpoint
from deepspeed_sdp.checkpoint.region import Entry, Region, regions_of_range, without_groups
from deepspeed_sdp.checkpoint.tensor_files import TensorFileReader
from deepspeed_sdp.checkpoint.writing import write_checkpoint

__all__ = [
    "FULL_SCALE",
    "LOCK",
    "BackgroundWriter",
    "Checkpoint",
    "Entry",
    "FolderLocks",
    "Place",
    "Region",
    "TensorFileReader",
    "factor_on",
    "has_checkpoint",
    "is_complete",
    "model_folder",
    "open_checkpoint",
    "parameter_of",
    "regions_of_range",
    "without_groups",
    "write_checkpoint",
    "writes_of",
]
