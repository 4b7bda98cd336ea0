"""The folder of checkpoints: complete or invisible, whatever a crash leaves."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from deepspeed_sdp import files
from deepspeed_sdp.checkpoint import LOCK, FolderLocks, lock
from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.errors import CheckpointError, OutputError
from deepspeed_sdp.processes import process_name
from tests.support.crashes import crashes
from tests.support.tiny_checkpoint import content as tiny_content
from tests.support.tiny_checkpoint import write_tiny


def save(folder, tag, content, is_latest=True):
    staging = folders.begin(folder, tag)
    for name in ("one", "two"):
        (staging / name).write_text(content)
    for name in folders.files_of(0):
        (staging / name).write_text(content)
    described = {path.name: folders.describe_file(path) for path in staging.iterdir()}
    mark = folders.new_mark()
    folders.finish_rank(staging, mark, 0, {name: described.pop(name) for name in folders.files_of(0)})
    folders.finish(staging, folder / tag, folders.Manifest(mark, 1, described), is_latest)


def content(folder, tag=None):
    folders.recover(folder)
    checkpoint = folder / (tag or folders.latest(folder))
    manifest = folders.read_manifest(checkpoint)
    assert not folders.damage(checkpoint, manifest)
    found = {(checkpoint / name).read_text() for name in (*manifest.files, *folders.files_of(0))}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "renames"])
@pytest.mark.parametrize("tag", ["a", "b", "c"], ids=["latest", "another", "new"])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, tag, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    outcomes = set()
    for number, crash in enumerate(crashes(monkeypatch)):
        folder = tmp_path / str(number)
        save(folder, "b", "old")
        save(folder, "a", "old")
        with crash:
            save(folder, tag, "new")
        is_there = tag != "c" or (folder / "c").exists()
        state = content(folder, tag) if is_there else "old"
        assert content(folder) in {"old", state}
        outcomes.add(state)
        save(folder, "next", "next")
        assert content(folder) == "next"
        assert content(folder, "a") == (state if tag == "a" else "old")
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        shutil.rmtree(folder)
    assert outcomes == {"old", "new"}


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchange", "renames"])
def test_a_kill_while_old_ones_are_removed_leaves_whole_ones(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    for number, crash in enumerate(crashes(monkeypatch)):
        folder = tmp_path / str(number)
        for step in (1, 2, 3):
            write_tiny(folder, f"t{step}", steps=step)
        folders.set_latest(folder, "t3")
        with crash:
            folders.remove_old(folder, 1)
        for tag in folders.tags(folder):
            assert not folders.damage(folder / tag, folders.read_manifest(folder / tag))
        shutil.rmtree(folders.begin(folder, "x"))
        folders.remove_old(folder, 1)
        assert sorted(os.listdir(folder)) == ["latest", "t3"]


def test_what_is_kept_is_the_latest_by_step_and_damage_stops_nobody(tmp_path, caplog):
    for step in (30, 10, 20, 9):
        write_tiny(tmp_path, f"t{step}", steps=step)
    for name, text in (
        ("broken", "{"),
        ("deep", "[" * 100_000),
        ("other", json.dumps({**tiny_content()["meta.json"], "global_steps": -1})),
    ):
        write_tiny(tmp_path, name, steps=1)
        (tmp_path / name / "meta.json").write_text(text)
    folders.set_latest(tmp_path, "t9")
    assert folders.tags(tmp_path)[-4:] == ["t9", "t10", "t20", "t30"]
    folders.remove_old(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["broken", "deep", "latest", "other", "t20", "t30", "t9"]
    assert {record.getMessage().split()[1] for record in caplog.records} == {
        str(tmp_path / name) for name in ("broken", "deep", "other")
    }
    # One that was saved just now without being the latest.
    folders.remove_old(tmp_path, 1, saved="t20")
    assert {"t20", "t30", "t9"} < set(os.listdir(tmp_path))
    (tmp_path / "latest").write_text("../../etc")
    folders.remove_old(tmp_path, 1)
    assert "are left: tag: got" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("tag", ["", "../up", ".hidden", "a/b", "latest", "x" * 200])
def test_a_tag_is_a_plain_name(tmp_path, tag):
    with pytest.raises(CheckpointError, match="tag: got"):
        folders.begin(tmp_path, tag)


def test_a_latest_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "latest").write_text("../../etc")
    with pytest.raises(CheckpointError, match="tag: got"):
        folders.latest(tmp_path)


TAKE = """
import sys
from pathlib import Path
from deepspeed_sdp.checkpoint.lock import FolderLocks
locks = FolderLocks()
locks.take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.readline()
"""


def start_job(folder):
    command = [sys.executable, "-c", TAKE, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_another_job_in_the_folder_is_refused_by_name(tmp_path):
    ending, killed = tmp_path / "ending", tmp_path / "killed"
    processes = [start_job(folder) for folder in (ending, killed)]
    try:
        for folder, process in zip((ending, killed), processes, strict=True):
            assert process.stdout.readline() == "taken\n"
            message = f"is written by process {process.pid} on .*if it is dead, remove .*/.lock"
            with pytest.raises(OutputError, match=message):
                FolderLocks().take(folder)
            assert lock.is_taken(folder)
        processes[0].communicate("\n", timeout=20)
    finally:
        for process in processes:
            process.kill()
            process.wait(timeout=20)
    assert [os.listdir(folder) for folder in (ending, killed)] == [[], [LOCK]]
    # It could not tidy up, and is dead.
    assert not lock.is_taken(killed)
    locks = FolderLocks()
    locks.take(killed)
    locks.take(killed / "checkpoint-5")
    assert os.listdir(killed) == [LOCK]
    locks.release()
    assert os.listdir(killed) == []


def test_a_job_that_begins_at_the_same_moment_is_named(tmp_path, monkeypatch):
    path, name = tmp_path / LOCK, process_name().replace("@", "x@")
    path.touch()
    with monkeypatch.context() as patched:
        patched.setattr(lock.time, "sleep", lambda seconds: path.write_text(json.dumps({"process": name})))
        with pytest.raises(OutputError, match=rf"is written by process {os.getpid()} on .*x;"):
            FolderLocks().take(tmp_path)


def test_a_lock_that_loses_its_name_while_it_is_written_is_not_held(tmp_path, monkeypatch):
    path, own = tmp_path / LOCK, process_name()
    name = own.replace("@", "x@")

    def replaced():
        if path.exists() and not path.read_text():
            path.unlink()
            path.write_text(json.dumps({"process": name}))
        return own

    monkeypatch.setattr(lock, "_is_alive", lambda path, holder: True)
    monkeypatch.setattr(lock, "process_name", replaced)
    with pytest.raises(OutputError, match="is written by process"):
        FolderLocks().take(tmp_path)
    assert json.loads(path.read_text()) == {"process": name}


@pytest.mark.parametrize("written", ["elsewhere", ""], ids=["another_host", "half_written"])
def test_a_lock_that_cannot_be_judged_is_watched(tmp_path, monkeypatch, written):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    holder = process_name().replace("@", "x@")
    path = tmp_path / LOCK
    path.write_text(json.dumps({"process": holder}) if written else "")
    with FolderBeat(tmp_path), pytest.raises(OutputError, match="is written by process"):
        FolderLocks().take(tmp_path)
    locks = FolderLocks()
    locks.take(tmp_path)  # nobody touches it any more
    assert json.loads(path.read_text()) == {"process": process_name()}
    # Taken over from this job, which was thought to be dead.
    path.write_text(json.dumps({"process": holder}))
    with FolderBeat(tmp_path), pytest.raises(OutputError, match="is written by process"):
        locks.take(tmp_path)
    locks.release()
    assert json.loads(path.read_text()) == {"process": holder}


class FolderBeat:
    """A job on another host, as far as this one can see."""

    def __init__(self, folder):
        self.held = lock._Held({folder})

    def __enter__(self):
        import threading

        self.thread = threading.Thread(target=lock._beat, args=(self.held,))
        self.thread.start()

    def __exit__(self, *_):
        self.held.end.set()
        self.thread.join()
