"""Every wait for other ranks ends at the job's time limit, with a line that says on whom it was."""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from deepspeed_sdp import waits
from deepspeed_sdp.errors import WaitError
from tests.engine.stall_cases import STALLED
from tests.support.ranks import ROOT, rank_environment

LIMIT = 8


@pytest.mark.parametrize("where", ["backward", pytest.param("agreement", marks=pytest.mark.slow)])
def test_a_stalled_rank_ends_the_job_and_is_named(tmp_path, where):
    ranks = []
    try:
        for rank in range(3):
            command = [sys.executable, "-m", "tests.engine.stall_cases", str(rank), str(tmp_path / "store"), where]
            ranks.append(
                subprocess.Popen(
                    [*command, str(LIMIT)],
                    cwd=ROOT,
                    env=rank_environment(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        for line in ranks[STALLED].stdout:
            if "stalls" in line:
                break
        began = time.monotonic()
        said = ""
        for rank in range(3):
            if rank != STALLED:
                said += ranks[rank].communicate(timeout=120)[0]
                assert ranks[rank].returncode == 1, said
        # The limit, as long again to listen for the others, and ten seconds until the second rank ends in silence.
        assert time.monotonic() - began < LIMIT + LIMIT / 2 + 10 + 15
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert ranks[STALLED].returncode == -9
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines, said
    for line in lines:
        assert re.match(r"error: rank [01] waited for rank\(s\) [\d, ]+: [a-z ]+: .*(imed out|imeout)", line), line
        assert line.endswith(f"; rank(s) {STALLED} wait for nobody: they hang, still compute, or are gone"), line


def test_an_error_of_another_kind_is_left_alone():
    with pytest.raises(RuntimeError, match=r"^a shape$") as caught, waits.waiting("a test", [0, 1]):
        raise RuntimeError("a shape")
    assert not isinstance(caught.value, WaitError)


def test_who_cannot_ask_says_what_it_knows(monkeypatch):
    """The store is gone with the rank that held it."""
    import torch.distributed as dist

    def gone():
        raise RuntimeError("no store")

    monkeypatch.setattr(waits, "_store", gone)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 20)
    with (
        pytest.raises(
            WaitError, match=r"^rank 1 waited for rank\(s\) 0, 2, 3, 4, 5, 6, 7, 8 and 11 more: a test: Conn"
        ),
        waits.waiting("a test", range(20)),
    ):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:537] Connection closed by peer. This is typically caused by")


def test_ranks_that_wait_too_are_not_the_ones(monkeypatch):
    import torch.distributed as dist

    known = {f"{waits._KEY}/0": "gathering weights"}
    store = SimpleNamespace(
        timeout=waits.timedelta(seconds=2),
        set_timeout=lambda limit: None,
        set=known.__setitem__,
        add=lambda key, count: 2,
        check=lambda keys: all(key in known for key in keys),
    )
    monkeypatch.setattr(waits, "_store", lambda: store)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(WaitError, match=r"waited for rank\(s\) 0: .*; rank\(s\) 2, 3 wait for nobody"):
        waits.raise_if_lost(RuntimeError("Timed out waiting 2000ms"), "averaging gradients", (0, 1))
