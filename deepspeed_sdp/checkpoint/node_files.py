"""Checkpoints of which every node has the files of its own ranks, in shared memory as a rule.

The files of a node lie on the next one too (:mod:`~deepspeed_sdp.checkpoint.node_copies`). A rank that needs what is
not on its node asks one where it is.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.checkpoint.meta import read_meta
from deepspeed_sdp.checkpoint.reading import Checkpoint
from deepspeed_sdp.checkpoint.recovery import check_all, check_sizes, meta_of
from deepspeed_sdp.checkpoint.runs import Entry
from deepspeed_sdp.checkpoint.tensor_files import Stored, TensorFiles
from deepspeed_sdp.errors import CheckpointError
from deepspeed_sdp.processes import place
from deepspeed_sdp.ranks import control_group, gather_objects, meet, object_of
from deepspeed_sdp.waits import waiting

_WHAT = "reading a checkpoint that lies on several nodes"
# Of what a rank reads in one exchange; one entry may be larger.
_BATCH_BYTES = 16 << 20


def keepers_of(folder: Path) -> list[int]:
    """Collective. By rank, the first one that sees the same ``folder``: of ranks on one node, if it is on none else."""
    places = gather_objects((place(), str(folder.resolve())), "finding the nodes")
    return [places.index(found) for found in places]


class _Candidate(NamedTuple):
    step: int
    tag: str
    mark: str


def open_newest(folder: Path, worker: int = 0) -> tuple[Checkpoint | None, list[str]]:
    """Collective. The newest checkpoint that the ``folder`` of all nodes together hold whole, or ``None``.

    What is not of a rank's own is written to nodes that lack it.

    Args:
        worker: whose layout this rank probably needs.

    Returns:
        the checkpoint, and what is wrong with newer ones.
    """
    keepers, rank = keepers_of(folder), dist.get_rank()
    if keepers[rank] == rank and folder.is_dir():
        with suppress(OSError, CheckpointError):
            folders.recover(folder)
    meet(_WHAT)
    mine = dict(_complete(folder))
    found = gather_objects(mine if keepers[rank] == rank else {}, _WHAT)
    problems: list[str] = []
    for candidate in sorted({c for of_rank in found for c in of_rank}, reverse=True):
        source = next(holder for holder, of_rank in enumerate(found) if candidate in of_rank)
        try:
            return _open(folder, candidate, mine, keepers, source, worker), problems
        except CheckpointError as error:
            problems.append(str(error).removeprefix("checkpoint: "))
    return None, problems


def _complete(folder: Path) -> Iterator[tuple[_Candidate, folders.Manifest]]:
    """The checkpoints of which this node has all that no rank wrote for itself."""
    for tag in folders.tags(folder):
        with suppress(CheckpointError):
            manifest = folders.read_manifest(folder / tag)
            if not folders.damage_of(folder / tag, manifest.files):
                yield _Candidate(int(read_meta(folder / tag)["global_steps"]), tag, manifest.mark), manifest


def _open(
    folder: Path,
    candidate: _Candidate,
    mine: Mapping[_Candidate, folders.Manifest],
    keepers: Sequence[int],
    source: int,
    worker: int,
) -> Checkpoint:
    """Collective. Raises CheckpointError on all ranks alike."""
    rank, checkpoint = dist.get_rank(), folder / candidate.tag
    has_it = gather_objects(candidate in mine, _WHAT)
    if not all(has_it):
        names = [*mine[candidate].files, folders.MANIFEST] if rank == source else []
        given = agreed(lambda: {name: (checkpoint / name).read_bytes() for name in names})
        given = object_of(source, given, _WHAT)

        def write() -> None:
            if not has_it[rank] and keepers[rank] == rank:
                checkpoint.mkdir(parents=True, exist_ok=True)
                for name, content in given.items():
                    (checkpoint / name).write_bytes(content)

        agreed(write)
    here = [other for other, keeper in enumerate(keepers) if keeper == keepers[rank]]

    def verify() -> tuple[folders.Manifest, list[int]]:
        manifest = folders.read_manifest(checkpoint)
        share = range(here.index(rank), manifest.ranks, len(here))
        return manifest, [written for written in share if _is_whole(checkpoint, manifest, written)]

    manifest, good = agreed(verify)
    whole = gather_objects(good, _WHAT)
    holders = {written: holder for holder, of_rank in enumerate(whole) for written in of_rank}
    local = {written for other in here for written in whole[other]}
    every = set(range(manifest.ranks))
    gone = [name for written in sorted(every - holders.keys()) for name in folders.files_of(written)]
    damage = {name: f"{checkpoint / name} is on no node" for name in gone}

    def look() -> Checkpoint:
        meta = meta_of(checkpoint, manifest, damage)
        files = NodeFiles(checkpoint, meta["workers"], damage, worker, holders, local)
        if rank == 0:
            check_all(files, checkpoint, meta, damage)
        check_sizes(files, checkpoint, manifest, good)
        elsewhere = frozenset(name for written in every - local for name in folders.files_of(written))
        return Checkpoint(checkpoint, meta, files, damage, elsewhere)

    return agreed(look)


def _is_whole(checkpoint: Path, manifest: folders.Manifest, rank: int) -> bool:
    """Whether this node has all that ``rank`` wrote for itself."""
    with suppress(CheckpointError):
        return not folders.damage_of(checkpoint, folders.files_of_rank(checkpoint, manifest, rank))
    return False


class NodeFiles(TensorFiles):
    """Tensors of which every rank can read some.

    Args:
        holders: the rank that reads what a rank wrote, by the latter.
        local: of which this one can read the files itself.
    """

    def __init__(
        self,
        folder: Path,
        workers: Sequence[int],
        lost: Mapping[str, str],
        first: int,
        holders: Mapping[int, int],
        local: Iterable[int],
    ) -> None:
        super().__init__(folder, workers, lost, first)
        self._holders, self._local = holders, frozenset(local)
        self._asked: dict[int, dict[tuple[Stored, int, int], None]] = {}
        self._answers: dict[tuple[Stored, int, int], torch.Tensor] | None = None

    def fill(self, entries: Iterable[Entry]) -> None:
        """Collective. See :meth:`Source.fill`."""
        batches = list(_batches(entries))
        for number in range(max(gather_objects(len(batches), _WHAT))):
            batch = batches[number] if number < len(batches) else []
            # Once to learn what is needed of others, and once with it.
            self._asked, self._answers = defaultdict(dict), None
            agreed(lambda batch=batch: super(NodeFiles, self).fill(batch))  # type: ignore[misc]
            self._answers = self._exchange()
            agreed(lambda batch=batch: super(NodeFiles, self).fill(batch))  # type: ignore[misc]
            self._answers = None

    def elements(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        if stored.rank in self._local:
            return super().elements(stored, start, stop)
        if self._answers is not None:
            return self._answers[stored, start, stop]
        self._asked[self._holders[stored.rank]][stored, start, stop] = None
        return torch.empty(stop - start, dtype=stored.dtype)

    def _exchange(self) -> dict[tuple[Stored, int, int], torch.Tensor]:
        """Collective. What was asked of others."""
        rank, world = dist.get_rank(), dist.get_world_size()
        told = gather_objects({holder: list(asked) for holder, asked in self._asked.items()}, _WHAT)
        served = [of_rank.get(rank, []) for of_rank in told]

        def read() -> list[torch.Tensor]:
            pieces = (super(NodeFiles, self).elements(*asked) for of_rank in served for asked in of_rank)
            return [piece.contiguous().view(torch.uint8) for piece in pieces]

        send = agreed(read)
        payload = torch.cat(send) if send else torch.empty(0, dtype=torch.uint8)
        wanted = [list(self._asked.get(peer, ())) for peer in range(world)]
        sizes, sent = ([sum(map(_nbytes, of_peer)) for of_peer in asked] for asked in (wanted, served))
        received = torch.empty(sum(sizes), dtype=torch.uint8)
        with waiting(_WHAT, range(world)):
            dist.all_to_all_single(received, payload, sizes, sent, group=control_group())
        asked = [one for of_peer in wanted for one in of_peer]
        pieces = torch.split(received, [_nbytes(one) for one in asked])
        # A view of another dtype has to begin at a multiple of its size.
        return {one: piece.clone().view(one[0].dtype) for one, piece in zip(asked, pieces, strict=True)}


def _nbytes(asked: tuple[Stored, int, int]) -> int:
    stored, start, stop = asked
    return (stop - start) * stored.dtype.itemsize


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    nbytes = 0
    for entry in entries:
        if batch and nbytes + entry.tensor.nbytes > _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(entry)
        nbytes += entry.tensor.nbytes
    if batch:
        yield batch
