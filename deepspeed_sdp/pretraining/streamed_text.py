"""The text of a recipe: a source that is tokenised on the fly."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from deepspeed_sdp.agreement import agreed, from_first_rank
from deepspeed_sdp.data import unigram_loss, vocab_size
from deepspeed_sdp.data.faults import Skipped
from deepspeed_sdp.data.heldout import HeldoutSequences
from deepspeed_sdp.data.source import SourceSpec
from deepspeed_sdp.data.streaming import StreamedSequences, check_lanes
from deepspeed_sdp.data.tokenizer import find_tokenizer
from deepspeed_sdp.errors import DataError, OutputError
from deepspeed_sdp.files import begin_folder, replace_folder
from deepspeed_sdp.pretraining.schema import DataSection
from deepspeed_sdp.pretraining.text import Batch

HELDOUT = "heldout.npz"
# Of a stream, where all of them are asked for.
_HELDOUT_SEQUENCES = 1024


class StreamedText:
    """A source that is tokenised on the fly; see :class:`Text` and :class:`StreamedSequences`.

    Held-out documents are those that shards of the same source hold out; the first of them are evaluated. Rank 0 reads
    them once, into ``OUTPUT/heldout.npz``, which all ranks load. The unigram loss is that of their own frequencies: a
    little too low.
    """

    def __init__(
        self,
        spec: SourceSpec | Sequence[SourceSpec],
        tokenizer: str,
        data: DataSection,
        output: Path,
        *,
        heldout_sequences: int,
        heldout_fraction: float,
        global_batch: int,
    ) -> None:
        """Collective.

        Args:
            data: length and order of the sequences, and the number of lanes.
            heldout_sequences: of an evaluation; 0: all.
            global_batch: sequences of a step on all ranks.

        Raises:
            ConfigError: ``num_lanes`` is no multiple of the ranks that divides the global batch.
            DataError: the source or tokenizer cannot be found, too few documents are held out, or this rank does not
                see what rank 0 sees.
            OutputError: the tokenizer or the held-out text cannot be saved into ``output``.
        """
        self._spec, self._data, self._heldout_fraction = spec, data, heldout_fraction
        self._global_batch = global_batch
        if data.num_lanes is not None:  # The held-out text is read first, by one rank, for which any number may do.
            check_lanes(data.num_lanes, dist.get_world_size(), global_batch)
        self._tokenizer = agreed(lambda: find_tokenizer(tokenizer))
        self.tokenizer_folder = output / "tokenizer"
        from_first_rank(self._save_tokenizer)
        self._stream: StreamedSequences | None = None
        self._state: dict[str, Any] = {}
        heldout = self._read_heldout(output / HELDOUT, heldout_sequences or _HELDOUT_SEQUENCES)
        self.heldout = heldout.examples(data.document_reset)
        self.unigram_val_loss = unigram_loss(heldout.ids, heldout.ids, vocab_size(self._tokenizer))
        # Those of the held-out text are rank 0's, which read it.
        self._heldout_skipped = heldout.skipped if dist.get_rank() == 0 else Skipped()

    def batches(self, rank: int, world_size: int, batch_size: int, start_sample: int) -> Iterator[Batch]:
        """See :class:`Text`; where to begin, :meth:`load_state_dict` has said.

        Raises:
            DataError: a run goes on of which nothing is known.
        """
        if start_sample and not self._state:
            raise DataError("--stream: the checkpoint was made with --data; takes the same text to go on")
        self._stream = self._open(rank, world_size, batch_size)
        if self._state:
            self._stream.load_state_dict(self._state)
        yield from self._stream

    def state_dict(self) -> dict[str, Any]:
        """Collective: where the lanes of all ranks are."""
        return self._stream.gather_state() if self._stream is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._state = state

    def skipped(self) -> dict[str, int]:
        """What this rank passed over or tried again, by reason; that of the held-out text apart, on rank 0 alone.

        Rows that are read again, in another epoch or after a resumption, count again.
        """
        read = dict(self._stream.skipped.counts) if self._stream is not None else {}
        return read | {f"held-out text: {reason}": n for reason, n in self._heldout_skipped.counts.items()}

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self._stream is not None:
            self._stream.close()

    def _read_heldout(self, path: Path, count: int) -> HeldoutSequences:
        stream = agreed(lambda: self._open(0, 1, 1))
        identity = stream.heldout_identity(count)

        def read() -> None:
            if HeldoutSequences.load(path, identity) is None:
                stream.heldout(count, progress=True).save(path, identity)

        from_first_rank(read)

        def load() -> HeldoutSequences:
            found = HeldoutSequences.load(path, identity)
            if found is None:
                raise DataError(
                    f"{path}: rank {dist.get_rank()} does not find there what rank 0 wrote; --output_dir and the files "
                    "of --stream must be the same on all nodes"
                )
            return found

        return agreed(load)

    def _open(self, rank: int, world_size: int, batch_size: int) -> StreamedSequences:
        data = self._data
        return StreamedSequences(
            self._spec,
            self._tokenizer,
            data.seq_length,
            rank=rank,
            world_size=world_size,
            micro_batch=batch_size,
            global_batch=self._global_batch,
            num_lanes=data.num_lanes,
            seed=data.seed,
            heldout_fraction=self._heldout_fraction,
            reset=data.document_reset,
        )

    def _save_tokenizer(self) -> None:
        try:
            staged = begin_folder(self.tokenizer_folder)
            self._tokenizer.save_pretrained(staged)
            replace_folder(staged, self.tokenizer_folder)
        except OSError as error:
            raise OutputError(f"--output_dir: cannot write {self.tokenizer_folder}: {error}") from None
