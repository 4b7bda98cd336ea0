"""On ranks: text that is tokenised on the fly."""

from pathlib import Path

import torch.distributed as dist

from deepspeed_sdp.data import FaultPolicy, SourceSpec, StreamedSequences
from deepspeed_sdp.errors import SDPError
from deepspeed_sdp.pretraining.recipe import read_recipe
from deepspeed_sdp.pretraining.streamed_text import StreamedText


def open_and_read(recipe, source, tokenizer, output, policy=None, seq_length=32, sequences=4):
    """What this rank read, or its error."""
    readings = []
    heldout = StreamedSequences.heldout

    def counted(self, count, progress=False):
        readings.append(count)
        return heldout(self, count, progress)

    changes = {
        "data.seq_length": seq_length,
        "logging.eval_sequences": sequences,
        "deepspeed.train_batch_size": 4,
        "deepspeed.train_micro_batch_size_per_gpu": 1,
    }
    settings = [(key, str(value)) for key, value in changes.items()]
    StreamedSequences.heldout = counted
    try:
        spec, run = SourceSpec((source,), faults=FaultPolicy(**policy or {})), read_recipe(recipe, settings)
        text = StreamedText(
            spec,
            tokenizer,
            run.data,
            Path(output),
            heldout_sequences=run.logging.eval_sequences,
            heldout_fraction=0.1,
            global_batch=4,
        )
        batches = text.batches(dist.get_rank(), dist.get_world_size(), 1, 0)
        next(batches)
        ids = [row["input_ids"].tolist() for row in text.heldout]
        text.close()
        return {"readings": readings, "ids": ids, "loss": text.unigram_val_loss, "skipped": text.skipped()}
    except SDPError as error:
        return {"readings": readings, "error": f"{type(error).__name__}: {error}"}
    finally:
        StreamedSequences.heldout = heldout
