"""Room for the state of a training in a node's memory."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from deepspeed_sdp.checkpoint import MANIFEST, Layout
from deepspeed_sdp.errors import OutputError


def make_room(folder: Path, layout: Layout, rank: int, keepers: Sequence[int]) -> None:
    """The folder of this node, if what it will hold fits: one state that is complete and one that is being written.

    Args:
        keepers: the first rank of every rank's node. Ranks hold about as much; with several nodes, each holds that of
            another one too.

    Raises:
        OutputError: it does not fit, cannot be made, or is another user's.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise OutputError(f"{folder}: it is another user's; takes a folder of one's own")
        free = shutil.disk_usage(folder).free
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot keep the state of the training in {folder}: {error.strerror or error}") from None
    nbytes = sum(numel * dtype.itemsize for *_, dtype, numel in layout.tensors(rank))
    has_one = any(folder.glob(f"*/{MANIFEST}"))
    ranks_here = keepers.count(keepers[rank])
    takes = nbytes * ranks_here * (1 if has_one else 2) * (2 if len(set(keepers)) > 1 else 1)
    if takes > free:
        raise OutputError(
            f"cannot keep the state of the training in {folder}: {free / 1e9:.2f} GB are free there; the {ranks_here} "
            f"ranks of this node take {takes / 1e9:.2f} GB"
        )
