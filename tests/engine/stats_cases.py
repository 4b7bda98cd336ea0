"""What a rank really sends, seen at torch.distributed itself."""

import contextlib
from unittest import mock

import torch.distributed as dist

import deepspeed_sdp
from deepspeed_sdp.engine.comm import transport
from tests.engine.cases import build_model, ds_config, face, run_steps

# The tensor whose size counts, by position, and bytes sent per byte of it in a ring of n.
KINDS = {
    "all_reduce": (0, lambda n: 2 * (n - 1) / n),
    transport._ALL_GATHER: (0, lambda n: (n - 1) / n),
    transport._REDUCE_SCATTER: (1, lambda n: (n - 1) / n),
    "broadcast": (0, lambda n: 1.0),
    "reduce": (0, lambda n: 1.0),
}


@contextlib.contextmanager
def watched():
    """Every collective on tensors: a list of (kind, group size, bytes sent)."""
    seen = []

    def wrap(kind, original):
        def watch(*args, **kwargs):
            group = kwargs.get("group")
            if kind == "all_to_all_single":
                _, sent, *sizes = args
                ranks = dist.get_world_size(group)
                sizes = sizes[1] if sizes else [sent.numel() // ranks] * ranks
                # What goes to this rank itself does not travel.
                others = [size for place, size in enumerate(sizes) if place != dist.get_rank(group)]
                nbytes = sum(others) * sent.element_size()
            else:
                position, factor = KINDS[kind]
                tensor = args[position]
                nbytes = tensor.numel() * tensor.element_size() * factor(dist.get_world_size(group))
            seen.append((kind, dist.get_world_size(group), nbytes))
            return original(*args, **kwargs)

        return watch

    with contextlib.ExitStack() as stack:
        for kind in (*KINDS, "all_to_all_single"):
            stack.enter_context(mock.patch.object(dist, kind, wrap(kind, getattr(dist, kind))))
        yield seen


def traffic(ds, sdp, model=None):
    engine, *_ = deepspeed_sdp.initialize(model=build_model(model=model), config=ds_config(**ds), sdp_config=sdp)
    run_steps(engine, 1)
    with watched() as seen:
        run_steps(engine, 1)
    result = {"seen": seen, "buckets": buckets(engine), **face(engine)}
    engine.destroy()
    return result


def buckets(engine):
    """Every bucket: (name of one parameter in it, owner set, elements, elements with padding)."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    parameters = engine.optimizer.parameters
    return [
        (names[id(parameters[flat.items[0]])], flat.owner_set, flat.numel, flat.padded_numel)
        for flat in engine.optimizer._buckets
    ]
