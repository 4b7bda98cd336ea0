"""Killed at whatever operation on files, preparations leave the old or the new; the next run removes what is left."""

import shutil

import pytest

from deepspeed_sdp import files
from deepspeed_sdp.data import open_shards, prepare_shards
from deepspeed_sdp.data.heldout import HeldoutSequences
from deepspeed_sdp.data.preparation import Preparation
from deepspeed_sdp.data.shard_options import ShardOptions
from deepspeed_sdp.data.source import SourceSpec
from deepspeed_sdp.data.streaming import StreamedSequences
from tests.data.fineweb import write_jsonl
from tests.support.crashes import crashes

exchanging = pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "renames"])


def choose(monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)


@pytest.fixture
def options(tmp_path, tokenizer, documents):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = SourceSpec((str(write_jsonl(tmp_path / "a.jsonl", documents)),))

    def make(max_tokens=None):
        return ShardOptions(
            source, str(tmp_path / "tokenizer"), max_tokens=max_tokens, heldout_fraction=0.1, shard_tokens=1000
        )

    return make


@exchanging
@pytest.mark.parametrize("how", ["outdated", pytest.param("always", marks=pytest.mark.slow)])
def test_shards_that_are_replaced(tmp_path, options, monkeypatch, can_exchange, how):
    choose(monkeypatch, can_exchange)
    old = prepare_shards(tmp_path / "old", options(), workers=1)
    new = prepare_shards(tmp_path / "new", options(500), workers=1)
    monkeypatch.setattr(Preparation, "run", None)  # all is made already
    met = []
    for number, crash in enumerate(crashes(monkeypatch)):
        out = tmp_path / str(number) / "out"
        shutil.copytree(tmp_path / "old", out)
        staging = shutil.copytree(tmp_path / "new", out.with_name(".out.partial"))
        (staging / "progress.json").write_text("{}")
        with crash:
            prepare_shards(out, options(500), workers=1, overwrite=how)
        files.recover_folder(out)
        met.append(open_shards(out).manifest["splits"])
        prepare_shards(out, options(500), workers=1, overwrite=how if met[-1] == old["splits"] else "never")
        assert open_shards(out).manifest["splits"] == new["splits"]
        assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert met[0] == old["splits"]
    assert met[-1] == new["splits"]


@pytest.mark.slow
def test_shards_that_are_made(tmp_path, options, monkeypatch):
    whole = prepare_shards(tmp_path / "whole", options(), workers=1)
    for number, crash in enumerate(crashes(monkeypatch)):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        with crash:
            prepare_shards(out, options(), workers=1)
        found = prepare_shards(out, options(), workers=1)
        assert (found["files"], found["skipped"]) == (whole["files"], whole["skipped"])
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_held_out_text_that_is_replaced(tmp_path, tokenizer, documents, monkeypatch):
    source = SourceSpec((str(write_jsonl(tmp_path / "a.jsonl", documents * 3)),))
    stream = StreamedSequences(
        source, tokenizer, 32, rank=0, world_size=1, micro_batch=1, global_batch=1, num_lanes=1, heldout_fraction=0.3
    )
    made = {count: stream.heldout(count) for count in (2, 3)}
    about = {count: stream.heldout_identity(count) for count in made}
    met = []
    for number, crash in enumerate(crashes(monkeypatch)):
        file = tmp_path / str(number) / "heldout.npz"
        file.parent.mkdir()
        made[2].save(file, about[2])
        with crash:
            made[3].save(file, about[3])
        met.append([HeldoutSequences.load(file, about[count]) is not None for count in (2, 3)])
        made[3].save(file, about[3])
        assert [path.name for path in file.parent.iterdir()] == ["heldout.npz"]
    assert (met[0], met[-1]) == ([True, False], [False, True])
    assert sorted(map(sum, met)) == [1] * len(met)
