"""The state of a training kept in the memory of nodes, of which there are several in this machine: a folder each."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from tests.engine.cases import face, run_steps
from tests.engine.checkpoint_cases import start


def _folder(folder, nodes):
    return Path(folder, f"node-{nodes[dist.get_rank()]}")


def keep_and_go_on(folder, nodes, sdp, ds, steps=3, more=2, keeps=1, **values):
    """Train, keep, train on: what came after it was kept for the last time."""
    engine = start(sdp, ds, **values)
    for number in range(keeps):
        run_steps(engine, steps, seed=number)
        assert engine.save_in_memory(_folder(folder, nodes), {"consumed": 17})
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    result = {"kept": face(engine)["full"]}
    result.update(run_steps(engine, more, seed=9), draws=draws, lr=engine.get_lr(), **face(engine))
    engine.destroy()
    return result


def take_and_go_on(folder, nodes, sdp, ds, saved=None, more=2, **values):
    """The same from what nodes keep, or a checkpoint."""
    engine = start(sdp, ds, seed=1, **values)
    newest = engine.load_newest(_folder(folder, nodes), Path(saved or folder) / "checkpoints")
    draws = [random.random(), float(np.random.rand()), float(torch.rand(()))]
    loaded, steps = face(engine)["full"], engine.global_steps
    result = {**run_steps(engine, more, seed=9), "draws": draws, "lr": engine.get_lr(), **face(engine)}
    result.update(
        path=newest.path,
        client_state=newest.client_state,
        is_in_memory=newest.is_in_memory,
        problems=list(newest.problems),
        steps=steps,
        loaded=loaded,
    )
    engine.destroy()
    return result


def keep_error(folder, nodes, sdp, ds):
    engine = start(sdp, ds)
    run_steps(engine, 1)
    try:
        engine.save_in_memory(_folder(folder, nodes))
        engine.wait_for_checkpoint()
    except Exception as error:
        return str(error)
    finally:
        engine.destroy()
    return None
