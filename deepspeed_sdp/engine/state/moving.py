"""Training state on its way from one layout to another, in memory: each rank asks those who have what it needs.

A portion of the model at a time, in an order that all ranks share; what was sent and is needed no more is freed before
the next. Elements travel once to each rank that needs them, and not at all where it has them.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepspeed_sdp.checkpoint import Layout, Rectangle, Run, common, cut
from deepspeed_sdp.engine.comm.mesh import Group
from deepspeed_sdp.ranks import control_group
from deepspeed_sdp.waits import waiting

_WHAT = "the training state of a re-partition"


@dataclass
class Wanted:
    """What a rank needs of a bucket, or of a tensor that is not trained.

    Attributes:
        runs: that it is, one after the other.
        kinds: what of them, by kind its dtype.
        device: where it shall lie.
        tensors: ``[elements]`` of each kind; made when the first of it comes.
    """

    runs: tuple[Run, ...]
    kinds: Mapping[str, torch.dtype]
    device: torch.device
    numel: int
    tensors: dict[str, torch.Tensor]

    def tensor(self, kind: str) -> torch.Tensor:
        """Its memory."""
        if kind not in self.tensors:
            self.tensors[kind] = torch.zeros(self.numel, dtype=self.kinds[kind], device=self.device)
        return self.tensors[kind]


class _Piece(NamedTuple):
    """Elements of a run that one rank holds, ``offset`` behind the beginning of its tensor of a bucket."""

    run: Run
    rank: int
    section: int
    bucket: int
    offset: int


class _Part(NamedTuple):
    """A rectangle of a tensor that is wanted, as the place in it and where its rows begin where it is held."""

    wanted: Wanted
    first: int
    run: Run
    rectangle: Rectangle
    row: tuple[int, int, int, int, int, int]
    """Section, bucket, offset, rows, columns, stride."""


class Whereabouts:
    """Who holds what.

    Args:
        layouts: what the ranks of every worker hold.
        workers: of every rank.
        is_sharded: whether owners hold a shard of a bucket each, or all of it.
        replicas: where workers train apart, so many of each share a bucket, and hold the shards of all owners at their
            coordinate; else 0.
    """

    def __init__(
        self, layouts: Mapping[int, Layout], workers: Sequence[int], is_sharded: bool, replicas: int = 0
    ) -> None:
        self._layouts, self._workers, self._is_sharded = layouts, workers, is_sharded
        self._replicas = replicas
        self._places: dict[int, dict[Run, tuple[int, int, int]]] = {}
        for worker, layout in layouts.items():
            found = (f for of_name in layout.found.values() for f in of_name)
            self._places[worker] = {f.run: (f.section, f.bucket, f.base) for f in found}
        self.runs: dict[str, dict[Run, int]] = defaultdict(dict)
        for worker, places in self._places.items():
            for run in places:
                self.runs[run.name].setdefault(run, worker)
        sections = (section for layout in layouts.values() for section in layout.sections)
        self.kinds = sorted({kind for section in sections for kind in section.kinds})

    def kinds_of(self, worker: int, run: Run) -> Mapping[str, torch.dtype]:
        """What is held of a run by the ranks of a worker that holds it."""
        return self._layouts[worker].sections[self._places[worker][run][0]].kinds

    def pieces(self, name: str, rank: int) -> Iterator[_Piece]:
        """All of a tensor, each element once, from where ``rank`` best gets it."""
        own = self._places[self._workers[rank]]
        for run, worker in self.runs[name].items():
            section, place, base = self._places[worker][run]
            held = self._layouts[worker].sections[section].buckets[place]
            ranks = self._layouts[worker].owners[held.owners][0]
            is_whole = not self._is_sharded or "model" in self._layouts[worker].sections[section].kinds
            if is_whole and run in own:
                yield _Piece(run, rank, *own[run])
                continue
            together = len(ranks) // self._replicas if self._replicas else 1
            for shard, holder in enumerate(ranks):
                low, high = max(base, shard * held.share), min(base + run.numel, (shard + 1) * held.share)
                if low >= high:
                    continue
                [part] = cut([run], low - base, high - base)
                section, place, _ = self._places[self._workers[holder]][run]
                yield _Piece(
                    part, holder, section, place, low if is_whole else low - shard // together * together * held.share
                )


def move(
    whereabouts: Whereabouts,
    held: dict[tuple[int, int], dict[str, torch.Tensor]],
    wanted: Iterable[Wanted],
    portions: Sequence[Sequence[str]],
    group: Group,
    device: torch.device,
    count: Callable[[int], None],
) -> None:
    """Collective. Bring what is ``wanted`` to this rank; ``held``, by section and bucket, is empty afterwards.

    Args:
        portions: names of all full parameters and buffers, in the order in which they move.
        group: of all ranks.
        device: of its collectives.
        count: is told the bytes that this rank sends.
    """
    rank = dist.get_rank()
    by_name: dict[str, list[tuple[Wanted, int, Run]]] = defaultdict(list)
    for one in wanted:
        first = 0
        for run in one.runs:
            by_name[run.name].append((one, first, run))
            first += run.numel
    left = _Left(whereabouts, rank)
    for names in portions:
        asked: dict[int, list[_Part]] = defaultdict(list)
        for name in names:
            for piece in whereabouts.pieces(name, rank) if name in by_name else ():
                for one, first, run in by_name[name]:
                    if not run.is_apart(piece.run):
                        asked[piece.rank] += _parts(one, first, run, piece)
        for part in asked.pop(rank, ()):
            for kind in part.wanted.kinds:
                _destination(part, kind).copy_(_strided(held[part.row[:2]][kind], part.row))
        _exchange(asked, held, whereabouts.kinds, group, device, count)
        for key in left.after(names):
            held.pop(key, None)
    assert not held, f"{len(held)} buckets were not in any portion"


class _Left:
    """Counts what of each of this rank's buckets is still to come in a portion."""

    def __init__(self, whereabouts: Whereabouts, rank: int) -> None:
        places = whereabouts._places[whereabouts._workers[rank]]
        self._of_name: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for run, (section, bucket, _) in places.items():
            self._of_name[run.name].append((section, bucket))
        self._counts = Counter(key for keys in self._of_name.values() for key in keys)

    def after(self, names: Sequence[str]) -> Iterator[tuple[int, int]]:
        for name in names:
            for key in self._of_name[name]:
                self._counts[key] -= 1
                if not self._counts[key]:
                    yield key


