"""Every optimizer that DeepSpeed's config offers, through a job's life; and parameters that are frozen within it."""

import contextlib
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, face, run_steps
from tests.support.fused_ops import Lion, SignBitLion, fused_ops
from tests.support.models import token_batches

ADAM = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-5}
LION = {"lr": 1e-4, "betas": [0.9, 0.99], "weight_decay": 0.1}
ADAGRAD = {"lr": 1e-3, "eps": 1e-5}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}

# "optimizer" of the DeepSpeed config, what is more in "zero_optimization", and the same in plain torch.
OPTIMIZERS = {
    "FusedAdam": ({"type": "AdamW", "params": ADAM}, {}, lambda p: torch.optim.AdamW(p, **ADAM)),
    "FusedAdam-l2": (
        {"type": "Adam", "params": {**ADAM, "adam_w_mode": False}},
        {},
        lambda p: torch.optim.Adam(p, **ADAM),
    ),
    "FusedLion": ({"type": "Lion", "params": LION}, {}, lambda p: Lion(p, **LION)),
    "Adagrad": ({"type": "Adagrad", "params": ADAGRAD}, {}, lambda p: torch.optim.Adagrad(p, **ADAGRAD)),
    "CPUAdam": ({"type": "AdamW", "params": ADAM}, OFFLOAD, lambda p: torch.optim.AdamW(p, **ADAM)),
    "CPULion": ({"type": "Lion", "params": LION}, OFFLOAD, lambda p: SignBitLion(p, **LION)),
    "CPUAdagrad": ({"type": "Adagrad", "params": ADAGRAD}, OFFLOAD, lambda p: torch.optim.Adagrad(p, **ADAGRAD)),
    **{
        f"{name}{label}": (
            {"type": name, "params": params},
            {},
            lambda p, name=name, params=params: getattr(torch.optim, name)(p, **params),
        )
        for name, label, params in (
            ("SGD", "", {"lr": 1e-2}),
            ("SGD", "-momentum", {"lr": 1e-2, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
            ("RMSprop", "", {"lr": 1e-3, "eps": 1e-5, "centered": True, "momentum": 0.5}),
            ("NAdam", "", {"lr": 1e-3, "eps": 1e-5, "weight_decay": 0.1}),
            ("RAdam", "", {"lr": 1e-2, "eps": 1e-5}),
            ("Adamax", "", {"lr": 1e-3, "eps": 1e-5}),
            ("Adadelta", "", {"lr": 1.0, "eps": 1e-5}),
            ("ASGD", "", {"lr": 1e-2, "t0": 2}),
            ("Rprop", "", {"lr": 1e-4}),
        )
    },
}


def start(optimizer, stage, bucket=4000, **ds):
    config, zero, _ = OPTIMIZERS[optimizer]
    settings = ds_config(stage, bucket=bucket, zero_allow_untested_optimizer=True, **ds)
    settings["optimizer"] = config
    settings["zero_optimization"].update(zero)
    with fused_ops() if optimizer.startswith("Fused") else contextlib.nullcontext():
        engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=settings, sdp_config={"coverage": 0.5})
    return engine


def live(folder, optimizer, stage, others, bf16=False):
    """Train, save, train on; then from the checkpoint in the same layout, and at the other stages."""
    engine = start(optimizer, stage, bf16=bf16)
    before = run_steps(engine, 3)
    engine.save_checkpoint(folder)
    result = {"went_on": run_steps(engine, 2, seed=9), "class": type(engine.basic_optimizer).__name__, **face(engine)}
    result["losses"], result["norms"] = (before[key] + result["went_on"][key] for key in ("losses", "norms"))
    engine.destroy()
    for name, (other, bucket) in {"same": (stage, 4000), **others}.items():
        engine = start(optimizer, other, bucket, bf16=bf16)
        engine.load_checkpoint(folder)
        result[name] = {**run_steps(engine, 2, seed=9), "full": engine.full_state_dict(torch.float32)}
        engine.destroy()
    return result


class CountsCalls(torch.optim.Optimizer):
    """SGD whose rate falls with the calls of ``step``, counted in the group."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] / group["k"] * parameter.grad)


CLIENTS = {
    "counts_calls": lambda groups: CountsCalls(groups, lr=1e-2),
    # its state holds a number that follows from the rate of a group
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=1e-2, t0=2),
    # transformers' default, whose count is a tensor where the parameters are
    "adamw_fused": lambda groups: torch.optim.AdamW(groups, lr=1e-3, eps=1e-5, fused=True),
    # one group keeps nothing
    "sgd": lambda groups: torch.optim.SGD([{**groups[0], "momentum": 0.9}, groups[1]], lr=1e-2),
}


def live_of_client(folder, client, stage, steps=(3, 2)):
    """The same with two groups of a client's, of one of which some ranks hold nothing."""
    results = {}
    for name, load in (("went_on", False), ("same", True)):
        module = build_model()
        inside = [p for n, p in module.named_parameters() if "layers.1." in n]
        others = [p for n, p in module.named_parameters() if "layers.1." not in n]
        optimizer = CLIENTS[client]([{"params": others}, {"params": inside, "lr": 3e-2}])
        engine, *_ = deepspeed_sdp.initialize(
            model=module,
            optimizer=optimizer,
            config=ds_config(stage, bucket=4000, optimizer=False, zero_allow_untested_optimizer=True),
            sdp_config={"coverage": 0.5, "granularity": "layer"},
        )
        if load:
            engine.load_checkpoint(folder)
        else:
            first = run_steps(engine, steps[0])
            engine.save_checkpoint(folder)
        results[name] = {**run_steps(engine, steps[1], seed=9), **face(engine)}
        results[name]["counts"] = [group.get("k") for group in optimizer.param_groups]
        engine.destroy()
    results["first"] = first
    return results


def load_into(folder, optimizer):
    """What a job with another ``optimizer`` says to a checkpoint of DeepSpeed's AdamW, or the losses after it."""
    engine = start("FusedAdam", 1)
    run_steps(engine, 2)
    engine.save_checkpoint(folder)
    went_on = run_steps(engine, 2, seed=9)["losses"]
    engine.destroy()
    settings = ds_config(1, zero_allow_untested_optimizer=True)
    settings["optimizer"] = optimizer
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=settings, sdp_config={"coverage": 0.5})
    try:
        engine.load_checkpoint(folder)
        return went_on, run_steps(engine, 2, seed=9)["losses"]
    except deepspeed_sdp.SDPError as error:
        return str(error)
    finally:
        engine.destroy()


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors one by one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def host_side_of_a_step(stage):
    """Of one update: numbers read one by one, lists of numbers read, calls of the optimizer, portions, buckets."""
    config = {"type": "SGD", "params": {"lr": 1e-2}}
    settings = ds_config(stage, clip=1.0, bucket=2000, zero_allow_untested_optimizer=True)
    settings["zero_optimization"]["allgather_bucket_size"] = 9000
    engine, *_ = deepspeed_sdp.initialize(
        model=build_model(), config={**settings, "optimizer": config}, sdp_config={"coverage": 0.5}
    )
    run_steps(engine, 1)
    calls, lists, tolist = [], [], torch.Tensor.tolist
    engine.basic_optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    ids = token_batches(1, 4)[0][dist.get_rank()][0]
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    with (
        Reads() as reads,
        mock.patch.object(torch.Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor)),
    ):
        engine.optimizer.step()
    optimizer = engine.optimizer
    portions = sum(1 for portion in optimizer.refresh.portions if any(portion.owned))
    result = (reads.count, len(lists), len(calls), portions, len(optimizer.masters))
    engine.destroy()
    return result


