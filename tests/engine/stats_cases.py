"""What a rank really sends, seen at torch.distributed itself."""

import contextlib
from unittest import mock

import deepspeed.comm.comm as ds_comm
import torch.distributed as dist

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, face, run_steps

# The tensor whose size counts, by position, and bytes sent per byte of it in a ring of n.
KINDS = {
    "all_reduce": (0, lambda n: 2 * (n - 1) / n),
    "all_gather_into_tensor": (0, lambda n: (n - 1) / n),
    "all_gather_single": (0, lambda n: (n - 1) / n),
    "reduce_scatter_tensor": (1, lambda n: (n - 1) / n),
    "broadcast": (0, lambda n: 1.0),
    "reduce": (0, lambda n: 1.0),
}


@contextlib.contextmanager
def watched():
    """Every collective on tensors: a list of (kind, group size, bytes sent)."""
    seen, depth = [], [0]

    def wrap(kind, original):
        position, factor = KINDS[kind]

        def watch(*args, **kwargs):
            depth[0] += 1
            try:
                if depth[0] == 1:
                    tensor = [*args, *kwargs.values()][position]
                    n = dist.get_world_size(kwargs.get("group") or None)
                    seen.append((kind, n, tensor.numel() * tensor.element_size() * factor(n)))
                return original(*args, **kwargs)
            finally:
                depth[0] -= 1

        return watch

    with contextlib.ExitStack() as stack:
        for kind in KINDS:
            if hasattr(dist, kind):
                stack.enter_context(mock.patch.object(dist, kind, wrap(kind, getattr(dist, kind))))
        backend = ds_comm.cdb
        for name, kind in (
            ("all_gather_function", "all_gather_into_tensor"),
            ("reduce_scatter_function", "reduce_scatter_tensor"),
        ):
            if getattr(backend, name, None) is not None:
                stack.enter_context(mock.patch.object(backend, name, wrap(kind, getattr(backend, name))))
        yield seen


def traffic(ds, sdp, model=None):
    engine, *_ = deepspeed_sdp.initialize(model=build_model(model=model), config=ds_config(**ds), sdp_config=sdp)
    run_steps(engine, 1)
    with watched() as seen:
        run_steps(engine, 1)
    result = {"seen": seen, **face(engine)}
    engine.destroy()
    return result
