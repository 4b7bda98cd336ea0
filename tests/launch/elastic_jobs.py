"""Elastic jobs whose ranks are killed: what was kept is compared with what goes on.

    python -m tests.launch.elastic_jobs FOLDER KILLS SEED

kills random ranks at random moments, several in a job, and starts jobs again until it has done so often enough.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from deepspeed_sdp.engine.deepspeed.start import clear_stale_locks
from tests.launch.jobs import HANGS_AFTER, RANK_VARIABLES, Job, command_line, kill, marked
from tests.launch.recipe_jobs import RecipePlace
from tests.support.ranks import rank_environment

# Notes what is kept and what a job goes on with: a digest of all weights, and sums over all moments.
NOTING = """
import hashlib, json, time, torch
from pathlib import Path
from deepspeed_sdp.engine.engine import SDPEngine
from deepspeed_sdp.ranks import reduce_numbers

def state_of(engine):
    full, digest = engine.full_state_dict(), hashlib.sha256()
    for name in sorted(full or ()):
        digest.update(full[name].contiguous().numpy().tobytes())
    sums = torch.zeros(2, dtype=torch.float64)
    for state in engine.optimizer.state.values():
        for place, key in enumerate(("exp_avg", "exp_avg_sq")):
            sums[place] += state[key].double().abs().sum() if key in state else 0.0
    return {"weights": digest.hexdigest(), "moments": reduce_numbers(sums, "a test").tolist()}

def note(engine, file, **values):
    line = {"step": engine.global_steps, "ranks": torch.distributed.get_world_size(), **state_of(engine), **values}
    if engine.global_rank == 0:
        with open(file, "a") as lines:
            lines.write(json.dumps(line) + "\\n")

keep = SDPEngine.save_in_memory
def noting(self, folder, client_state=None):
    note(self, "kept.jsonl")
    return keep(self, folder, client_state)
SDPEngine.save_in_memory = noting

newest = loop.Loop._newest
def took(self, kept):
    done = newest(self, kept)
    note(self.engine, "taken.jsonl", path=done[0], samples=self.engine.global_samples)
    return done
loop.Loop._newest = took

step = loop.train_step
def slow(engine, batches):
    for name in ("kill.json", "break.json"):
        with_this = json.loads(Path(name).read_text()) if Path(name).exists() else {}
        if with_this.get("step") == engine.global_steps and with_this.get("rank") == engine.global_rank:
            os.unlink(name)
            if name == "kill.json":
                os.kill(os.getpid(), 9)
            raise RuntimeError("the device fell off the bus")
    time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
    return step(engine, batches)
loop.train_step = slow
"""
CHANGES = {"sdp.num_subnetworks": 4, "deepspeed.train_batch_size": 24, "deepspeed.train_micro_batch_size_per_gpu": 3}


class ElasticPlace(RecipePlace):
    """``start`` begins a job on four ranks.

    Attributes:
        tail: of the script that they run.
    """

    tail = ""

    def job(self, *switches, steps=24, ranks=4, restarts=3, nodes=None, folder="memory", **changes):
        """Arguments of torchrun."""
        where = ["--standalone"] if nodes is None else nodes
        head = [*where, "--nproc_per_node", str(ranks), "--max_restarts", str(restarts)]
        changes = {**CHANGES, "length.steps": steps, **changes}
        script = self.script(NOTING + self.tail)
        typed = self.arguments("--elastic_folder", str(self.folder / folder), *switches, script=script, **changes)
        return ["torchrun", *map(str, (*head, *typed))]

    def start(self, *arguments, **environment):
        """A process group of its own; see :func:`end`."""
        mark = f"TEST_JOB={uuid.uuid4().hex}"
        env = rank_environment(**dict([mark.split("=")]), **environment)
        for variable in RANK_VARIABLES:
            env.pop(variable, None)
        clear_stale_locks(patience=0)
        name, *rest = arguments
        # Into a file: nobody reads meanwhile, and a pipe would be full one day.
        log = self.folder / f"log-{mark[-8:]}.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name(name)), *rest],
                env=env,
                cwd=self.folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process.mark, process.log = mark, log
        return process

    def run(self, *switches, environment=None, **values):
        return end(self.start(*self.job(*switches, **values), **(environment or {})))

    def read(self, name):
        file = self.folder / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def memory(self):
        """Names of what is left in the memory of nodes."""
        return sorted(path.name for path in self.folder.glob("memory*/deepspeed-sdp-*"))


def end(process, seconds=HANGS_AFTER):
    """Wait for it; :class:`Job`."""
    began = time.monotonic()
    how = ""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(marked(process.mark))
        process.wait()
        how = f"\nkilled: hung for {seconds} s"
    time.sleep(0.2)
    left = marked(process.mark)
    commands = [command_line(pid) for pid in left]
    kill(left)
    output = process.log.read_text(errors="replace") + how
    return Job(process.returncode, output, time.monotonic() - began, commands, 4)


def ranks_of(process):
    """PIDs of a job's ranks."""
    return [
        pid for pid in marked(process.mark) if "script.py" in (line := command_line(pid)) and "torchrun" not in line
    ]


def check_taken(place):
    """What went on from memory was what had been kept, to the bit; in how many cases that was."""
    kept, taken = place.read("kept.jsonl"), place.read("taken.jsonl")
    # A job whose launcher is killed may still save a checkpoint.
    from_memory = [line for line in taken if line["path"] is not None and "checkpoints" not in line["path"]]
    for line in from_memory:
        # A step may have been kept twice, by jobs that came there on different ways: the latter replaced the former.
        same = [k for k in kept if k["step"] == line["step"] and k["weights"] == line["weights"]]
        assert same, line
        for moment, other in zip(line["moments"], same[-1]["moments"], strict=True):
            assert abs(moment - other) <= 1e-9 * abs(other), (line, same[-1])
    return len(from_memory)


def assert_goes_on(process, deadline):
    assert process.poll() is None, "it has ended"
    assert time.monotonic() < deadline, "it does not go on"


def main(folder, kills, seed):
    draw, place, done = random.Random(seed), ElasticPlace(Path(folder)), 0
    worst, jobs = 0, 0
    while done < kills:
        process, jobs = place.start(*place.job("--elastic", "5", steps=100_000), STEP_SECONDS="0.05"), jobs + 1
        try:
            for _ in range(min(2, kills - done)):
                began = len(place.read("taken.jsonl"))
                deadline = time.monotonic() + 150
                # It goes on (or begins), and trains.
                while len(place.read("taken.jsonl")) == began or not place.read("taken.jsonl"):
                    assert_goes_on(process, deadline)
                    time.sleep(0.1)
                time.sleep(draw.uniform(0.5, 6.0))
                victim = draw.choice(ranks_of(process))
                os.kill(victim, signal.SIGKILL)
                done += 1
                print(f"kill {done}: {len(place.read('taken.jsonl'))} starts", flush=True)
            began = len(place.read("taken.jsonl"))
            while len(place.read("taken.jsonl")) == began:
                assert_goes_on(process, deadline + 300)
                time.sleep(0.1)
        finally:
            kill(marked(process.mark))
            process.wait()
        for line in process.log.read_text(errors="replace").splitlines():
            if "steps are lost" in line:
                worst = max(worst, int(line.split()[0]))
                assert "from memory on" in line, line
    from_memory, starts = check_taken(place), len(place.read("taken.jsonl"))
    print(f"{done} kills in {jobs} jobs; {starts} starts, {from_memory} from memory; at most {worst} steps lost")
    assert worst <= 5


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
