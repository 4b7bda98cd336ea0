"""A rank may be lost: the job goes on with those that are left, from what is kept in memory."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from transformers import AutoModelForCausalLM

from tests.launch.elastic_jobs import ElasticPlace, check_taken, end, ranks_of
from tests.support.ranks import ROOT, free_port, rank_environment


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return ElasticPlace(tmp_path_factory.mktemp("shards")).shards


@pytest.fixture
def place(tmp_path, shards):
    return ElasticPlace(tmp_path / "job", shards)


def kill_at(place, step, rank):
    (place.folder / "kill.json").write_text(json.dumps({"step": step, "rank": rank}))


def test_a_killed_rank_is_left_out_and_the_others_go_on(place):
    kill_at(place, 14, 2)
    job = place.run("--elastic", "4")
    assert job.code == 0, job.output
    assert job.left == []
    [first, again] = place.read("taken.jsonl")
    assert (first["ranks"], first["path"]) == (4, None)
    assert (again["ranks"], again["step"]) == (3, 12)
    assert again["samples"] == 12 * 24
    check_taken(place)
    assert "2 steps are lost: from memory on they are done again" in job.output
    assert "1 of the ranks that torchrun started" in job.output
    steps = [line["step"] for line in place.lines() if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == 24
    AutoModelForCausalLM.from_pretrained(place.output / "hf")
    # Nothing stays in memory when the job has ended.
    assert place.memory() == []


@pytest.mark.slow
def test_killed_twenty_times_it_goes_on_twenty_times(tmp_path):
    command = [sys.executable, "-m", "tests.launch.elastic_jobs", str(tmp_path / "job"), "20", "0"]
    done = subprocess.run(command, cwd=ROOT, env=rank_environment(), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_that_breaks_by_itself_is_left_out_too(place):
    (place.folder / "break.json").write_text(json.dumps({"step": 9, "rank": 0}))
    job = place.run("--elastic", "4")
    assert job.code == 0, job.output
    assert "the device fell off the bus" in job.output
    assert [line["ranks"] for line in place.read("taken.jsonl")] == [4, 3]
    check_taken(place)


@pytest.mark.slow
def test_a_checkpoint_is_taken_where_memory_is_lost(place):
    kill_at(place, 11, 1)
    place.tail = """
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    import shutil
    for path in Path("memory").glob("deepspeed-sdp-*/global_step*"):
        shutil.rmtree(path, ignore_errors=True)
"""
    job = place.run("--elastic", "5", **{"logging.checkpoint_interval": 4})
    assert job.code == 0, job.output
    [_, again] = place.read("taken.jsonl")
    assert "checkpoints/global_step8" in again["path"]
    assert "3 steps are lost: from the latest checkpoint on they are done again" in job.output


@pytest.mark.slow
def test_a_job_that_was_killed_whole_goes_on_from_memory_with_all_ranks(place):
    kill_at(place, 9, 3)
    job = place.run("--elastic", "4", restarts=0)
    assert job.code != 0
    assert place.memory()
    job = place.run("--elastic", "4")
    assert job.code == 0, job.output
    assert [(line["ranks"], line["step"]) for line in place.read("taken.jsonl")] == [(4, 0), (4, 8)]
    check_taken(place)


@pytest.mark.slow
def test_begun_anew_nothing_of_before_counts(place):
    kill_at(place, 9, 3)
    assert place.run("--elastic", "4", restarts=0).code != 0
    kill_at(place, 6, 1)
    # It goes on after the kill, though it is told to begin anew.
    job = place.run("--elastic", "4", "--restart")
    assert job.code == 0, job.output
    assert [(line["ranks"], line["step"]) for line in place.read("taken.jsonl")] == [(4, 0), (4, 0), (3, 4)]


@pytest.mark.slow
def test_a_node_is_lost_with_its_memory(place):
    """Three launchers, each of a node with a memory of its own; one is killed with all that is its."""
    port, nodes = free_port(), []
    for number in range(3):
        where = [
            "--nnodes",
            "2:3",
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            f"127.0.0.1:{port}",
            "--rdzv_id",
            "job",
        ]
        where += ["--rdzv_conf", "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"]
        shape = {"sdp.num_subnetworks": 3, "sdp.coverage": "2/3", "deepspeed.train_batch_size": 18}
        command = place.job("--elastic", "5", nodes=where, ranks=1, folder=f"memory-{number}", steps=60, **shape)
        extra = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1, "STEP_SECONDS": 0.5}
        nodes.append(place.start(*command, **extra))
        time.sleep(3)
    deadline = time.monotonic() + 120
    while not [line for line in place.read("kept.jsonl") if line["step"] >= 10]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    lost = nodes[1]
    lost.kill()
    for pid in ranks_of(lost):
        subprocess.run(["kill", "-9", str(pid)], check=False)
    shutil.rmtree(place.folder / "memory-1")
    jobs = [end(node) for node in (nodes[0], nodes[2], lost)]
    assert [job.code for job in jobs[:2]] == [0, 0], jobs[0].output + jobs[1].output
    taken = place.read("taken.jsonl")
    assert [line["ranks"] for line in taken] == [3, 2]
    # It may be killed while the state of step 10 is being kept.
    assert taken[1]["step"] >= 5
    check_taken(place)
    assert place.memory() == []


@pytest.mark.parametrize(
    ("switches", "changes", "what"),
    [
        (["--elastic", "0"], {}, "--elastic: got 0; takes a number of steps from 1 on"),
        (["--elastic"], {"sdp.enabled": False}, "--elastic: got the dense baseline"),
    ],
)
def test_what_cannot_be_elastic_is_said_before_ranks_start(place, switches, changes, what):
    arguments = place.arguments(*switches, script=[], **changes)
    job = end(place.start("deepspeed-sdp", *arguments, "--gpus", "2"))
    assert job.code != 0
    assert what in job.output
    assert "Traceback" not in job.output


@pytest.mark.slow
def test_what_is_wrong_for_all_ranks_ends_the_job_at_once(place):
    arguments = place.arguments("--elastic", script=[], **{"model.path": "nowhere"})
    job = end(place.start("deepspeed-sdp", *arguments, "--gpus", "2"))
    assert job.code != 0
    assert len(job.errors) == 1, job.output
    assert "Traceback" not in job.output
    job = place.run("--elastic", **{"deepspeed.optimizer": {"type": "Nothing", "params": {}}})
    assert job.code != 0
    assert len(job.errors) == 1, job.output
    assert "going on from" not in job.output


@pytest.mark.slow
def test_other_launchers_are_refused(place):
    job = place.launch("--elastic")
    assert "--elastic: got ranks that torchrun has not started; takes torchrun --max_restarts" in job.output
