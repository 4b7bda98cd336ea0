"""Preparing a corpus: reused when nothing changed, rebuilt when anything did, and never at the cost of other files."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from deepspeed_sdp.data import CorpusSpec, load_corpus, load_tokenizer, prepare_corpus, unigram_loss
from deepspeed_sdp.errors import DataError, OutputError
from tests.data.conftest import make_documents
from tests.support.ranks import rank_environment


def stamp(folder):
    """Changes when a corpus is built anew: the folder is put in place by a rename."""
    return folder.stat().st_ino, (folder / "manifest.json").stat().st_mtime_ns


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "run" / "data"


@pytest.fixture
def prepared(cache, make_spec):
    prepare_corpus(cache, make_spec())
    return cache


def alone(folder):
    return [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_what_is_prepared(prepared, documents):
    corpus = load_corpus(prepared)
    tokenizer = load_tokenizer(corpus.tokenizer_folder)
    assert corpus.train.shape[1] == corpus.heldout.shape[1] == 32
    assert corpus.train.dtype == corpus.heldout.dtype == np.int32
    assert isinstance(corpus.train, np.memmap), "mapped, not read"
    assert (corpus.train_tokens, corpus.heldout_tokens) == (corpus.train.size, corpus.heldout.size)
    assert corpus.unigram_val_loss == unigram_loss(corpus.train, corpus.heldout, len(tokenizer))
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert sum(manifest["documents"].values()) == len(documents)
    assert manifest["bytes"] == sum(len(text.encode()) for text in documents)
    whole = "".join(documents)
    held = tokenizer.decode(corpus.heldout[0]).split("</s>")[0]
    assert held in whole
    assert held not in tokenizer.decode(corpus.train.reshape(-1))
    assert alone(prepared), "no staging folder is left"


def test_permissions_are_those_of_any_new_folder(prepared, tmp_path):
    (tmp_path / "plain").mkdir()
    assert prepared.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_same_again_builds_nothing(prepared, make_spec):
    before = stamp(prepared)
    corpus = prepare_corpus(prepared, make_spec())
    assert stamp(prepared) == before
    assert np.array_equal(corpus.train, load_corpus(prepared).train)


def test_two_builds_are_equal(prepared, make_spec, tmp_path):
    prepare_corpus(tmp_path / "other", make_spec())
    assert content(tmp_path / "other") == content(prepared)


@pytest.mark.parametrize(
    "change", [{"vocab_size": 330}, {"seq_length": 16}, {"holdout_fraction": 0.2}, {"max_bytes": 3_000_000}], ids=str
)
def test_other_arguments_build_anew(prepared, make_spec, change):
    before = stamp(prepared)
    prepare_corpus(prepared, make_spec(**change))
    assert stamp(prepared) != before
    assert json.loads((prepared / "manifest.json").read_text())["spec"].items() >= change.items()
    assert alone(prepared)


def test_every_field_of_the_spec_is_in_the_fingerprint(make_spec):
    spec = make_spec()
    values = {"text_files": ("other.txt",), "tokenizer": "somewhere"}
    changed = [replace(spec, **{f.name: values.get(f.name, 1)}) for f in fields(CorpusSpec)]
    assert len({s.fingerprint() for s in [spec, *changed]}) == len(fields(CorpusSpec)) + 1
    assert make_spec().fingerprint() == spec.fingerprint()


def test_changed_files_build_anew(prepared, make_spec, text_file):
    before = stamp(prepared)
    text_file.write_text("\n\n\n".join(make_documents(70, seed=5)))
    corpus = prepare_corpus(prepared, make_spec())
    assert stamp(prepared) != before
    text = load_tokenizer(corpus.tokenizer_folder).decode(corpus.train.reshape(-1))
    assert " 65." in text or " 66." in text


def test_a_file_more_in_a_folder_builds_anew_but_not_what_a_run_writes_below_it(tmp_path, make_spec, documents):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n\n".join(documents))
    cache = folder / "run" / "data"
    spec = make_spec(text_files=(str(folder),))
    prepare_corpus(cache, spec)
    first = stamp(cache)
    prepare_corpus(cache, spec)
    assert stamp(cache) == first
    (folder / "b.txt").write_text("\n\n\n".join(make_documents(5, seed=8)))
    prepare_corpus(cache, spec)
    assert stamp(cache) != first


def test_the_built_in_text_follows_what_is_installed(make_spec, monkeypatch):
    spec = make_spec(text_files=())
    before = spec.fingerprint()
    assert spec.fingerprint() == before
    monkeypatch.setattr("platform.python_version", lambda: "3.99.0")
    assert spec.fingerprint() != before
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.distributions", lambda: iter(()))
    assert spec.fingerprint() != before


def test_a_tokenizer_of_the_user(tokenizer, tmp_path, make_spec, cache):
    tokenizer.save_pretrained(tmp_path / "mine")
    corpus = prepare_corpus(cache, make_spec(tokenizer=str(tmp_path / "mine"), vocab_size=5))
    assert load_tokenizer(corpus.tokenizer_folder).get_vocab() == tokenizer.get_vocab()
    before = stamp(cache)
    prepare_corpus(cache, make_spec(tokenizer=str(tmp_path / "mine"), vocab_size=5))
    assert stamp(cache) == before
    os.utime(tmp_path / "mine" / "tokenizer.json")
    prepare_corpus(cache, make_spec(tokenizer=str(tmp_path / "mine"), vocab_size=5))
    assert stamp(cache) != before


DAMAGES = {
    "manifest missing": ("manifest.json", None),
    "manifest empty": ("manifest.json", b""),
    "manifest of another kind": ("manifest.json", b"[]"),
    "manifest not UTF-8": ("manifest.json", b"\xff"),
    "manifest without a loss": ("manifest.json", b'{"unigram_val_loss": null}'),
    "train missing": ("train.npy", None),
    "train empty": ("train.npy", b""),
    "train cut": ("train.npy", lambda data: data[: len(data) // 2]),
    "train of another format": ("train.npy", b"PK\x03\x04 no zip"),
    "train pickled": ("train.npy", b"\x80\x04N."),
    "heldout cut in its header": ("heldout.npy", lambda data: data[:20]),
    "tokenizer missing": ("tokenizer/tokenizer.json", None),
    "tokenizer cut": ("tokenizer/tokenizer.json", lambda data: data[:500]),
    "tokenizer of another kind": ("tokenizer/tokenizer.json", b'{"model": 5}'),
    "tokenizer config cut": ("tokenizer/tokenizer_config.json", b"{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_corpus_is_built_anew(prepared, make_spec, damage):
    whole = content(prepared)
    name, change = DAMAGES[damage]
    file = prepared / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()) if callable(change) else change)
    prepare_corpus(prepared, make_spec())
    assert content(prepared) == whole
    assert alone(prepared)


@pytest.mark.parametrize("damage", [name for name in DAMAGES if "tokenizer" not in name])
def test_ranks_that_load_a_damaged_corpus_say_so(prepared, damage):
    name, change = DAMAGES[damage]
    file = prepared / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes()) if callable(change) else change)
    with pytest.raises(DataError, match=f"data.cache: {prepared} holds no prepared text on this node: "):
        load_corpus(prepared)


def test_a_folder_with_other_files_is_left_alone(cache, make_spec):
    cache.mkdir(parents=True)
    (cache / "thesis.tex").write_text("years of work")
    (cache / "manifest.json").write_text("{}")
    before = content(cache)
    with pytest.raises(OutputError, match=r"holds other files \(thesis.tex\); takes a new or a prepared folder"):
        prepare_corpus(cache, make_spec())
    assert content(cache) == before
    assert alone(cache)


def test_a_file_added_to_a_prepared_folder_stops_a_rebuild_but_not_reuse(prepared, make_spec):
    (prepared / "notes.txt").write_text("mine")
    prepare_corpus(prepared, make_spec())
    before = content(prepared)
    with pytest.raises(OutputError, match=r"notes.txt"):
        prepare_corpus(prepared, make_spec(seq_length=16))
    assert content(prepared) == before


def test_an_empty_folder_is_taken(cache, make_spec):
    cache.mkdir(parents=True)
    assert prepare_corpus(cache, make_spec()).train_tokens


def test_a_linked_folder_is_filled_where_it_lies(tmp_path, make_spec):
    (tmp_path / "disk" / "target").mkdir(parents=True)
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "target")
    prepare_corpus(tmp_path / "data", make_spec())
    prepare_corpus(tmp_path / "data", make_spec(seq_length=16))
    assert (tmp_path / "data").is_symlink()
    assert load_corpus(tmp_path / "disk" / "target").train.shape[1] == 16


def test_a_folder_that_cannot_be_written(tmp_path, make_spec):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"data.cache: cannot write .*file/data: (Not a directory|File exists)"):
        prepare_corpus(tmp_path / "file" / "data", make_spec())
    with pytest.raises(OutputError, match=r"data.cache: cannot write .*file: Not a directory"):
        prepare_corpus(tmp_path / "file", make_spec())
    assert (tmp_path / "file").read_text() == "in the way"
    with pytest.raises(OutputError, match=r"data.cache: cannot write /proc/data: "):
        prepare_corpus(Path("/proc/data"), make_spec())


def test_bad_text_leaves_nothing(cache, make_spec, tmp_path):
    for changes, message in (
        ({"text_files": (str(tmp_path / "gone.txt"),)}, r"gone.txt: does not exist"),
        ({"text_files": (str(tmp_path / ("a" * 300 + ".txt")),)}, "cannot be read: File name too long"),
        ({"vocab_size": 10}, "--vocab_size: got 10"),
        ({"seq_length": 10**6}, "text: .* tokens are too few for one sequence of 1000000"),
        ({"seq_length": 3000}, "the held-out part: .* tokens are too few for one sequence of 3000"),
        ({"tokenizer": str(tmp_path / "gone")}, "--tokenizer: .* is no folder"),
        ({"text_files": (), "max_bytes": 5}, "built-in text: got a size of"),
    ):
        with pytest.raises(DataError, match=message):
            prepare_corpus(cache, make_spec(**changes))
        assert list(cache.parent.iterdir()) == []


def test_a_failed_rebuild_keeps_the_old_corpus(prepared, make_spec):
    before = content(prepared)
    with pytest.raises(DataError):
        prepare_corpus(prepared, make_spec(vocab_size=10))
    assert content(prepared) == before
    assert alone(prepared)


@pytest.mark.parametrize("stop", ["train_tokenizer", "tokenize_documents", "unigram_loss"])
def test_a_crash_in_the_middle_leaves_no_half_folder(cache, make_spec, monkeypatch, stop):
    def crash(*_, **__):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(f"deepspeed_sdp.data.corpus.{stop}", crash)
        with pytest.raises(RuntimeError, match="out of luck"):
            prepare_corpus(cache, make_spec())
    assert list(cache.parent.iterdir()) == []
    assert prepare_corpus(cache, make_spec()).train_tokens


def test_a_killed_process_leaves_no_half_folder(cache, make_spec, tmp_path):
    """Killed at its last moment before the folder is put in place: the next run starts clean."""
    spec = make_spec()
    code = f"""
import os, signal
from pathlib import Path
from deepspeed_sdp.data import CorpusSpec, corpus, prepare_corpus
corpus.unigram_loss = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
prepare_corpus(Path({str(cache)!r}), {spec!r})
"""
    done = subprocess.run([sys.executable, "-c", code], env=rank_environment(), cwd=tmp_path, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not cache.exists()
    assert prepare_corpus(cache, spec).train_tokens


def test_loading_what_is_not_there(tmp_path, prepared):
    with pytest.raises(DataError, match=r"holds no prepared text on this node: .*No such file"):
        load_corpus(tmp_path / "gone")
    moved = tmp_path / "moved"
    shutil.move(prepared, moved)
    assert load_corpus(moved).tokenizer_folder == moved / "tokenizer"
