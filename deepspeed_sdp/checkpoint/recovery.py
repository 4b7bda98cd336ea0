"""What is used of a checkpoint: all that is required, and copies of what is gone or damaged."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.layout import Layout, check_cover, layout_file
from deepspeed_sdp.checkpoint.meta import META, PLAN, STATE, read_meta
from deepspeed_sdp.checkpoint.tensor_files import TensorFiles, tensor_file
from deepspeed_sdp.errors import CheckpointError


def meta_of(checkpoint: Path, manifest: folders.Manifest, damage: Mapping[str, str]) -> dict[str, Any]:
    """What the job says of itself, where all files that exist once are whole.

    Args:
        damage: what is wrong with files, by name.

    Raises:
        CheckpointError: something is lacking; names it, and complete checkpoints beside this one.
    """
    once = (META, PLAN, STATE)
    for name in once:
        if name not in manifest.files:
            raise folders.damaged(checkpoint, f"{checkpoint / folders.MANIFEST} does not list {name}")
        if name in damage:
            raise folders.damaged(checkpoint, damage[name])
    try:
        meta = read_meta(checkpoint)
    except CheckpointError as error:
        raise folders.damaged(checkpoint, str(error).removeprefix("checkpoint: ")) from None
    if not len(meta["workers"]) == meta["world_size"] == manifest.ranks:
        raise folders.damaged(
            checkpoint,
            f"{checkpoint / META} has {meta['world_size']} ranks and {len(meta['workers'])} workers; "
            f"{folders.MANIFEST} says {manifest.ranks}",
        )
    expected = {*once, *map(layout_file, set(meta["workers"]))}
    for name in sorted(expected ^ manifest.files.keys()):
        what = "does not list" if name in expected else "lists, as no job does,"
        raise folders.damaged(checkpoint, f"{checkpoint / folders.MANIFEST} {what} {name}")
    return meta


def check_sizes(files: TensorFiles, checkpoint: Path, manifest: folders.Manifest, ranks: Iterable[int]) -> None:
    """Whether files have room for what layouts say is in them.

    Raises:
        CheckpointError: one has not.
    """
    for rank in ranks:
        if not files.is_lost(rank):
            name, nbytes = tensor_file(rank), files.nbytes(rank)
            there = folders.files_of_rank(checkpoint, manifest, rank)[name]["bytes"]
            if there < nbytes:
                raise folders.damaged(checkpoint, f"{checkpoint / name} has {there} bytes; its layout says {nbytes}")


def check_all(
    files: TensorFiles, checkpoint: Path, meta: Mapping[str, Any], damage: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Whether every element is there, once, in files that can be used.

    Returns:
        shapes of all logical tensors.

    Raises:
        CheckpointError: it is not; names what lacks, and complete checkpoints beside this one.
    """
    try:
        layouts = list(files.layouts())
        is_there = all(_is_there(files, layout) for layout in layouts)
        shapes = check_cover(layouts) if is_there else {}
    except CheckpointError as error:
        if not damage:
            raise folders.damaged(checkpoint, str(error).removeprefix("checkpoint: ")) from None
        is_there = False
    if not is_there:
        what = next(iter(damage.values()))
        raise folders.damaged(checkpoint, f"{what}, and no other file holds all that was in it")
    kinds = {name.split(".")[1] for name in shapes if name.startswith("optimizer.")}
    if kinds != set(meta["optimizer_state"]):
        listed, held = (", ".join(sorted(names)) or "none" for names in (meta["optimizer_state"], kinds))
        raise folders.damaged(checkpoint, f"layouts hold {held} of the optimizer; {META} says {listed}")
    return shapes


def _is_there(files: TensorFiles, layout: Layout) -> bool:
    """Whether every shard is in a file that can be used."""
    return all(not all(map(files.is_lost, ranks)) for copies in layout.owners for ranks in zip(*copies, strict=True))


def usable(
    checkpoint: Path, manifest: folders.Manifest, damage: Mapping[str, str]
) -> tuple[dict[str, Any], TensorFiles, dict[str, tuple[int, ...]]]:
    """What the job says of itself, its tensors and their shapes: for one process that reads all of it.

    Raises:
        CheckpointError: something is lacking, or there is more than was written.
    """
    meta = meta_of(checkpoint, manifest, damage)
    files = TensorFiles(checkpoint, meta["workers"], damage)
    shapes = check_all(files, checkpoint, meta, damage)
    check_sizes(files, checkpoint, manifest, range(manifest.ranks))
    return meta, files, shapes
