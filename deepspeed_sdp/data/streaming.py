"""Training sequences tokenised on the fly, in an order that does not depend on the number of ranks."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deepspeed_sdp.data.background import Ahead, check_stop
from deepspeed_sdp.data.encoding import DocumentEncoder
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.heldout import HeldoutSequences, join, read_heldout
from deepspeed_sdp.data.lanes import LaneReader, LaneSequence, Position
from deepspeed_sdp.data.mixture import Mixture
from deepspeed_sdp.data.reading import CHUNK_ROWS
from deepspeed_sdp.data.separation import Reset, check_reset, packed_example
from deepspeed_sdp.data.source import Source, SourceSpec, find_source
from deepspeed_sdp.data.stream_state import Places, lanes_of, merge_states
from deepspeed_sdp.data.tokenizer import tokenizer_hash
from deepspeed_sdp.errors import ConfigError, DataError

Example = dict[str, torch.Tensor]

# Lane, source and sequence of each row.
_Rows = list[tuple[int, int, LaneSequence]]

_FORMAT = 1
_MOST_LANES = 64


class StreamedSequences:
    """Micro-batches of this rank, without end.

    A source is dealt to ``num_lanes`` lanes (:mod:`deepspeed_sdp.data.lanes`). Lane ``l`` is read by rank
    ``l % world_size``. Round ``k`` is the ``k``-th sequence of every lane, and a global batch is ``global_batch /
    num_lanes`` consecutive rounds, of which a rank takes those of its lanes, lanes ascending within a round. So a
    global batch is the same set of sequences for every number of ranks that divides the lanes, and every micro-batch.

    Of several sources each is dealt to all lanes, and which of them a lane's next sequence is of follows from its
    number (:class:`Mixture`). A source that comes to its end begins its own next epoch.

    Args:
        spec: what to read; several sources are mixed by their ``weight``.
        tokenizer: has an end-of-sequence token, which is put after each document.
        seq_length: tokens per sequence, ``T``.
        rank, world_size: of this process.
        micro_batch: sequences per micro-batch, ``B``.
        global_batch: sequences per optimizer step over all ranks (``train_batch_size``).
        num_lanes: default: :func:`lanes_for`. A run goes on with those it began with (:meth:`load_state_dict`).
        seed: of the order.
        heldout_fraction: documents held out, by their hash: not trained on.
        reset: see :func:`deepspeed_sdp.data.separation.packed_example`.
        add_bos: as for shards.
        prefetch: micro-batches that are made ahead, in a thread.

    Raises:
        ConfigError: numbers that do not divide one another, or a weight that is not positive.
        DataError: the source cannot be found.
    """

    def __init__(
        self,
        spec: SourceSpec | Sequence[SourceSpec],
        tokenizer: PreTrainedTokenizerBase,
        seq_length: int,
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        global_batch: int,
        num_lanes: int | None = None,
        seed: int = 0,
        heldout_fraction: float = 0.005,
        reset: Reset = "none",
        add_bos: bool = False,
        prefetch: int = 4,
        chunk_rows: int = CHUNK_ROWS,
    ) -> None:
        if seq_length < 2:
            raise ConfigError(f"--seq_length: got {seq_length}; takes a number from 2 on")
        if global_batch % (world_size * micro_batch):
            raise ConfigError(
                f"global_batch: got {global_batch}; takes a multiple of {world_size} ranks x micro-batches of "
                f"{micro_batch}"
            )
        self.rank, self.world_size, self.micro_batch, self.global_batch = rank, world_size, micro_batch, global_batch
        self.reset = check_reset(reset)
        self.prefetch = prefetch
        #: What this process skipped or tried again; rows that are read again after a resumption count again.
        self.skipped = Skipped()
        specs = [spec] if isinstance(spec, SourceSpec) else list(spec)
        self._mixture = Mixture([spec.weight for spec in specs], seed)
        #: With the files, and the commits of hub data sets.
        self.sources = [find_source(spec, self.skipped) for spec in specs]
        self._identity = {
            "source": _sha256(self.sources, self._mixture),
            "tokenizer": tokenizer_hash(tokenizer),
            "seq_length": seq_length,
            "seed": seed,
            "heldout_fraction": heldout_fraction,
            "add_bos": add_bos,
            "chunk_rows": chunk_rows,
        }
        lanes = lanes_for(global_batch, world_size) if num_lanes is None else num_lanes
        encoder = DocumentEncoder(tokenizer, add_bos)
        self._readers = [
            LaneReader(source, encoder, seq_length, lanes, seed, heldout_fraction, self.skipped, chunk_rows)
            for source in self.sources
        ]
        self._positions: dict[int, Places] = {}
        self._ahead: Ahead[_Rows] | None = None
        self._set_lanes(lanes, {})

    @property
    def num_lanes(self) -> int:
        """Also after :meth:`load_state_dict`."""
        return self._readers[0].num_lanes

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        """The next micro-batch: int64 ``[B, T]`` each.

        Raises:
            DataError: a fault at which the policy is to stop, or a lane without documents.
        """
        if self._ahead is None:
            batches = _micro_batches(self._readers, self._mixture, dict(self._positions), self.micro_batch)
            self._ahead = Ahead(batches, self.prefetch, self)
        rows = self._ahead.take()
        for lane, source, row in rows:
            places = self._positions[lane]
            self._positions[lane] = (*places[:source], row.after, *places[source + 1 :])
        examples = [packed_example(row.ids, row.starts, self.reset) for _, _, row in rows]
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def close(self) -> None:
        """End the thread. Taking another micro-batch starts it again, at the exact next sequence."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's lanes are, as JSON. Take it between optimizer steps, and merge those of all ranks."""
        lanes = {str(lane): [n for place in places for n in place] for lane, places in sorted(self._positions.items())}
        return {"format": _FORMAT, **self._identity, "num_lanes": self.num_lanes, "lanes": lanes}

    def gather_state(self) -> dict[str, Any]:
        """Collective: the merged state of all ranks, the same on each of them."""
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size() == 1:
            return merge_states([self.state_dict()])
        from deepspeed_sdp.ranks import gather_objects

        return merge_states(gather_objects(self.state_dict(), "collecting the places in the stream"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the ranks of a merged state stood, on any number of ranks that divides its lanes.

        Raises:
            DataError: it is of another source, tokenizer, sequence length, seed or held-out part, or lacks lanes.
            ConfigError: this number of ranks, or the global batch, does not fit its lanes.
        """
        other = [key for key, value in {"format": _FORMAT, **self._identity}.items() if state.get(key) != value]
        if other:
            raise DataError(f"stream state: was saved with another {', '.join(other)}; takes the same to go on")
        self._set_lanes(state["num_lanes"], lanes_of(state, len(self.sources)))

    def heldout(self, count: int, progress: bool = False) -> HeldoutSequences:
        """The first ``count`` sequences of held-out documents, in the order of the source: the same on every rank.

        Reads about ``count * seq_length / heldout_fraction`` tokens of text for it. Of several sources each gives its
        share, one after another.

        Raises:
            DataError: there are fewer, or a fault at which the policy is to stop.
        """
        return join(
            [
                read_heldout(reader.source, reader.encoder, reader.heldout_fraction, reader.seq_length, share, progress)
                for reader, share in zip(self._readers, self._mixture.counts(count), strict=True)
                if share
            ]
        )

    def heldout_identity(self, count: int) -> dict[str, Any]:
        """Of everything that decides over :meth:`heldout`, as JSON."""
        keys = ("source", "tokenizer", "seq_length", "heldout_fraction", "add_bos")
        return {"format": _FORMAT, **{key: self._identity[key] for key in keys}, "count": count}

    def _set_lanes(self, lanes: int, positions: Mapping[int, Places]) -> None:
        check_lanes(lanes, self.world_size, self.global_batch)
        self.close()
        for reader in self._readers:
            reader.num_lanes = lanes
        begin = (Position(),) * len(self.sources)
        self._positions = {lane: positions.get(lane, begin) for lane in range(self.rank, lanes, self.world_size)}


def check_lanes(lanes: int, world_size: int, global_batch: int) -> None:
    """Refuse a number of lanes that ranks cannot share evenly.

    Raises:
        ConfigError: it is no multiple of the ranks that divides the global batch.
    """
    if lanes < 1 or lanes % world_size or global_batch % lanes:
        raise ConfigError(
            f"--num_lanes: got {lanes}; takes a multiple of the {world_size} ranks that divides the global batch of "
            f"{global_batch}"
        )


def lanes_for(global_batch: int, world_size: int) -> int:
    """The most lanes, up to 64 (or the number of ranks), that divide a global batch and are a multiple of the ranks.

    Raises:
        ConfigError: ``global_batch`` is no multiple of the ranks.
    """
    if global_batch % world_size:
        raise ConfigError(f"global_batch: got {global_batch}; takes a multiple of the {world_size} ranks")
    most = max(_MOST_LANES, world_size)
    return max(n for n in range(world_size, most + 1, world_size) if global_batch % n == 0)


def _sha256(sources: Sequence[Source], mixture: Mixture) -> str:
    stated = [source.identity() for source in sources]
    what = stated[0] if len(stated) == 1 else {"sources": stated, "shares": mixture.shares}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _micro_batches(
    readers: Sequence[LaneReader], mixture: Mixture, positions: Mapping[int, Places], micro_batch: int
) -> Iterator[_Rows]:
    sequences = _sequences(readers, mixture, positions)
    while True:
        yield [next(sequences) for _ in range(micro_batch)]


def _sequences(
    readers: Sequence[LaneReader], mixture: Mixture, positions: Mapping[int, Places]
) -> Iterator[tuple[int, int, LaneSequence]]:
    streams = {
        lane: [reader.sequences(lane, place) for reader, place in zip(readers, places, strict=True)]
        for lane, places in positions.items()
    }
    delivered = {lane: sum(place.sequences for place in places) for lane, places in positions.items()}
    while True:
        check_stop()
        lane = min(delivered, key=lambda lane: (delivered[lane], lane))
        source = mixture.of(delivered[lane] * readers[0].num_lanes + lane)
        delivered[lane] += 1
        yield lane, source, next(streams[lane][source])
