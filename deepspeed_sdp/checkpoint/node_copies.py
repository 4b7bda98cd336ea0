"""A rank's files on one more node: of a node that is lost, another one has all that was on it."""

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.errors import OutputError
from deepspeed_sdp.ranks import gather_objects
from deepspeed_sdp.waits import waiting

_WHAT = "copying a checkpoint to other nodes"
_PIECE = 16 << 20


def partners(keepers: Sequence[int]) -> list[int]:
    """By rank, who gets a copy of its files: one of the next node, in a circle of nodes.

    Args:
        keepers: by rank, the first one of its node.
    """
    nodes = {keeper: [rank for rank, other in enumerate(keepers) if other == keeper] for keeper in keepers}
    order = list(nodes)
    found = []
    for rank, keeper in enumerate(keepers):
        following = nodes[order[(order.index(keeper) + 1) % len(order)]]
        found.append(following[nodes[keeper].index(rank) % len(following)])
    return found


def copy_to_another_node(path: Path, keepers: Sequence[int], group: dist.ProcessGroup | None) -> None:
    """Collective. Write ``path`` of every rank, which has another name on each, beside that of its partner.

    Args:
        group: of all ranks, on the CPU.

    Raises:
        OutputError: it cannot be written; on every rank.
    """
    rank, world, to = dist.get_rank(), dist.get_world_size(), partners(keepers)
    sizes = gather_objects((path.name, path.stat().st_size), _WHAT, group)
    sources = [other for other, partner in enumerate(to) if partner == rank]
    with path.open("rb") as file:
        whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    for start in range(0, max(size for _, size in sizes), _PIECE):
        piece = whole[start : start + _PIECE]
        lengths = [min(_PIECE, max(0, sizes[other][1] - start)) if other in sources else 0 for other in range(world)]
        received = torch.empty(sum(lengths), dtype=torch.uint8)
        sent = [len(piece) if other == to[rank] else 0 for other in range(world)]
        with waiting(_WHAT, range(world)):
            dist.all_to_all_single(received, piece, lengths, sent, group=group)
        taken = zip(sources, torch.split(received, [lengths[other] for other in sources]), strict=True)
        agreed(_appender(path.parent, {sizes[other][0]: values for other, values in taken}), group=group)


def _appender(folder: Path, pieces: dict[str, torch.Tensor]) -> Callable[[], None]:
    def append() -> None:
        for name, values in pieces.items():
            try:
                with (folder / name).open("ab") as file:
                    file.write(values.numpy().tobytes())
            except OSError as error:
                raise OutputError(f"cannot write the checkpoint: {error}") from None

    return append
