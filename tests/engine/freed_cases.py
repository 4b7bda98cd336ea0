"""Reads of weights that ZeRO-3 has freed, as user code does them between steps."""

import copy
import io
import pickle

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_sdp
from deepspeed_sdp.errors import StateError
from tests.engine.cases import build_model, ds_config, run_steps

READS = {
    "state_dict": lambda module, p: module.state_dict(),
    "norm": lambda module, p: p.norm(),
    "foreach": lambda module, p: torch._foreach_norm([p]),
    "linalg": lambda module, p: torch.linalg.vector_norm(p),
    "aten": lambda module, p: torch.ops.aten.sum(p),
    "moving average": lambda module, p: torch.zeros(p.shape).lerp_(p, 0.1),
    "data": lambda module, p: p.data.abs().max(),
    "detach": lambda module, p: p.detach().numpy(),
    "item": lambda module, p: p.flatten()[0].item(),
    "transposed": lambda module, p: p.T @ p,
    "deepcopy": lambda module, p: copy.deepcopy(module),
    "deepcopy of a weight": lambda module, p: copy.deepcopy(p),
    "pickle": lambda module, p: pickle.dumps(p),
    "save": lambda module, p: torch.save(p, io.BytesIO()),
    "write": lambda module, p: p.data.zero_(),
    "load_state_dict": lambda module, p: module.load_state_dict({"lm_head.weight": torch.ones(p.shape)}, False),
    "move": lambda module, p: module.to(torch.bfloat16),
    "pointer": lambda module, p: p.data_ptr(),
    "vector": lambda module, p: nn.utils.parameters_to_vector(module.parameters()),
    "forward": lambda module, p: nn.functional.linear(torch.ones(1, p.shape[1]), p),
}


def read_between_steps(sdp, offload=False):
    """What each read gives: the class and words of an error, or ``"read"``; and what a step does afterwards."""
    zero = {"offload_param": {"device": "cpu"}} if offload else {}
    config = ds_config(3, bucket=4000)
    config["zero_optimization"].update(zero)
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=config, sdp_config=sdp)
    identity = {name: id(p) for name, p in engine.module.named_parameters()}
    run_steps(engine, 1)
    weight = engine.module.get_parameter("lm_head.weight")
    answers = {}
    for name, read in READS.items():
        try:
            read(engine.module, weight)
            answers[name] = "read"
        except (StateError, RuntimeError) as error:
            answers[name] = f"{type(error).__name__}: {error}"
    # Past Python: a collective takes tensors in C++.
    try:
        dist.all_reduce(weight, group=dist.group.WORLD)
        answers["collective"] = "read"
    except (StateError, RuntimeError, ValueError) as error:
        answers["collective"] = f"{type(error).__name__}: {error}"
    seen = {
        "shape": list(weight.shape),
        "numel": weight.numel(),
        "dtype": str(weight.dtype),
        "trains": weight.requires_grad,
        "gradient": weight.grad,
        "repr": repr(weight),
        "parameter": isinstance(weight, nn.Parameter),
        "same": identity == {name: id(p) for name, p in engine.module.named_parameters()},
    }
    with engine.gathered_weights(None):
        kept = weight.detach()
        copied = kept.clone()
        answers["inside"] = float(weight.norm())
    # A view that outlives its context is of memory that is still there.
    answers["view"] = bool(torch.equal(kept, copied))
    after = run_steps(engine, 1)
    engine.destroy()
    try:
        weight.norm()
        answers["destroyed"] = "read"
    except StateError as error:
        answers["destroyed"] = str(error)
    return {"answers": answers, "seen": seen, "after": after}
