"""What a checkpoint holds, for a person: ``deepspeed-sdp inspect``."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.recovery import usable
from deepspeed_sdp.errors import CheckpointError


def locate(path: Path, tag: str | None = None) -> Path:
    """The checkpoint at ``path``: itself, or the latest (or ``tag``) of a folder of checkpoints.

    Raises:
        CheckpointError: there is none.
    """
    if tag is None and (path / folders.MANIFEST).is_file():
        return path
    with suppress(OSError):  # a folder that cannot be written can still be read
        folders.recover(path)
    found = folders.check_tag(tag) if tag is not None else folders.latest(path)
    if found is None:
        raise CheckpointError(f"checkpoint: there is none in {path}; takes a checkpoint, or a folder with a `latest`")
    return path / found


def summarize(checkpoint: Path, verify: bool = False) -> dict[str, Any]:
    """JSON data.

    Args:
        verify: compare every file with its checksum.

    Raises:
        CheckpointError: it is incomplete or damaged, and cannot do without what is.
    """
    manifest = folders.read_manifest(checkpoint)
    damage = folders.damage(checkpoint, manifest, is_read=verify)
    meta, _, shapes = usable(checkpoint, manifest, damage)
    kinds: dict[str, int] = {}
    for name, shape in shapes.items():
        kind = ".".join(name.split(".")[: 2 if name.startswith("optimizer.") else 1])
        kinds[kind] = kinds.get(kind, 0) + math.prod(shape)
    listed = dict(manifest.files)
    for rank in range(manifest.ranks):
        if folders.rank_manifest(rank) not in damage:
            listed.update(folders.files_of_rank(checkpoint, manifest, rank))
    block = meta["subnetwork_data_parallel"]
    return {
        "checkpoint": str(checkpoint),
        "verified": verify,
        "damage": list(damage.values()),
        "steps": meta["global_steps"],
        "samples": meta["global_samples"],
        "model": meta["model_class"],
        "elements": kinds,
        "bytes": sum(file["bytes"] for file in listed.values()),
        "files": len(listed),
        "written_by": {
            "ranks": meta["world_size"],
            "zero_stage": meta["zero_stage"],
            "dtype": meta["dtype"],
            "optimizer": meta["optimizer"],
            "plan": meta["plan_hash"][:12],
            **{key: block[key] for key in ("masking", "granularity", "coverage")},
            "copies": block["checkpoint"]["copies"],
            **meta["versions"],
        },
    }