def _parts(one: Wanted, first: int, run: Run, piece: _Piece) -> Iterator[_Part]:
    here, there, shared = common(run, piece.run)
    for rectangle in shared:
        top, bottom, left, right = rectangle
        offset = piece.offset + top * there.width + left - there.column - there.start
        row = (piece.section, piece.bucket, offset, bottom - top, right - left, there.width)
        yield _Part(one, first, here, rectangle, row)


def _destination(part: _Part, kind: str) -> torch.Tensor:
    values = part.wanted.tensor(kind)[part.first : part.first + part.run.numel]
    return part.run.view(values, part.rectangle)


def _strided(source: torch.Tensor, row: Sequence[int]) -> torch.Tensor:
    _, _, offset, rows, columns, stride = row
    return source.as_strided((rows, columns), (stride, 1), source.storage_offset() + offset)


def _exchange(
    asked: Mapping[int, Sequence[_Part]],
    held: Mapping[tuple[int, int], Mapping[str, torch.Tensor]],
    kinds: Sequence[str],
    group: Group,
    device: torch.device,
    count: Callable[[int], None],
) -> None:
    of_peer = [[(p, k) for p in asked.get(peer, ()) for k in p.wanted.kinds] for peer in range(dist.get_world_size())]
    served = _tell([[[*p.row, kinds.index(kind)] for p, kind in rows] for rows in of_peer])
    send, sent = [], []
    for told in served:
        nbytes = 0
        for *row, kind in told.tolist():
            piece = _strided(held[row[0], row[1]][kinds[kind]], row).contiguous().view(-1).view(torch.uint8)
            send.append(piece.to(device))
            nbytes += piece.numel()
        sent.append(nbytes)
    sizes = [sum(p.row[3] * p.row[4] * p.wanted.kinds[k].itemsize for p, k in rows) for rows in of_peer]
    payload = torch.cat(send) if send else torch.empty(0, dtype=torch.uint8, device=device)
    send.clear()
    received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    count(sum(sent))
    with group.waiting(_WHAT) as process_group:
        dist.all_to_all_single(received, payload, sizes, sent, group=process_group)
    start = 0
    for rows in of_peer:
        for part, kind in rows:
            dtype, (_, _, _, height, width, _) = part.wanted.kinds[kind], part.row
            stop = start + height * width * dtype.itemsize
            # A view of another dtype has to begin at a multiple of its size.
            values = received[start:stop] if start % dtype.itemsize == 0 else received[start:stop].clone()
            _destination(part, kind).copy_(values.view(dtype).view(height, width))
            start = stop


def _tell(requests: Sequence[Sequence[Sequence[int]]]) -> list[torch.Tensor]:
    """Collective. Every rank's requests to this one, int64 ``[n, 7]``, by rank."""
    columns, group = 7, control_group()
    lengths = torch.tensor([len(rows) for rows in requests], dtype=torch.int64)
    theirs = torch.empty_like(lengths)
    own = torch.tensor([row for rows in requests for row in rows], dtype=torch.int64).view(-1, columns)
    with waiting(_WHAT, range(len(requests))):
        dist.all_to_all_single(theirs, lengths, group=group)
        got = torch.empty(int(theirs.sum()), columns, dtype=torch.int64)
        dist.all_to_all_single(got, own, theirs.tolist(), lengths.tolist(), group=group)
    return list(torch.split(got, theirs.tolist()))
