"""Shards: the same whatever the workers and interruptions, and never half finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspeed_sdp.data import FaultPolicy, ShardOptions, SourceSpec, open_shards, prepare_shards
from deepspeed_sdp.data.encoding import DocumentEncoder
from deepspeed_sdp.data.preparation import Preparation
from deepspeed_sdp.data.shard_worker import Documents
from deepspeed_sdp.data.shard_writer import SplitWriter, index_name
from deepspeed_sdp.data.split import is_heldout
from deepspeed_sdp.errors import ConfigError, DataError, OutputError
from tests.data.fineweb import write_jsonl, write_parquet
from tests.support.ranks import rank_environment


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved_tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def source(tmp_path, documents):
    folder = tmp_path / "source"
    folder.mkdir()
    write_parquet(folder / "a.parquet", documents[:30])
    write_jsonl(folder / "b.jsonl.gz", [*documents[30:45], None])
    write_jsonl(folder / "c.jsonl.zst", documents[45:])
    return folder


@pytest.fixture
def options(source, tokenizer_folder):
    def make(**changes):
        values = {"tokenizer": str(tokenizer_folder), "heldout_fraction": 0.1, "shard_tokens": 1000}
        spec = SourceSpec((str(source),), faults=changes.pop("faults", FaultPolicy()))
        return ShardOptions(**{"source": spec, **values, **changes})

    return make


def sums(manifest):
    return {file["name"]: file["sha256"] for file in manifest["files"]}


def tokens_of(folder, split):
    paths = sorted(folder.glob(f"{split}-*.bin"))
    return np.concatenate([np.fromfile(path, "<u2") for path in paths])


def test_every_document_is_there_once_with_its_end(tmp_path, options, documents, tokenizer):
    manifest = prepare_shards(tmp_path / "out", options(), workers=1)
    wanted = {
        "train": [t for t in documents if not is_heldout(t, 0.1)],
        "heldout": [t for t in documents if is_heldout(t, 0.1)],
    }
    for split, texts in wanted.items():
        ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in texts]
        assert tokens_of(tmp_path / "out", split).tolist() == [token for row in ids for token in row]
        starts = np.fromfile(tmp_path / "out" / index_name(split), "<i8")
        assert starts.tolist() == np.cumsum([0, *map(len, ids)])[:-1].tolist()
        said = manifest["splits"][split]
        assert said["documents"] == len(texts)
        assert said["bytes"] == said["characters"] == sum(map(len, texts))
        assert said["tokens"] == sum(map(len, ids))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("train-*.bin"))]
    assert set(sizes[:-1]) == {2000}
    assert manifest["skipped"]["row: text is null"]["count"] == 1
    assert not list(tmp_path.glob(".out*"))
    assert {*sums(manifest), "manifest.json"} == {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }


# The quick tests start workers where a fault stops them.
@pytest.mark.slow
def test_workers_make_the_same_bytes(tmp_path, options):
    alone = prepare_shards(tmp_path / "one", options(), workers=1)
    assert sums(prepare_shards(tmp_path / "two", options(), workers=2)) == sums(alone)


def test_it_stops_at_exactly_so_many_tokens(tmp_path, options):
    whole = prepare_shards(tmp_path / "whole", options(), workers=1)
    count = whole["splits"]["train"]["tokens"] // 2 + 1
    part = prepare_shards(tmp_path / "part", options(max_tokens=count, max_heldout_tokens=300), workers=1)
    assert part["splits"]["train"]["tokens"] == count
    assert part["splits"]["heldout"]["tokens"] == 300
    assert (tokens_of(tmp_path / "part", "train") == tokens_of(tmp_path / "whole", "train")[:count]).all()
    assert (tokens_of(tmp_path / "part", "heldout") == tokens_of(tmp_path / "whole", "heldout")[:300]).all()


KILLED = """
import sys, time
from pathlib import Path
from deepspeed_sdp.data import ShardOptions, SourceSpec, preparation, prepare_shards
preparation._SECONDS_BETWEEN_SYNCS = 0.0
take = preparation.Preparation._take
def slowly(self, block):
    take(self, block)
    time.sleep(0.3)
