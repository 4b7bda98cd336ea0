"""What is replaced is the old or the new one, at whatever call the process is killed."""

import os
import subprocess
import sys

import pytest

from deepspeed_sdp import files
from deepspeed_sdp.processes import describe, is_running, process_name
from tests.support.crashes import crashes

FALLBACK = pytest.param(False, id="renames")
EXCHANGE = pytest.param(True, id="exchange")


def replace_folder(final, content):
    staged = files.begin_folder(final)
    for name in ("one", "two"):
        (staged / name).write_text(content)
    files.replace_folder(staged, final)


def replace_file(path, content):
    files.write_text(path, content)


def content_of(path):
    found = {file.read_text() for file in path.iterdir()} if path.is_dir() else {path.read_text()}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("can_exchange", [EXCHANGE, FALLBACK])
@pytest.mark.parametrize("replace", [replace_folder, replace_file])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, replace, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    outcomes = set()
    for number, crash in enumerate(crashes(monkeypatch)):
        path = tmp_path / str(number) / "name"
        path.parent.mkdir()
        replace(path, "old")
        with crash:
            replace(path, "new")
        if not can_exchange:
            for missing in files.interrupted(path.parent):
                files.recover_folder(missing)
        outcomes.add(content_of(path))
        replace(path, "next")
        assert content_of(path) == "next"
        assert os.listdir(path.parent) == ["name"]
    assert outcomes == {"old", "new"}


@pytest.mark.parametrize("replace", [replace_folder, replace_file])
def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path, replace):
    code = "from deepspeed_sdp.processes import process_name; print(process_name())"
    dead = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    living = process_name().replace(f"-{os.getpid()}-", f"-{os.getppid()}-")
    living = f"{living.rpartition('-')[0]}-{_start_of(os.getppid())}"
    elsewhere = process_name().replace("@", "x@")
    assert (is_running(dead), is_running(living), is_running(elsewhere)) == (False, True, None)
    assert is_running(process_name())
    assert describe(dead).startswith("process ")
    for owner in (dead, living, elsewhere):
        (tmp_path / f".name.new-{owner}").mkdir()
    others = {".name.new-mine", ".name.old", "name.new-x"}
    for name in others:
        (tmp_path / name).mkdir()
    old = tmp_path / f".name.new-{elsewhere}2"
    old.mkdir()
    os.utime(old, (0, 0))
    replace(tmp_path / "name", "new")
    assert {path.name for path in tmp_path.iterdir()} == {
        "name",
        f".name.new-{living}",
        f".name.new-{elsewhere}",
        *others,
    }
    files.remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"name", f".name.new-{living}", *others}


def _start_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[19]


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "name.json"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "half\udc80")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["name.json"]


def test_a_link_in_the_place_of_a_folder_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    (tmp_path / "final").symlink_to("target")
    replace_folder(tmp_path / "final", "new")
    assert content_of(tmp_path / "final") == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "target"]
    assert (tmp_path / "target" / "kept").exists()


def test_modes_are_those_of_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        folder = tmp_path / "folder"
        folder.mkdir(mode=0o700)
        (folder / "file").touch(mode=0o600)
        files.share(folder)
        assert [path.stat().st_mode & 0o777 for path in (folder, folder / "file")] == [0o750, 0o640]
    finally:
        os.umask(before)


def test_a_folder_goes_on_handing_its_group_on(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o2700)
    files.share(folder)
    assert folder.stat().st_mode & 0o2700 == 0o2700
