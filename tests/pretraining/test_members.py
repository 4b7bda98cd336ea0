"""Who takes part in an elastic job, met in a store of torchrun's that may be old."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch.distributed as dist

from deepspeed_sdp.pretraining.elastic import Kept
from tests.support.ranks import ROOT, free_port, rank_environment

MEET = """
import json, os, sys
from deepspeed_sdp.errors import SDPError
from deepspeed_sdp.pretraining.members import meet_members
try:
    found = meet_members(os.environ["IS_FIT"] == "1", int(os.environ["MOST"]), min)
except SDPError as error:
    print(json.dumps(str(error)))
    sys.exit()
keys = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
print(json.dumps([found.is_member, found.left_out, [os.environ[key] for key in keys]]), flush=True)
if found.is_member:
    import torch.distributed as dist
    dist.init_process_group("gloo")
    total = [None] * dist.get_world_size()
    dist.all_gather_object(total, os.environ["NAME"])
    print(json.dumps(total), flush=True)
    dist.barrier()
    found.say_over()
else:
    found.wait_until_over()
"""


def meet(port, fit, groups=None, most=99, offered=True):
    """One start of ranks by torchrun; what each says."""
    groups = groups or [0] * len(fit)
    processes = []
    for rank, is_fit in enumerate(fit):
        environment = rank_environment(
            RANK=rank,
            NAME=f"old-{rank}",
            WORLD_SIZE=len(fit),
            LOCAL_RANK=rank,
            LOCAL_WORLD_SIZE=groups.count(groups[rank]),
            GROUP_RANK=groups[rank],
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            TORCHELASTIC_USE_AGENT_STORE=offered,
            IS_FIT=int(is_fit),
            # Rank 0's counts.
            MOST=most if rank == 0 else 1,
        )
        command = [sys.executable, "-c", MEET]
        processes.append(
            subprocess.Popen(
                command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    said = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(fit), [error for _, error in said]
    return [[json.loads(line) for line in text.splitlines()] for text, _ in said]


@pytest.fixture
def store():
    """As the agent of node 0 offers it for all starts of its ranks."""
    return dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


def test_ranks_are_without_a_gap_however_often_they_start(store):
    for fit in ([1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1]):
        said = meet(store.port, fit)
        members = [rank for rank, is_fit in enumerate(fit) if is_fit]
        for place, rank in enumerate(members):
            (is_member, left_out, (new, world, local, _, port, offered)), names = said[rank]
            assert (is_member, left_out, int(new), int(world), int(local)) == (
                True,
                len(fit) - len(members),
                place,
                len(members),
                len(members),
            )
            assert names == [f"old-{member}" for member in members]
            # A store of its own, in which nothing is left of an earlier start.
            assert (int(port) != store.port, offered) == (True, "False")
        assert all(said[rank][0][0] is False for rank in range(len(fit)) if rank not in members)


def test_a_store_that_the_first_rank_has_to_make(store):
    # It is left out itself, and the others meet in it.
    said = meet(free_port(), [0, 1, 1], offered=False)
    assert [line[0][0] for line in said] == [False, True, True]
    assert said[1][1] == ["old-1", "old-2"]


def test_nodes_of_different_sizes_and_no_more_than_can_be_used(store):
    said = meet(store.port, [1, 1, 0, 1], groups=[0, 0, 1, 1], most=3)
    assert [line[0][2][2] for line in said if line[0][0]] == ["1"] * 3
    said = meet(store.port, [1, 1, 1, 1], groups=[0, 0, 1, 1], most=2)
    assert [line[0][0] for line in said] == [True, True, False, False]
    assert [line[0][2][2] for line in said[:2]] == ["2", "2"]


def test_nobody_left_is_said(store):
    said = meet(store.port, [0, 0])
    assert all("no rank is left" in line[0] for line in said)


WATCH = """
import os, sys, time
from pathlib import Path
from deepspeed_sdp.pretraining.watch import Watch
folder = Path(sys.argv[1])
pids = dict(pair.split("=") for pair in sys.stdin.readline().split())
name = pids.pop("name")
del pids[name]
watch = Watch(folder, {other: int(pid) for other, pid in pids.items()}, os.getppid())
print("watching", flush=True)
how = sys.stdin.readline().strip()
watch.close()
sys.exit(int(how))
"""


@pytest.fixture
def ranks(tmp_path):
    """Three that watch each other."""
    names = ("a", "b", "c")
    started = {
        name: subprocess.Popen(
            [sys.executable, "-c", WATCH, str(tmp_path)],
            cwd=ROOT,
            env=rank_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    }
    every = " ".join(f"{name}={process.pid}" for name, process in started.items())
    for name, process in started.items():
        process.stdin.write(f"{every} name={name}\n")
        process.stdin.flush()
    for process in started.values():
        assert process.stdout.readline() == "watching\n"
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def lost(folder):
    return sorted(path.name for path in folder.glob("lost/*"))


def ended(process):
    return process.wait(timeout=10)


def test_whoever_is_killed_is_noted_and_the_others_end(ranks, tmp_path):
    began = time.monotonic()
    os.kill(ranks["b"].pid, 9)
    # Not asked for yet, as torchrun looks ten times a second.
    assert [ended(ranks[name]) for name in "ac"] == [75, 75]
    assert time.monotonic() - began < 5
    assert lost(tmp_path) == ["b"]


@pytest.mark.parametrize(("code", "noted"), [(75, []), (1, ["b"])])
def test_a_rank_that_ended_for_others_is_fit(ranks, tmp_path, code, noted):
    ranks["b"].stdin.write(f"{code}\n")
    ranks["b"].stdin.flush()
    assert [ended(ranks[name]) for name in "ac"] == [75, 75]
    assert lost(tmp_path) == noted


def test_ranks_that_are_through_are_not_missed(ranks, tmp_path):
    for process in ranks.values():
        process.stdin.write("0\n")
        process.stdin.flush()
    assert [ended(process) for process in ranks.values()] == [0, 0, 0]
    assert lost(tmp_path) == []


def test_who_was_lost_stays_noted_until_the_run_has_ended(tmp_path):
    kept = Kept(tmp_path / "state", 5)
    for folder in ("lost", "global_step5"):
        (kept.folder / folder).mkdir(parents=True)
        (kept.folder / folder / "x").write_text("")
    (kept.folder / "latest").write_text("global_step5")
    kept.note_step(7)
    assert kept.farthest() == 7
    kept.remove(is_finished=False)
    assert [path.name for path in kept.folder.iterdir()] == ["lost"]
    kept.remove(is_finished=True)
    assert not kept.folder.exists()
    # Another rank of the node was faster.
    kept.remove(is_finished=True)
