"""The Slurm template, with stand-ins for srun and scontrol that start tasks and pass signals on as Slurm does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.jobs import kill, marked
from tests.launch.recipe_jobs import RecipePlace
from tests.support.ranks import ROOT, free_port, rank_environment, remove_shared_buffers

TEMPLATE = ROOT / "launch" / "slurm" / "pretrain.sbatch"
SRUN = """#!/usr/bin/env bash
# Two tasks of one node; signals to the step reach all of them.
shift
echo $$ > "$STEP_PID"
pids=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NNODES=1 "$@" &
    pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -TERM "${pids[@]}"' TERM
# --kill-on-bad-exit: the first task that ends with another code than 0 ends the others at once.
code=0
while [ -n "$(jobs -pr)" ]; do
    for pid in "${pids[@]}"; do
        kill -0 "$pid" 2> /dev/null && continue
        wait "$pid"
        last=$?
        [ "$last" -eq 0 ] || { code=$last; kill -KILL "${pids[@]}" 2> /dev/null; }
    done
    sleep 0.1
done
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) echo 127.0.0.1 ;;
    *) echo "$@" >> "$CALLS" ;;
esac
"""


class Cluster:
    """A folder with the stand-ins; ``submit`` starts the template."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def submit(self, arguments, **environment):
        self.mark = f"TEST_JOB=slurm-{os.getpid()}-{time.monotonic_ns()}"
        self.port = free_port()
        environment = rank_environment(
            **dict([self.mark.split("=")]),
            **environment,
            SLURM_JOB_ID="7",
            SLURM_JOB_NODELIST="node-0",
            MASTER_PORT=str(self.port),
            CALLS=str(self.folder / "calls"),
            STEP_PID=str(self.folder / "step"),
            PATH=f"{self.folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        )
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
            environment.pop(name, None)
        return subprocess.Popen(
            ["bash", str(TEMPLATE), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, process):
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            kill(marked(self.mark))
            remove_shared_buffers(self.port)
        return process.returncode, output

    @property
    def calls(self):
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_it_saves_is_requeued_and_ends(tmp_path, number):
    place = RecipePlace(tmp_path / "run")
    (tmp_path / "bin").mkdir()
    cluster = Cluster(tmp_path / "bin")
    # Long enough that it is still under way when it is told.
    arguments = place.arguments(**{"pretraining.tokens": 100_000})[1:]
    process = cluster.submit(arguments)
    deadline = time.monotonic() + 200
    metrics = place.output / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    os.kill(int((cluster.folder / "step").read_text()), number)
    code, output = cluster.end(process)
    assert code == 0, output
    assert "the same command goes on" in output
    assert cluster.calls == ["requeue 7"]
    done = place.lines()[-1]["step"]
    assert not list(ROOT.glob(".stopped-*"))
    # What a requeued job is given again would begin anew.
    again = cluster.submit([*arguments, "--steps", str(done + 4), "--restart"], SLURM_RESTART_COUNT="1")
    code, output = cluster.end(again)
    assert code == 0, output
    assert "going on from" in output
    assert cluster.calls == ["requeue 7"], "a finished job is not put back"
    assert (place.output / "hf" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_failed_job_keeps_its_code_and_is_not_requeued(tmp_path):
    place = RecipePlace(tmp_path / "run")
    (tmp_path / "bin").mkdir()
    cluster = Cluster(tmp_path / "bin")
    code, output = cluster.end(cluster.submit(place.arguments(train_batch_size=15)[1:]))
    assert code == 1, output
    assert output.count("error: train_batch_size: got 15") == 1
    assert cluster.calls == []
