"""The lock of a killed compilation does not stop the next job; that of a living one is left alone."""

import os
import subprocess
import sys
import time

import pytest
from torch.utils.file_baton import FileBaton

from deepspeed_sdp.engine.deepspeed import start
from deepspeed_sdp.engine.deepspeed.start import clear_stale_locks

HOLD = (
    "import sys, time; from torch.utils.file_baton import FileBaton as B; B(sys.argv[1]).try_acquire(); time.sleep(99)"
)


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    return folder / "lock"


@pytest.fixture
def holder(lock):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)])
    deadline = time.monotonic() + 60
    while not lock.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    process.kill()
    process.wait()


def test_the_lock_of_a_killed_process_is_removed(lock, holder):
    assert clear_stale_locks(patience=0) == []
    assert lock.exists(), "its process lives"
    holder.kill()
    holder.wait()
    assert clear_stale_locks(patience=0) == [lock]
    assert FileBaton(str(lock)).try_acquire()


def test_a_young_lock_may_be_another_machines(lock):
    lock.touch()
    began = time.monotonic()
    assert clear_stale_locks(patience=2.5) == [lock]
    assert time.monotonic() - began > 2
    lock.touch()
    os.utime(lock, (1, 1))
    assert clear_stale_locks() == [lock]


def test_no_lock_is_no_work(lock):
    assert clear_stale_locks() == []


def test_a_first_compilation_is_announced(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    start._say_if_it_compiles()
    assert "DeepSpeed compiles" in caplog.text
    caplog.clear()
    built = tmp_path / "deepspeed_shm_comm" / "deepspeed_shm_comm.so"
    built.parent.mkdir()
    built.touch()
    start._say_if_it_compiles()
    assert not caplog.records
