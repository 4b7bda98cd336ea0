"""Jobs that are sent a signal in mid-run, at the process that a user or a scheduler would signal."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

from deepspeed_sdp.engine.deepspeed.start import clear_stale_locks
from tests.launch.jobs import HANGS_AFTER, RANK_VARIABLES, TRAIN, Job, command_line, kill, marked
from tests.support.ranks import free_port, rank_environment, remove_shared_buffers

LAUNCHERS = {
    "deepspeed": lambda port: ["deepspeed", "--num_accelerators", "2", "--master_port", str(port)],
    "torchrun": lambda port: ["torchrun", "--nproc_per_node", "2", "--master_port", str(port)],
}


def run_signalled(workplace, launcher, number, whom="launcher", switches=()):
    """A job that would go on for long is sent ``number`` once it trains.

    Args:
        workplace: a :class:`Workplace`, or for ``deepspeed-sdp`` a :class:`RecipePlace`.
        launcher: a key of ``LAUNCHERS``, or ``deepspeed-sdp``, which starts its ranks itself.
        whom: ``launcher``, the process that was started; ``group``: all processes of the terminal, as Ctrl-C does; or a
            part of the command line of the process.
        switches: of the launcher.
    """
    port, mark = free_port(), f"TEST_JOB={uuid.uuid4().hex}"
    environment = rank_environment(**dict([mark.split("=")]))
    for variable in RANK_VARIABLES:
        environment.pop(variable, None)
    clear_stale_locks(patience=0)
    if launcher == "deepspeed-sdp":
        environment["MASTER_PORT"] = str(port)
        name, options = launcher, workplace.arguments("--steps", "1000000", script=())
    else:
        name, *options = LAUNCHERS[launcher](port)
        options += [*switches, str(TRAIN), *_arguments(workplace)]
    began = time.monotonic()
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name(name)), *options],
        env=environment,
        cwd=workplace.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        metrics = workplace.output / "metrics.jsonl"
        while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < began + HANGS_AFTER:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.1)
        if whom == "group":
            os.killpg(process.pid, number)
        else:
            pids = [process.pid] if whom == "launcher" else [p for p in marked(mark) if whom in command_line(p)]
            os.kill(pids[0], number)
        # Ends when the last process that holds the pipe has ended.
        output, _ = process.communicate(timeout=HANGS_AFTER)
    except subprocess.TimeoutExpired:
        kill(marked(mark))
        output = process.communicate()[0] + f"\nkilled: hung for {HANGS_AFTER} s"
    finally:
        left = marked(mark)
        commands = [command_line(pid) for pid in left]
        kill(left)
        remove_shared_buffers(port)
    return Job(process.returncode, output, time.monotonic() - began, commands, 2)


def _arguments(workplace):
    files = {"deepspeed_config": "ds.json", "sdp_config": "sdp.json", "model": "model.json", "text": "text.txt"}
    options = [part for key, file in files.items() for part in (f"--{key}", str(workplace.folder / file))]
    options += ["--output_dir", str(workplace.output), "--vocab_size", "320", "--seq_length", "32"]
    return [*options, "--steps", "1000000", "--eval_interval", "1000000"]


def was_saved(workplace, job):
    """Whether the job said so, and there is a checkpoint to go on from."""
    return "the same command goes on from" in job.output and (workplace.output / "checkpoints" / "latest").exists()
