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
# Two tasks of one node. As Slurm's own: SIGUSR1 is passed on to the tasks, and SIGTERM kills them.
shift
pids=()
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 SLURM_NNODES=1 "$@" &
    pids+=($!)
done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'echo "srun: forcing job termination"; kill -KILL "${pids[@]}"' TERM
echo "${pids[@]}" > "$STEP_PIDS"
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
# In place of Python with the package: ranks that train until they are told to stop.
PYTHON = """#!{python}
import os, signal, sys, time
from pathlib import Path
asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
Path({folder!r}, "rank-" + os.environ["RANK"]).touch()
while not asked:
    time.sleep(0.02)
if os.environ["RANK"] == "0":
    Path(sys.argv[sys.argv.index("--stop_file") + 1]).touch()
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
            STEP_PIDS=str(self.folder / "step"),
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

    def end(self, process, seconds=240):
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            kill(marked(self.mark))
            remove_shared_buffers(self.port)
        return process.returncode, output

    def signal(self, process, whom, number):
        """``step``: all its tasks, as Slurm does; ``shell``: the script, as ``scancel --batch`` does."""
        pids = [process.pid] if whom == "shell" else map(int, (self.folder / "step").read_text().split())
        for pid in pids:
            os.kill(pid, number)

    @property
    def calls(self):
        return (self.folder / "calls").read_text().splitlines() if (self.folder / "calls").exists() else []


TOLD = [(whom, number) for whom in ("step", "shell") for number in (signal.SIGUSR1, signal.SIGTERM)]


def wait_for(path, process, seconds):
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.parametrize(("whom", "number"), TOLD)
def test_whoever_is_told_the_ranks_stop_and_the_job_is_requeued(tmp_path, whom, number):
    cluster = Cluster(tmp_path)
    (tmp_path / "python").write_text(PYTHON.format(python=sys.executable, folder=str(tmp_path)))
    (tmp_path / "python").chmod(0o755)
    process = cluster.submit([])
    wait_for(tmp_path / "step", process, 30)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("rank-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    cluster.signal(process, whom, number)
    code, output = cluster.end(process, seconds=30)
    assert (code, cluster.calls) == (0, ["requeue 7"]), output
    assert not list(ROOT.glob(".stopped-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("whom", "number"), TOLD)
def test_it_saves_is_requeued_and_ends(tmp_path, whom, number):
    place = RecipePlace(tmp_path / "run")
    (tmp_path / "bin").mkdir()
    cluster = Cluster(tmp_path / "bin")
    # Long enough that it is still under way when it is told.
    arguments = place.arguments(script=(), **{"length.tokens": 100_000})[1:]
    process = cluster.submit(arguments)
    wait_for(place.output / "metrics.jsonl", process, 200)
    cluster.signal(process, whom, number)
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
    code, output = cluster.end(cluster.submit(place.arguments(script=(), **{"deepspeed.train_batch_size": 15})[1:]))
    assert code == 1, output
    assert output.count("error: train_batch_size: got 15") == 1
    assert cluster.calls == []
