"""The text of a run: shards that were prepared, a stream, or a small text that is prepared now."""

from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from deepspeed_sdp.agreement import agreed, from_first_rank
from deepspeed_sdp.data import (
    FaultPolicy,
    ShardOptions,
    SourceSpec,
    load_tokenizer,
    open_shards,
    prepare_shards,
    unigram_loss,
    vocab_size,
)
from deepspeed_sdp.data.source import HUB
from deepspeed_sdp.data.tokenizer import find_tokenizer
from deepspeed_sdp.errors import DataError
from deepspeed_sdp.pretraining.recipe import Run
from deepspeed_sdp.pretraining.schema import STREAM_HELDOUT, TEXT_HELDOUT, DataSection
from deepspeed_sdp.pretraining.streamed_text import StreamedText
from deepspeed_sdp.pretraining.text import PackedText, Text

# Enough for the frequencies of tokens.
_COUNTED_SEQUENCES = 4096
_VOCAB = 4096


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
    return agreed(lambda: open_shard_text(cache, data), lambda found: found.state_dict())


def open_shard_text(folder: Path, data: DataSection) -> Text:
    """The shards in a folder, as ``deepspeed-sdp data`` leaves them.

    Raises:
        DataError: there are none, fewer tokens than one sequence, or those of another tokenizer.
    """
    shards = open_shards(folder)
    size = vocab_size(load_tokenizer(shards.tokenizer_folder))
    if size != shards.vocab_size:
        raise DataError(f"{folder}: the manifest has {shards.vocab_size} ids; its tokenizer has {size}")
    train = shards.sequences("train", data.seq_length, data.document_reset)
    heldout = shards.sequences("heldout", data.seq_length, data.document_reset)
    stride = max(1, len(train) // _COUNTED_SEQUENCES)
    counted = train.ids(range(0, len(train), stride))
    measured = heldout.ids(range(min(len(heldout), _COUNTED_SEQUENCES)))
    loss = unigram_loss(counted, measured, shards.vocab_size)
    identity = {
        "tokens": shards.content("train"),
        "seq_length": data.seq_length,
        "document_reset": data.document_reset,
    }
    return PackedText(shards.tokenizer_folder, train, heldout, loss, data.seed, identity)


def stream_sources(data: DataSection) -> list[SourceSpec]:
    """What is read of a stream: its paths as one source, or each with a weight."""
    assert data.stream is not None
    if data.weights is None:
        return [_source(data, data.stream, "--stream")]
    weighted = zip(data.stream, data.weights, strict=True)
    return [replace(_source(data, (path,), "--stream"), weight=weight) for path, weight in weighted]


def _source(data: DataSection, paths: tuple[str, ...], option: str) -> SourceSpec:
    said = {name: getattr(data, name) for name in ("on_broken_row", "on_broken_file", "retries")}
    policy = FaultPolicy(**{name: value for name, value in said.items() if value is not None})
    column = SourceSpec.text_column if data.text_column is None else data.text_column
    # Beside a hub data set that is mixed with them there may be local files, which have neither.
    is_mixed_in = data.weights is not None and len(data.weights) > 1 and not paths[0].startswith(HUB)
    hub = (None, None) if is_mixed_in else (data.hub_config, data.hub_revision)
    return SourceSpec(paths, *hub, text_column=column, faults=policy, option=option)


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
    options = ShardOptions(
        _source(data, data.text, "--text"),
        data.tokenizer,
        expected_vocab(data),
        heldout_fraction=data.heldout_fraction or TEXT_HELDOUT,
    )
    # In this process alone: another one would take longer to start than such a text to tokenise.
    splits = prepare_shards(cache, options, workers=1, overwrite="outdated", progress=True)["splits"]
    train, heldout = (splits[name]["tokens"] for name in ("train", "heldout"))
    print(f"text: {train:,} tokens to train on, {heldout:,} held out", flush=True)
