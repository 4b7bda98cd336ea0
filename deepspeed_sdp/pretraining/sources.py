"""The text of a run: shards that were prepared, a stream, or a small text that is prepared now."""

from pathlib import Path

import numpy as np
import torch.distributed as dist

from deepspeed_sdp.agreement import agreed, from_first_rank
from deepspeed_sdp.data import (
    CorpusSpec,
    FaultPolicy,
    SourceSpec,
    load_corpus,
    load_tokenizer,
    open_shards,
    prepare_corpus,
    unigram_loss,
    vocab_size,
)
from deepspeed_sdp.data.source import HUB
from deepspeed_sdp.data.tokenizer import find_tokenizer
from deepspeed_sdp.errors import DataError
from deepspeed_sdp.pretraining.recipe import Run
from deepspeed_sdp.pretraining.schema import BUILTIN, STREAM_HELDOUT, TEXT_HELDOUT, DataSection
from deepspeed_sdp.pretraining.streamed_text import StreamedText
from deepspeed_sdp.pretraining.text import PackedText, Text

# Enough for the frequencies of tokens.
_COUNTED_SEQUENCES = 4096
_VOCAB, _TEXT_MB = 4096, 8.0


def open_text(run: Run, output: Path) -> Text:
    """Collective. The text that ``run.data`` names; what is prepared of it lies in ``output``.

    Raises:
        DataError, OutputError: on all ranks alike: it cannot be read, or nothing be written.
    """
    data = run.data
    if data.path is not None:
        folder = Path(data.path)
        return agreed(lambda: open_shard_text(folder, data), lambda found: found.state_dict())
    if data.stream is not None:
        assert data.tokenizer is not None
        return StreamedText(
            stream_sources(data),
            data.tokenizer,
            data,
            output,
            heldout_sequences=run.logging.eval_sequences,
            heldout_fraction=data.heldout_fraction or STREAM_HELDOUT,
            global_batch=run.global_batch(dist.get_world_size()),
        )
    cache = Path(data.cache) if data.cache else output / "data"
    from_first_rank(lambda: _prepare(data, cache))
    return agreed(lambda: PackedText.of(load_corpus(cache), data.seed), lambda found: found.state_dict())


def open_shard_text(folder: Path, data: DataSection) -> Text:
    """The shards in a folder, as ``deepspeed-sdp data`` leaves them.

    Raises:
        DataError: there are none, fewer tokens than one sequence, or those of another tokenizer.
    """
    shards = open_shards(folder)
    size = vocab_size(load_tokenizer(shards.tokenizer_folder))
    if size != shards.vocab_size:
        raise DataError(f"--data: the manifest of {folder} has {shards.vocab_size} ids; its tokenizer has {size}")
    train = shards.sequences("train", data.seq_length, data.document_reset)
    heldout = shards.sequences("heldout", data.seq_length, data.document_reset)
    stride = max(1, len(train) // _COUNTED_SEQUENCES)
    counted = np.stack([train[i]["input_ids"].numpy() for i in range(0, len(train), stride)])
    measured = np.stack([heldout[i]["input_ids"].numpy() for i in range(min(len(heldout), _COUNTED_SEQUENCES))])
    loss = unigram_loss(counted, measured, shards.vocab_size)
    identity = {
        "shards": shards.manifest["fingerprint"],
        "seq_length": data.seq_length,
        "document_reset": data.document_reset,
    }
    return PackedText(shards.tokenizer_folder, train, heldout, loss, data.seed, identity)


def stream_sources(data: DataSection) -> list[SourceSpec]:
    """What is read of a stream: its paths as one source, or each with a weight."""
    said = {name: getattr(data, name) for name in ("on_broken_row", "on_broken_file", "retries")}
    policy = FaultPolicy(**{name: value for name, value in said.items() if value is not None})
    column = SourceSpec.text_column if data.text_column is None else data.text_column
    assert data.stream is not None
    if data.weights is None:
        parts = [(data.stream, 1.0)]
    else:
        parts = [((path,), weight) for path, weight in zip(data.stream, data.weights, strict=True)]
    sources = []
    for paths, weight in parts:
        # Beside a hub data set there may be local files, which have neither.
        is_local = len(parts) > 1 and not paths[0].startswith(HUB)
        config, revision = (None, None) if is_local else (data.hub_config, data.hub_revision)
        sources.append(
            SourceSpec(paths, config, revision, text_column=column, faults=policy, option="--stream", weight=weight)
        )
    return sources


def find_tokenizer_folder(run: Run, folder: Path) -> Path | None:
    """A folder with the text's tokenizer, where there is one already; what has none yet is saved into ``folder``.

    Raises:
        DataError: it cannot be found.
    """
    data = run.data
    if data.path is not None:
        return open_shard_text(Path(data.path), data).tokenizer_folder
    if data.tokenizer is not None:
        find_tokenizer(data.tokenizer).save_pretrained(folder)
        return folder
    return None


def expected_vocab(data: DataSection) -> int | None:
    """Rows of the embedding where a tokenizer will be trained; ``None``: somebody else says."""
    return (data.vocab_size or _VOCAB) if data.text is not None and data.tokenizer is None else None


def _prepare(data: DataSection, cache: Path) -> None:
    assert data.text is not None
    print("preparing the text ...", flush=True)
    spec = CorpusSpec(
        text_files=() if data.text == (BUILTIN,) else data.text,
        tokenizer=data.tokenizer,
        vocab_size=data.vocab_size or _VOCAB,
        seq_length=data.seq_length,
        holdout_fraction=data.heldout_fraction or TEXT_HELDOUT,
        max_bytes=int((data.max_text_mb or _TEXT_MB) * 1e6),
    )
    corpus = prepare_corpus(cache, spec, progress=True)
    print(f"text: {corpus.train_tokens:,} tokens to train on, {corpus.heldout_tokens:,} held out", flush=True)
