"""What is used of a checkpoint: all that is required, and copies of what is gone or damaged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.index import INDEX, read_index
from deepspeed_sdp.checkpoint.meta import META, PLAN, STATE, read_meta
from deepspeed_sdp.errors import CheckpointError

# Written by every rank: its part of the tensors, which copies may replace, and its random numbers.
_OF_A_RANK = ("tensors-", "rank-")


def do_without(
    checkpoint: Path, files: Mapping[str, Mapping[str, Any]], damage: Mapping[str, str]
) -> tuple[frozenset[str], dict[str, Any]]:
    """The files that ``damage`` names, if all that was in them is in other files too; and what the job says of itself.

    Args:
        files: what the manifest says: every file that is used must be in it.

    Raises:
        CheckpointError: something is lacking, or there is more than was written; names it, and complete checkpoints
            beside this one.
    """
    for name, what in damage.items():
        if not name.startswith(_OF_A_RANK):
            raise folders.damaged(checkpoint, what)
    for name in (INDEX, META, PLAN, STATE):
        if name not in files:
            raise folders.damaged(checkpoint, f"{checkpoint / folders.MANIFEST} does not list {name}")
    try:
        meta = read_meta(checkpoint)
        there = {name: int(file["bytes"]) for name, file in files.items()}
        tensors = read_index(checkpoint, {}, files=there)
    except CheckpointError as error:
        raise folders.damaged(checkpoint, str(error).removeprefix("checkpoint: ")) from None
    for rank in range(meta["world_size"]):
        if f"rank-{rank:05d}.pt" not in files:
            raise folders.damaged(checkpoint, f"{checkpoint / folders.MANIFEST} does not list rank-{rank:05d}.pt")
    kinds = {name.split(".")[1] for name in tensors if name.startswith("optimizer.")}
    if kinds != set(meta["optimizer_state"]):
        listed, held = (", ".join(sorted(names)) or "none" for names in (meta["optimizer_state"], kinds))
        raise folders.damaged(checkpoint, f"{checkpoint / INDEX} holds {held} of the optimizer; {META} says {listed}")
    if damage:
        try:
            read_index(checkpoint, {}, damage)
        except CheckpointError:
            what = next(iter(damage.values()))
            raise folders.damaged(checkpoint, f"{what}, and no other file holds all that was in it") from None
    return frozenset(damage), meta
