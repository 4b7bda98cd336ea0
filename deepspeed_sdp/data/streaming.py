"""Training sequences tokenised on the fly, in an order that does not depend on the number of ranks."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from deepspeed_sdp.data.background import Ahead, check_stop
from deepspeed_sdp.data.encoding import DocumentEncoder
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.heldout import HeldoutSequences, read_heldout
from deepspeed_sdp.data.lanes import LaneReader, LaneSequence, Position
from deepspeed_sdp.data.reading import CHUNK_ROWS
from deepspeed_sdp.data.separation import Reset, check_reset, packed_example
from deepspeed_sdp.data.source import Source, SourceSpec, find_source
from deepspeed_sdp.data.tokenizer import tokenizer_hash
from deepspeed_sdp.errors import ConfigError, DataError
from deepspeed_sdp.schemas import Count, Schema, check_value

Example = dict[str, torch.Tensor]

_Rows = list[tuple[int, LaneSequence]]

_FORMAT = 1
_MOST_LANES = 64


class _Lanes(Schema):
    num_lanes: int = Field(ge=1)
    lanes: dict[str, Annotated[list[Count], Field(min_length=7, max_length=7)]]


class StreamedSequences:
    """Micro-batches of this rank, without end.

    The source is dealt to ``num_lanes`` lanes (:mod:`deepspeed_sdp.data.lanes`). Lane ``l`` is read by rank
    ``l % world_size``. Round ``k`` is the ``k``-th sequence of every lane, and a global batch is ``global_batch /
    num_lanes`` consecutive rounds, of which a rank takes those of its lanes, lanes ascending within a round. So a
    global batch is the same set of sequences for every number of ranks that divides the lanes, and every micro-batch.

    Args:
        spec: what to read.
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
        ConfigError: numbers that do not divide one another.
        DataError: the source cannot be found.
    """

    def __init__(
        self,
        spec: SourceSpec,
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
        source = find_source(spec, self.skipped)
        self._identity = {
            "source": hashlib.sha256(json.dumps(source.identity(), sort_keys=True).encode()).hexdigest(),
            "tokenizer": tokenizer_hash(tokenizer),
            "seq_length": seq_length,
            "seed": seed,
            "heldout_fraction": heldout_fraction,
            "add_bos": add_bos,
            "chunk_rows": chunk_rows,
        }
        lanes = lanes_for(global_batch, world_size) if num_lanes is None else num_lanes
        encoder = DocumentEncoder(tokenizer, add_bos)
        self._reader = LaneReader(
            source, encoder, seq_length, lanes, seed, heldout_fraction, self.skipped, chunk_rows
        )  # fmt: skip
        self._positions: dict[int, Position] = {}
        self._ahead: Ahead[_Rows] | None = None
        self._set_lanes(lanes, {})

    @property
    def source(self) -> Source:
        """With the files, and the commit of a hub data set."""
        return self._reader.source

    @property
    def num_lanes(self) -> int:
        """Also after :meth:`load_state_dict`."""
        return self._reader.num_lanes

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        """The next micro-batch: int64 ``[B, T]`` each.

        Raises:
            DataError: a fault at which the policy is to stop, or a lane without documents.
        """
        if self._ahead is None:
            batches = _micro_batches(self._reader, dict(self._positions), self.micro_batch)
            self._ahead = Ahead(batches, self.prefetch, self)
        rows = self._ahead.take()
        for lane, row in rows:
            self._positions[lane] = row.after
        examples = [packed_example(row.ids, row.starts, self.reset) for _, row in rows]
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def close(self) -> None:
        """End the thread. Taking another micro-batch starts it again, at the exact next sequence."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's lanes are, as JSON. Take it between optimizer steps, and merge those of all ranks."""
        lanes = {str(lane): list(position) for lane, position in sorted(self._positions.items())}
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
        check_value(dict(state), _Lanes, DataError, "stream state")
        lanes = {lane: Position(*position) for lane, position in state["lanes"].items()}
        if len(lanes) != state["num_lanes"] or set(lanes) != set(map(str, range(state["num_lanes"]))):
            raise DataError(
                f"stream state: has {len(lanes)} of {state['num_lanes']} lanes; takes the merged state of all ranks"
            )
        self._set_lanes(state["num_lanes"], {int(lane): position for lane, position in lanes.items()})

    def heldout(self, count: int, progress: bool = False) -> HeldoutSequences:
        """The first ``count`` sequences of held-out documents, in the order of the source: the same on every rank.

        Reads about ``count * seq_length / heldout_fraction`` tokens of text for it.

        Raises:
            DataError: there are fewer, or a fault at which the policy is to stop.
        """
        reader = self._reader
        return read_heldout(
            self.source, reader.encoder, reader.heldout_fraction, reader.seq_length, count, progress
        )  # fmt: skip

    def heldout_identity(self, count: int) -> dict[str, Any]:
        """Of everything that decides over :meth:`heldout`, as JSON."""
        keys = ("source", "tokenizer", "seq_length", "heldout_fraction", "add_bos")
        return {"format": _FORMAT, **{key: self._identity[key] for key in keys}, "count": count}

    def _set_lanes(self, lanes: int, positions: Mapping[int, Position]) -> None:
        check_lanes(lanes, self.world_size, self.global_batch)
        self.close()
        self._reader.num_lanes = lanes
        own = range(self.rank, lanes, self.world_size)
        self._positions = {lane: positions.get(lane, Position()) for lane in own}


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


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one.

    Raises:
        DataError: they are not of one stream, or two hold the same lane.
    """
    merged = {**states[0], "lanes": {}}
    for state in states:
        if {**state, "lanes": {}} != {**states[0], "lanes": {}}:
            raise DataError("stream state: those of two ranks are of different streams")
        if merged["lanes"].keys() & state["lanes"].keys():
            raise DataError("stream state: two ranks hold the same lane")
        merged["lanes"] |= state["lanes"]
    merged["lanes"] = {lane: merged["lanes"][lane] for lane in sorted(merged["lanes"], key=int)}
    return merged


def _micro_batches(reader: LaneReader, positions: Mapping[int, Position], micro_batch: int) -> Iterator[_Rows]:
    sequences = _sequences(reader, positions)
    while True:
        yield [next(sequences) for _ in range(micro_batch)]


def _sequences(reader: LaneReader, positions: Mapping[int, Position]) -> Iterator[tuple[int, LaneSequence]]:
    streams = {lane: reader.sequences(lane, position) for lane, position in positions.items()}
    delivered = {lane: position.sequences for lane, position in positions.items()}
    while True:
        check_stop()
        lane = min(delivered, key=lambda lane: (delivered[lane], lane))
        delivered[lane] += 1
        yield lane, next(streams[lane])
