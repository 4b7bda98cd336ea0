"""Work made ahead: in order, with its errors, and gone before the interpreter is."""

import gc
import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepspeed_sdp.data.background import Ahead, wait
from deepspeed_sdp.data.faults import FaultPolicy, Retry, Skipped
from tests.data.conftest import make_documents
from tests.data.fineweb import write_jsonl, write_parquet
from tests.support.ranks import rank_environment

LEAVE = Path(__file__).with_name("leave_busy.py")


class Owner:
    pass


@pytest.fixture
def owner():
    return Owner()


def leave(folder, tokenizer, how):
    tokenizer.save_pretrained(folder / "tokenizer")
    source = folder / "source"
    source.mkdir(exist_ok=True)
    texts = make_documents(200, words=200)
    write_parquet(source / "a.parquet", texts[:100])
    write_jsonl(source / "b.jsonl.zst", texts[100:])
    command = [sys.executable, str(LEAVE), str(source), str(folder / "tokenizer"), how]
    return subprocess.run(command, env=rank_environment(), capture_output=True, text=True, timeout=60)


def test_a_process_with_busy_streams_ends_them_first(tmp_path, tokenizer):
    result = leave(tmp_path, tokenizer, "end")
    assert (result.returncode, result.stdout) == (0, "busy: 2\nleft: 0\n"), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", ["end", "error"] * 4)
def test_it_always_ends(tmp_path, tokenizer, how):
    result = leave(tmp_path, tokenizer, how)
    assert (result.returncode, result.stdout) == (how == "error", "busy: 2\nleft: 0\n"), result.stderr


def test_items_come_in_order_and_an_error_again_and_again(owner):
    def items():
        yield from range(5)
        raise ValueError("broken")

    ahead = Ahead(items(), 2, owner)
    assert [ahead.take() for _ in range(5)] == list(range(5))
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            ahead.take()
    ahead.close()


def test_it_waits_for_lost_connections_no_longer_than_it_is_wanted(owner):
    tries = []

    def items():
        retry = Retry("a file", FaultPolicy(first_wait=3600.0), Skipped())
        yield 0
        tries.append(1)
        retry.failed(ConnectionError("lost"))
        tries.append(2)

    ahead = Ahead(items(), 4, owner)
    assert ahead.take() == 0
    ahead.close()
    assert 2 not in tries


def test_forgotten_work_ends(owner):
    ahead = Ahead(itertools.count(), 2, owner)
    assert ahead.take() == 0
    thread = ahead._thread
    del ahead
    # What an owner holds goes with it; here the fixture holds the owner.
    assert thread.is_alive()
    other = Owner()
    thread = Ahead(itertools.count(), 2, other)._thread
    del other
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_without_a_thread_waiting_is_sleeping(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    wait(2.5)
    assert slept == [2.5]
