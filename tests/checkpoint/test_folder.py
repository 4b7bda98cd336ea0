"""The folder of checkpoints: complete or invisible, whatever a crash leaves."""

import os

import pytest

from deepspeed_sdp.checkpoint import folder as folders
from deepspeed_sdp.errors import CheckpointError


class Crash(Exception):
    pass


def save(folder, tag, content):
    staging = folders.begin(folder, tag)
    (staging / "data").write_text(content)
    folders.finish(folder, tag, {"data": folders.describe_file(staging / "data")})


def content(folder):
    folders.recover(folder)
    tag = folders.latest(folder)
    files = folders.read_manifest(folder / tag)
    assert not folders.damage(folder / tag, files)
    return (folder / tag / "data").read_text()


CALLS = ("rename", "replace", "fsync", "rmdir", "unlink", "mkdir")


@pytest.mark.parametrize("tag", ["a", "b"], ids=["same_tag", "new_tag"])
def test_a_crash_at_any_system_call_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, tag):
    outcomes = set()
    for crash_at in range(40):
        folder = tmp_path / str(crash_at)
        save(folder, "a", "old")
        count = 0

        def watch(original, crash_at=crash_at):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > crash_at:
                    raise Crash
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, watch(getattr(os, name)))
            try:
                save(folder, tag, "new")
            except Crash:
                pass
            else:
                assert content(folder) == "new"
                break
        outcomes.add(content(folder))
        save(folder, "c", "next")
        assert content(folder) == "next"
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    else:
        raise AssertionError("40 calls are not enough")
    assert outcomes == {"old", "new"}


@pytest.mark.parametrize("tag", ["", "../up", ".hidden", "a/b", "latest", "x" * 200])
def test_a_tag_is_a_plain_name(tmp_path, tag):
    with pytest.raises(CheckpointError, match="tag: got"):
        folders.begin(tmp_path, tag)


def test_a_latest_that_leads_elsewhere_is_refused(tmp_path):
    (tmp_path / "latest").write_text("../../etc")
    with pytest.raises(CheckpointError, match="tag: got"):
        folders.latest(tmp_path)
