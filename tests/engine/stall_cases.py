"""One rank of three stops for long; the others must say so. See ``test_waits.py``.

Run as a program: rank, file of the rendezvous store, where to stop, time limit of the job in seconds.
"""

import os
import sys
import time
from datetime import timedelta

import deepspeed
import torch.distributed as dist

import deepspeed_sdp
from deepspeed_sdp.failures import one_report
from tests.engine.cases import build_model, ds_config, run_steps

STALLED = 2


def main(rank, store, where, limit):
    os.environ.update(RANK=str(rank), WORLD_SIZE="3", LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="3", LOCAL_SIZE="3")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=3, timeout=timedelta(seconds=limit)
    )
    deepspeed.init_distributed("gloo", dist_init_required=False)

    def stall(*_):
        print("stalls", flush=True)
        time.sleep(600)

    with one_report():
        if where == "agreement" and rank == STALLED:
            stall()
        engine, *_ = deepspeed_sdp.initialize(
            model=build_model(), config=ds_config(1, bucket=1), sdp_config={"coverage": "2/3"}
        )
        run_steps(engine, 1)
        if where == "backward" and rank == STALLED:
            # The first gradient of a layer's own parameter in the backward pass.
            next(p for n, p in engine.module.named_parameters() if "down_proj" in n).register_hook(stall)
        print("ready", flush=True)
        run_steps(engine, 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]))