def freeze_in_between(optimizer, stage, pattern, sdp, only=None, accumulation=1):
    """Two steps, two with what ``pattern`` names frozen, two more; with ``only`` that rank alone freezes."""
    config, *_ = OPTIMIZERS[optimizer]
    settings = ds_config(stage, bucket=4000, accumulation=accumulation, zero_allow_untested_optimizer=True)
    settings["optimizer"] = config
    with fused_ops():
        engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=settings, sdp_config=sdp)
    snapshots, losses = [], []
    try:
        for is_frozen, seed in ((False, 1), (True, 2), (False, 3)):
            for name, parameter in engine.module.named_parameters():
                if pattern in name and only in (None, dist.get_rank()):
                    parameter.requires_grad_(not is_frozen)
            losses += run_steps(engine, 2, seed=seed)["losses"]
            snapshots.append(engine.full_state_dict(torch.float32))
        result = {"losses": losses, "snapshots": snapshots, **face(engine)}
    except deepspeed_sdp.SDPError as error:
        result = str(error)
    engine.destroy()
    return result


def thaw_later(sdp):
    """A parameter that was frozen at the start is to be trained from the second step on."""
    module = build_model(frozen=["model.norm.weight"])
    engine, *_ = deepspeed_sdp.initialize(model=module, config=ds_config(), sdp_config=sdp)
    run_steps(engine, 1)
    engine.module.get_parameter("model.norm.weight").requires_grad_(True)
    try:
        run_steps(engine, 1)
    except deepspeed_sdp.SDPError as error:
        return str(error)
    finally:
        engine.destroy()
    return None


