"""Ranks that save without end and are killed at random moments; see ``test_kill.py``.

Run as a program: every trial forks two ranks from this process, which has imported everything already.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

import deepspeed_sdp
from deepspeed_sdp.checkpoint import folder as folders
from tests.engine.cases import build_model, ds_config, run_steps


def rank_main(rank, folder, store):
    """Go on from the latest checkpoint; then step and save for ever."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2", LOCAL_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", dist_init_required=False)
    engine, *_ = deepspeed_sdp.initialize(
        model=build_model(), config=ds_config(1), sdp_config={"coverage": 0.25, "checkpoint": {"keep_last": 2}}
    )
    engine.load_checkpoint(folder)
    while True:
        run_steps(engine, 1)
        engine.save_checkpoint(folder, client_state={"step": engine.global_steps})


def check(folder, step):
    """The latest checkpoint is complete, and no older than the one before; its step."""
    tag = folders.latest(folder)
    if tag is None:
        return step
    checkpoint = folder / tag
    files = folders.read_manifest(checkpoint)
    assert not folders.damage(checkpoint, files)
    now = torch.load(checkpoint / "state.pt", weights_only=True)["client_state"]["step"]
    assert now >= step, (now, step)
    return now


def main(folder, trials, seed):
    generator, step, caught = random.Random(seed), 0, 0
    for _ in range(trials):
        store = tempfile.mktemp()
        ranks = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                with open(os.devnull, "w") as nothing:
                    os.dup2(nothing.fileno(), 1)
                    os.dup2(nothing.fileno(), 2)
                rank_main(rank, folder, store)
                os._exit(0)
            ranks.append(pid)
        before = folders.latest(folder)
        deadline = time.monotonic() + 60
        while folders.latest(folder) == before and time.monotonic() < deadline:
            time.sleep(0.01)  # it has come as far as saving
        time.sleep(generator.random() * 0.15)
        victims = generator.sample(ranks, generator.choice([1, 2]))
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        caught += any(path.name.startswith(".") for path in folder.iterdir())
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        step = check(folder, step)
        Path(store).unlink(missing_ok=True)
    print(f"steps {step}, killed while saving {caught}")
    assert step >= trials, "every trial must have gone on from the one before"
    assert caught > trials // 4, "kills must fall into saving"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
