"""Saving where it cannot be done: a disk that fills up, a folder that vanishes, one that is read-only."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.engine.cases import run_steps
from tests.engine.checkpoint_cases import start

CASES = "tests.engine.test_no_space"
HALF = {"coverage": 0.5}


def save_until_it_fails(folder, limit=None, is_vanishing=False, on_error="stop", is_async=False):
    """Steps and saves until one save fails, and a step after that: tags before, message, losses."""
    engine = start({**HALF, "checkpoint": {"on_error": on_error, "async": is_async}}, {"stage": 2})
    saved, message = [], None
    if limit is not None:
        # The kernel refuses what goes beyond, as it does on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for attempt in range(20):
        run_steps(engine, 1)
        if limit is not None and attempt == 1 and engine.global_rank == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        vanishing = removing(Path(folder)) if is_vanishing and attempt and engine.global_rank == 1 else None
        with vanishing or contextlib.nullcontext():
            try:
                done = engine.save_checkpoint(folder)
                done = engine.wait_for_checkpoint() and done
            except Exception as error:
                message, done = f"{type(error).__name__}: {error}", False
        if not done:
            break
        saved.append(f"global_step{engine.global_steps}")
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    losses = run_steps(engine, 1)["losses"]
    engine.destroy()
    return saved, message, losses


@contextlib.contextmanager
def removing(folder):
    """Meanwhile somebody removes what is being written, as soon as it is there."""
    stop = threading.Event()

    def remove():
        while not stop.is_set():
            for path in folder.glob(".*.new-*"):
                subprocess.run(["rm", "-rf", path], check=False, stderr=subprocess.DEVNULL)
            time.sleep(0.0005)

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def check(results, folder, on_error="stop"):
    saved = results[0][0]
    assert saved  # a complete one was there before
    for tags, message, losses in results:
        assert tags == saved
        assert losses  # the job goes on
        assert message == results[0][1]
    if on_error == "stop":
        # It names the rank, but where all have the same error.
        assert re.match(r"OutputError: (rank \d+: )?cannot write the checkpoint: ", results[0][1])
    else:
        assert results[0][1] is None
    assert (folder / "latest").read_text() == saved[-1]
    assert not [path for path in folder.iterdir() if path.name.startswith("global_step") and path.name not in saved]


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_file_that_cannot_grow(ranks4, tmp_path, on_error):
    results = ranks4.run(
        f"{CASES}:save_until_it_fails", timeout=60, folder=str(tmp_path), limit=8192, on_error=on_error
    )
    check(results, tmp_path, on_error)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_full_disk(ranks4, tmp_path, is_async):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "sdp-test", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("may not mount a small disk here; the same error comes in test_a_file_that_cannot_grow")
    try:
        results = ranks4.run(f"{CASES}:save_until_it_fails", timeout=60, folder=str(disk), is_async=is_async)
        check(results, disk)
        assert "No space left on device" in results[0][1]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_folder_that_vanishes(ranks4, tmp_path, on_error):
    results = ranks4.run(
        f"{CASES}:save_until_it_fails", timeout=60, folder=str(tmp_path), is_vanishing=True, on_error=on_error
    )
    check(results, tmp_path, on_error)


def read_only(folder):
    engine = start(HALF, {"stage": 1})
    run_steps(engine, 1)
    try:
        engine.save_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}", run_steps(engine, 1)["losses"]
    finally:
        engine.destroy()
    return None, None


@pytest.mark.skipif(not os.path.isdir("/sys/kernel"), reason="takes a folder in which nobody can write")
def test_a_folder_that_is_read_only(ranks4):
    for message, losses in ranks4.run(f"{CASES}:read_only", timeout=60, folder="/sys/kernel/checkpoints"):
        assert message.startswith("OutputError: rank 0: cannot write the checkpoint: ")
        assert "/sys/kernel/checkpoints" in message
        assert losses
