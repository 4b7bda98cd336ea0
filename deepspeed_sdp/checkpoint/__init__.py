"""Checkpoints of the full model's training state; independent of the layout that wrote them."""

from deepspeed_sdp.checkpoint.background import BackgroundWriter
from deepspeed_sdp.checkpoint.folder import MANIFEST, has_checkpoint, is_complete, latest_step
from deepspeed_sdp.checkpoint.full_scale import FULL_SCALE, factor_on, parameter_of, writes_of
from deepspeed_sdp.checkpoint.layout import Held, Layout, Section, Writers, layout_file
from deepspeed_sdp.checkpoint.lock import LOCK, FolderLocks
from deepspeed_sdp.checkpoint.model_folder import model_folder
from deepspeed_sdp.checkpoint.node_files import keepers_of, open_newest
from deepspeed_sdp.checkpoint.reading import Checkpoint, open_checkpoint
from deepspeed_sdp.checkpoint.runs import Entry, Rectangle, Run, common, cut, whole
from deepspeed_sdp.checkpoint.source import Read, Source
from deepspeed_sdp.checkpoint.tensor_files import Placed, Snapshot, Streamed, header
from deepspeed_sdp.checkpoint.writing import write_checkpoint

__all__ = [
    "FULL_SCALE",
    "LOCK",
    "MANIFEST",
    "BackgroundWriter",
    "Checkpoint",
    "Entry",
    "FolderLocks",
    "Held",
    "Layout",
    "Placed",
    "Read",
    "Rectangle",
    "Run",
    "Section",
    "Snapshot",
    "Source",
    "Streamed",
    "Writers",
    "common",
    "cut",
    "factor_on",
    "has_checkpoint",
    "header",
    "is_complete",
    "keepers_of",
    "latest_step",
    "layout_file",
    "model_folder",
    "open_checkpoint",
    "open_newest",
    "parameter_of",
    "whole",
    "write_checkpoint",
    "writes_of",
]
