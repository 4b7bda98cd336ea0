"""Sequences out of shards."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.data import RankSampler, ShardOptions, SourceSpec, open_shards, prepare_shards
from deepspeed_sdp.data.shard_writer import index_name
from deepspeed_sdp.errors import ConfigError, DataError
from tests.data.fineweb import write_parquet


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, documents):
    """The same tokens in shards of two sizes."""
    root = tmp_path_factory.mktemp("shards")
    tokenizer.save_pretrained(root / "tokenizer")
    spec = SourceSpec((str(write_parquet(root / "a.parquet", documents)),))
    for size in (37, 10**6):
        options = ShardOptions(spec, str(root / "tokenizer"), heldout_fraction=0.1, shard_tokens=size)
        prepare_shards(root / str(size), options, workers=1)
    return root / "37", root / str(10**6)


@settings(max_examples=25)
@given(seq_length=st.integers(2, 200), split=st.sampled_from(["train", "heldout"]))
def test_sequences_are_the_stream_whatever_the_shards(folders, seq_length, split):
    stream = np.fromfile(folders[1] / f"{split}-00000.bin", "<u2")
    starts = set(np.fromfile(folders[1] / index_name(split), "<i8").tolist())
    small, large = (open_shards(folder).sequences(split, seq_length, "attention") for folder in folders)
    assert len(small) == len(large) == len(stream) // seq_length
    for index in {0, len(small) // 2, len(small) - 1}:
        first = index * seq_length
        row = small[index]
        assert all(torch.equal(row[name], value) for name, value in large[index].items())
        assert row["input_ids"].tolist() == stream[first : first + seq_length].tolist()
        begins = [place for place in range(seq_length) if first + place in starts]
        assert (row["labels"] == -100).nonzero().flatten().tolist() == begins
        assert all(row["position_ids"][place] == 0 for place in [0, *begins])
    with pytest.raises(IndexError):
        small[len(small)]


def test_documents_begin_after_the_end_of_others(folders):
    shards = open_shards(folders[0])
    row = shards.sequences("train", 150, "positions")[1]
    restarts = (row["position_ids"][1:] == 0).nonzero().flatten()
    assert len(restarts)
    assert (row["input_ids"][restarts] == shards.eos_token_id).all()
    assert row["input_ids"].dtype == row["position_ids"].dtype == torch.int64


@settings(max_examples=25)
@given(ranks=st.integers(1, 5), batch=st.integers(1, 3), later=st.integers(1, 5), done=st.integers(0, 6))
def test_each_sequence_is_dealt_once_per_epoch_over_any_ranks(folders, ranks, batch, later, done):
    sequences = open_shards(folders[0]).sequences("train", 64)
    sampler = RankSampler(len(sequences), seed=3)

    def deal(world, start, count):
        streams = [sampler.batches(rank, world, batch, start) for rank in range(world)]
        return [int(i) for _ in range(count) for stream in streams for i in next(stream)]

    seen = deal(ranks, 0, done)
    seen += deal(later, len(seen), -(-len(sequences) // (later * batch)))
    assert sorted(seen[: len(sequences)]) == list(range(len(sequences)))


def test_a_loader_with_workers_reads_the_same(folders):
    sequences = open_shards(folders[0]).sequences("train", 64)
    assert torch.equal(sequences[1]["input_ids"], pickle.loads(pickle.dumps(sequences))[1]["input_ids"])
    assert len(pickle.dumps(sequences)) < 100_000


def test_unusable_shards_are_one_clear_error(folders, tmp_path):
    shards = open_shards(folders[1])
    with pytest.raises(DataError, match=r"\d+ heldout tokens are too few for one sequence of 100000"):
        shards.sequences("heldout", 100_000)
    with pytest.raises(ConfigError, match="--seq_length: got 1"):
        shards.sequences("train", 1)
    with pytest.raises(ConfigError, match="split: got 'test'"):
        shards.sequences("test", 64)
    with pytest.raises(DataError, match="holds no finished shards"):
        open_shards(tmp_path)
    (tmp_path / "manifest.json").write_text((folders[1] / "manifest.json").read_text())
    with pytest.raises(DataError, match=r"bin: is no file within"):
        open_shards(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        open_shards(tmp_path)