preparation.Preparation._take = slowly
source, tokenizer, out = sys.argv[1:]
options = ShardOptions(SourceSpec((source,)), tokenizer, heldout_fraction=0.1, shard_tokens=1000)
prepare_shards(Path(out), options, workers=1)
"""


@pytest.mark.slow
def test_a_killed_preparation_goes_on_where_it_was(tmp_path, options, source, tokenizer_folder):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(tokenizer_folder), str(out)]
    process = subprocess.Popen(command, env=rank_environment())
    progress = tmp_path / ".out.partial" / "progress.json"
    deadline = time.monotonic() + 180
    while not (progress.exists() and json.loads(progress.read_text())["place"][0] >= 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    with pytest.raises(DataError, match="no finished shards"):
        open_shards(out)
    done = json.loads(progress.read_text())
    resumed = prepare_shards(out, options(), workers=1)
    assert 0 < done["counts"]["train"]["tokens"] < resumed["splits"]["train"]["tokens"]
    assert resumed["seconds"] > done["seconds"]
    fresh = prepare_shards(tmp_path / "fresh", options(), workers=1)
    assert sums(resumed) == sums(fresh)
    assert resumed["skipped"] == fresh["skipped"]
    assert resumed["splits"] == fresh["splits"]


# Before the block, with half of it in the train split, between two shards, with all of it but what comes next.
INTERRUPTS = ["_take", "append heldout", "_open", "state"]


@pytest.mark.parametrize("where", INTERRUPTS)
def test_an_interrupt_within_a_block_leaves_no_document_twice(tmp_path, options, monkeypatch, where):
    fresh = prepare_shards(tmp_path / "fresh", options(), workers=1)
    calls = []

    def interrupt_after(owner, name, count, then=lambda self: None):
        method = getattr(owner, name)

        def interrupted(self, *arguments):
            calls.append(name)
            if len(calls) == count:
                then(self)
                raise KeyboardInterrupt
            return method(self, *arguments)

        monkeypatch.setattr(owner, name, interrupted)

    # Blocks of 7 rows; shards of 1000 tokens, some of which end within one.
    if where == "_take":
        interrupt_after(Preparation, "_take", 3)
    elif where == "append heldout":
        interrupt_after(SplitWriter, "append", 6)
    elif where == "_open":
        interrupt_after(SplitWriter, "_open", 4, then=lambda writer: writer._shard.close())
    else:
        interrupt_after(Preparation, "_state", 4)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(tmp_path / "out", options(), workers=1)
    monkeypatch.undo()
    progress = json.loads((tmp_path / ".out.partial" / "progress.json").read_text())
    assert 0 < progress["counts"]["train"]["documents"] < fresh["splits"]["train"]["documents"]
    (tmp_path / ".out.partial" / ".progress.json-0123abcd").write_text("{")
    resumed = prepare_shards(tmp_path / "out", options(), workers=1)
    assert sums(resumed) == sums(fresh)
    assert resumed["splits"] == fresh["splits"]
    assert resumed["skipped"] == fresh["skipped"]
    assert resumed["heldout"] == fresh["heldout"]


def test_a_finished_folder_is_reused_and_others_are_left_alone(tmp_path, options):
    out = tmp_path / "out"
    first = prepare_shards(out, options(), workers=1)
    assert prepare_shards(out, options(), workers=2) == first
    with pytest.raises(OutputError, match=r"another max_tokens.*--overwrite"):
        prepare_shards(out, options(max_tokens=500))
    assert open_shards(out).manifest == first
    second = prepare_shards(out, options(max_tokens=500), workers=1, overwrite="always")
    assert open_shards(out).manifest == second != first
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"other files too \(notes\.txt\)"):
        prepare_shards(out, options(), workers=1, overwrite="always")
    assert open_shards(out).manifest == second
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="something else than shards"):
        prepare_shards(tmp_path / "full", options(), overwrite="always")


def test_outdated_shards_are_made_anew_and_others_reused(tmp_path, options):
    out = tmp_path / "out"
    first = prepare_shards(out, options(), workers=1, overwrite="outdated")
    inode = out.stat().st_ino
    assert prepare_shards(out, options(), workers=1, overwrite="outdated") == first
    assert out.stat().st_ino == inode
    for damage in (
        lambda: (out / "train-00000.bin").write_bytes(b""),
        lambda: (out / "manifest.json").write_text("[]"),
        lambda: shutil.rmtree(out / "tokenizer"),
    ):
        damage()
        again = prepare_shards(out, options(), workers=1, overwrite="outdated")
        assert again["files"] == first["files"]
        assert open_shards(out).manifest == again
    assert prepare_shards(out, options(max_tokens=500), workers=1, overwrite="outdated") != first
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"other files too \(notes\.txt\)"):
        prepare_shards(out, options(), workers=1, overwrite="outdated")


def test_faults_stop_with_what_was_done_kept_and_go_on_when_allowed(tmp_path, options, source):
    (source / "b2.jsonl.gz").write_bytes((source / "b.jsonl.gz").read_bytes()[:300])
    with pytest.raises(DataError, match=r"b2\.jsonl\.gz: damaged or cut off"):
        prepare_shards(tmp_path / "out", options(), workers=1)
    kept = json.loads((tmp_path / ".out.partial" / "progress.json").read_text())
    assert kept["counts"]["train"]["documents"] > 30
    skip = FaultPolicy(on_broken_file="skip")
    resumed = prepare_shards(tmp_path / "out", options(faults=skip), workers=1)
    assert sums(resumed) == sums(prepare_shards(tmp_path / "fresh", options(faults=skip), workers=1))
    assert resumed["skipped"]["file: damaged or cut off in its compressed data"]["count"] == 1
    with pytest.raises(DataError, match="text is null"):
        prepare_shards(tmp_path / "strict", options(faults=FaultPolicy(on_broken_row="stop")), workers=2)


def test_a_tokenizer_of_its_own(tmp_path, options, documents):
    manifest = prepare_shards(tmp_path / "out", options(tokenizer=None, train_tokenizer=300), workers=1)
    assert manifest["tokenizer"]["vocab_size"] == open_shards(tmp_path / "out").vocab_size == 300
    assert prepare_shards(tmp_path / "out", options(tokenizer=None, train_tokenizer=300)) == manifest


def test_special_tokens_in_a_text_are_text(tokenizer):
    encoder = DocumentEncoder(tokenizer)
    ids = encoder(["the </s> cat <s>", "a"])
    assert [row.tolist().count(tokenizer.eos_token_id) for row in ids] == [1, 1]
    assert tokenizer.decode(ids[0][:-1]) == "the </s> cat <s>"
    assert DocumentEncoder(tokenizer, add_bos=True)(["a"])[0][0] == tokenizer.bos_token_id


def test_useless_options_are_one_clear_error(tmp_path, options):
    for changes, said in (
        ({"train_tokenizer": 5}, "--tokenizer, --train_tokenizer: got both"),
        ({"heldout_fraction": 1.0}, "--heldout_fraction: got 1.0"),
        ({"max_tokens": 0}, "--max_tokens: got 0"),
    ):
        with pytest.raises(ConfigError, match=said):
            options(**changes)
    with pytest.raises(ConfigError, match="--workers: got 0"):
        prepare_shards(tmp_path / "out", options(), workers=0)
    with pytest.raises(DataError, match=r"--heldout_fraction: got 1e-06, by which none of 60 documents"):
        prepare_shards(tmp_path / "out", options(heldout_fraction=1e-6), workers=1)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.lists(st.integers(1, 9), max_size=5), max_size=6),
    shard_tokens=st.integers(1, 12),
    limit=st.one_of(st.none(), st.integers(1, 60)),
    stop=st.integers(0, 6),
)
def test_the_writer_keeps_the_stream_over_shards_limits_and_restarts(
    tmp_path_factory, lengths, shard_tokens, limit, stop
):
    folder = tmp_path_factory.mktemp("split")
    blocks, stream = [], 0
    for block in lengths:
        sizes = np.array(block, dtype=np.int64)
        ids = np.arange(stream, stream + sizes.sum(), dtype="<u2")
        blocks.append(Documents(ids, sizes, sizes, sizes))
        stream += int(sizes.sum())
    writer = SplitWriter(folder, "train", np.dtype("<u2"), shard_tokens, limit)
    for block in blocks[:stop]:
        writer.append(block)
    saved = writer.sync()
    for block in blocks[stop:]:
        writer.append(block)
    writer.close()
    again = SplitWriter(folder, "train", np.dtype("<u2"), shard_tokens, limit, saved)
    for block in blocks[stop:]:
        again.append(block)
    again.close()
    expected = np.arange(stream)[:limit]
    files = [Path(folder, f"train-{number:05d}.bin") for number in range(again.shards)]
    assert sorted(folder.glob("*.bin")) == files
    found = [np.fromfile(file, "<u2") for file in files]
    assert [token for part in found for token in part] == expected.tolist()
    assert all(len(part) == shard_tokens for part in found[:-1])
    starts = np.cumsum([0, *(size for block in lengths for size in block)])[:-1]
    assert np.fromfile(folder / index_name("train"), "<i8").tolist() == [s for s in starts if s < len(expected)]
    assert again.counts["tokens"] == len(expected)


BUSY = """
import sys, time
from pathlib import Path
from deepspeed_sdp.data import ShardOptions, SourceSpec, preparation, prepare_shards
source, tokenizer, out = sys.argv[1:]
take = preparation.Preparation._take
def slow(self, block):
    print("busy", flush=True)
    time.sleep(60)
preparation.Preparation._take = slow
options = ShardOptions(SourceSpec((source,)), tokenizer, heldout_fraction=0.1, shard_tokens=1000)
prepare_shards(Path(out), options, workers=2)
"""


def test_workers_end_with_a_killed_parent(tmp_path, source, tokenizer_folder):
    command = [sys.executable, "-c", BUSY, str(source), str(tokenizer_folder), str(tmp_path / "out")]
    with subprocess.Popen(command, env=rank_environment(), stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "busy\n"
        children = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
    assert len(children) >= 2
    _, alive = psutil.wait_procs(children, timeout=20)
    for process in alive:
        process.kill()
    assert not alive