def mixed_dtypes(which):
    """The refusal of a model of which ``which`` is bf16 in a job of fp32."""
    module = build_model()
    for name, parameter in module.named_parameters():
        if which in name:
            parameter.data = parameter.data.bfloat16()
    try:
        engine, *_ = deepspeed_sdp.initialize(model=module, config=ds_config(), sdp_config={"coverage": 0.5})
    except deepspeed_sdp.SDPError as error:
        return str(error)
    engine.destroy()
    return None


def unusual_passes(stage, kind):
    """A step with ``autograd.grad`` or two losses of one forward pass; losses of the two after it, and full weights."""
    engine, *_ = deepspeed_sdp.initialize(
        model=build_model(), config=ds_config(stage, bucket=4000), sdp_config={"coverage": 0.5}
    )
    run_steps(engine, 1)
    ids = token_batches(1, dist.get_world_size(), seed=5)[0][dist.get_rank()][0]
    loss = engine(input_ids=ids, labels=ids).loss
    weights = [p for p in engine.module.parameters() if p.requires_grad][-3:]
    if kind == "grad":
        torch.autograd.grad(loss, weights)
        loss = engine(input_ids=ids, labels=ids).loss
    elif kind == "grad_first":
        torch.autograd.grad(loss, weights, retain_graph=True)
    elif kind == "two_forward_passes":
        loss = 0.5 * (loss + engine(input_ids=ids, labels=ids).loss)
    if kind == "two_losses":
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward()
    elif stage:
        loss.backward()
    else:
        engine.backward(loss)
    engine.step()
    result = {**run_steps(engine, 2, seed=3), "full": engine.full_state_dict()}
    engine.destroy()
    return result


def ends_early(stage, use):
    """An exception inside ``loss.backward()`` on all ranks is caught; what the next ``use`` of the engine says."""
    engine, *_ = deepspeed_sdp.initialize(model=build_model(), config=ds_config(stage), sdp_config={"coverage": 0.5})
    run_steps(engine, 1)
    ids = torch.arange(24).view(2, 12)
    loss = engine(input_ids=ids, labels=ids).loss

    def fail(_):
        raise ValueError("of the user")

    hook = engine.module.model.embed_tokens.weight.register_hook(fail)
    messages = []
    for attempt in (loss.backward, engine.step if use == "step" else lambda: engine(input_ids=ids, labels=ids)):
        try:
            attempt()
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    hook.remove()
    engine.destroy()
    return messages


def nan_that_is_dropped(stage):
    """The message of a step whose gradients overflow on rank 1, after rank 0 dropped a NaN in :meth:`zero_grad`."""
    engine, *_ = deepspeed_sdp.initialize(
        model=build_model(),
        config=ds_config(stage),
        sdp_config={"coverage": 0.5, "comm": {"on_nonfinite": "stop"}},
    )
    ids = torch.arange(24).view(2, 12)
    engine.backward(engine(input_ids=ids, labels=ids).loss * (float("nan") if dist.get_rank() == 0 else 1.0))
    engine.zero_grad()
    engine.backward(engine(input_ids=ids, labels=ids).loss * (float("inf") if dist.get_rank() == 1 else 1.0))
    try:
        engine.step()
    except deepspeed_sdp.SDPError as error:
        return str(error)
    finally:
        engine.destroy()
    return None
