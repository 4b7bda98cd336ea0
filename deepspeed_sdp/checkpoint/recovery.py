"""What is left of a checkpoint when files of some workers are gone or damaged."""

from collections.abc import Mapping
from pathlib import Path

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.index import read_index
from deepspeed_sdp.errors import CheckpointError

# Written by every rank: its part of the tensors, which copies may replace, and its random numbers.
_OF_A_RANK = ("tensors-", "rank-")


def do_without(checkpoint: Path, damage: Mapping[str, str]) -> frozenset[str]:
    """The files that ``damage`` names, if all that was in them is in other files too.

    Raises:
        CheckpointError: it is not; names the file, and complete checkpoints beside this one.
    """
    for name, what in damage.items():
        if not name.startswith(_OF_A_RANK):
            raise folders.damaged(checkpoint, what)
    if damage:
        try:
            read_index(checkpoint, {}, damage)
        except CheckpointError:
            what = next(iter(damage.values()))
            raise folders.damaged(checkpoint, f"{what}, and no other file holds all that was in it") from None
    return frozenset(damage)
