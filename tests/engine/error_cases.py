"""Jobs that must be refused, with the same words on every rank."""

import functools
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler as schedulers
from transformers import BloomConfig, BloomForCausalLM

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config
from tests.support import adapters


def refused(ds=None, sdp=None, kind="", rank=None, only=None):
    """Call initialize with ``ds`` merged into the DeepSpeed config; the error as (class, message), or ``None``.

    ``kind`` changes the call further. With ``rank``, the change ``only`` is made on that rank alone.
    """
    config, block = merge(ds_config(), ds or {}), sdp if sdp is not None else {"coverage": 0.5}
    here = rank is None or rank == dist.get_rank()
    if rank is not None and here and only:
        config, block = merge(config, only.get("ds", {})), {**block, **only.get("sdp", {})}
    arguments = {"model": build_model(), "config": config, "sdp_config": block}
    if kind == "fewer_parameters":
        arguments["model_parameters"] = list(arguments["model"].parameters())
    if kind and here:
        change(arguments, kind)
    try:
        engine, *_ = deepspeed_sdp.initialize(**arguments)
    except deepspeed_sdp.SDPError as error:
        return type(error).__name__, str(error)
    engine.destroy()
    return None


def merge(config, changes):
    """``changes`` has dotted keys."""
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        inner = config
        for part in parents:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return config


def change(arguments, kind):
    if kind == "bloom":
        arguments["model"] = BloomForCausalLM(BloomConfig(vocab_size=11, hidden_size=8, n_layer=1, n_head=2))
    elif kind == "linear":
        arguments["model"] = nn.Linear(2, 2)
    elif kind == "no_model":
        arguments["model"] = None
    elif kind == "no_config":
        arguments["config"] = None
    elif kind == "no_block":
        arguments["sdp_config"] = None
    elif kind == "two_blocks":
        arguments["config"]["subnetwork_data_parallel"] = {}
    elif kind == "meta":
        arguments["model"] = build_model(meta=True)
    elif kind == "half_meta":
        arguments["model"].model.norm.weight = nn.Parameter(torch.empty(32, device="meta"))
    elif kind == "other_width":
        arguments["model"] = build_model(model={"intermediate_size": 60})
    elif kind == "one_layer_more":
        arguments["model"] = build_model(model={"num_hidden_layers": 4})
    elif kind == "hook":
        arguments["model"].model.layers[1].register_forward_hook(lambda *_: None)
    elif kind == "rope":
        arguments["model"].model.rotary_emb.inv_freq.mul_(0.5)
    elif kind == "compiled":
        arguments["model"] = torch.compile(arguments["model"])
    elif kind == "mpu":
        arguments["mpu"] = object()
    elif kind.startswith("file:"):
        arguments["sdp_config"] = kind.removeprefix("file:")
    elif kind.startswith("ds_file:"):
        arguments["config"] = kind.removeprefix("ds_file:")
    elif kind == "fewer_parameters":
        arguments["model_parameters"] = list(arguments["model"].parameters())[1:]
    elif kind == "foreign_parameter":
        arguments["model_parameters"] = [nn.Parameter(torch.ones(3))]
    elif kind in ("stepped", "foreign_optimizer"):
        model = arguments["model"] if kind == "stepped" else build_model()
        optimizer = torch.optim.AdamW(model.parameters())
        if kind == "stepped":
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        arguments["optimizer"] = optimizer
    else:
        raise AssertionError(kind)


def wrong_adapter(kind, ds=None, sdp=None):
    """The error on this rank of a job whose adapter says what is not so, or says it on one rank alone."""
    adapter = {
        "one_norm": adapters.PhiAdapter(),
        "one_norm_of_attention": adapters.OneNorm(),
        "forgotten": adapters.ChangedMLP(adapters.without_tensor(1)),
        "other_on_a_rank": adapters.ChangedMLP(lambda module: replace(module, is_gated=dist.get_rank() != 2)),
    }[kind]
    model = adapters.phi_model() if isinstance(adapter, adapters.PhiAdapter) else build_model()
    restore = adapters.use(adapter)
    try:
        deepspeed_sdp.initialize(
            model=model, config=ds_config(**(ds or {})), sdp_config={"coverage": 0.5, **(sdp or {})}
        )
    except deepspeed_sdp.SDPError as error:
        return type(error).__name__, str(error)
    finally:
        restore()


def _adamw(changed):
    return lambda model: torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() == 2]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, **changed},
        ],
        lr=1e-3,
    )


def _cosine(length):
    return lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=length)


def _decay(factor):
    return lambda step: factor**step


def _lambda(factor):
    return lambda optimizer: schedulers.LambdaLR(optimizer, _decay(factor))


def _sequence(length):
    return lambda optimizer: schedulers.SequentialLR(
        optimizer, [schedulers.ConstantLR(optimizer), _cosine(length)(optimizer)], milestones=[2]
    )


# What one rank has, and what all others have.
DIFFERENT = {
    "lr": ({"optimizer": _adamw({"lr": 0.1})}, {"optimizer": _adamw({})}),
    "betas": ({"optimizer": _adamw({"betas": (0.9, 0.95)})}, {"optimizer": _adamw({})}),
    "tensor_lr": ({"optimizer": _adamw({"lr": torch.tensor(0.1)})}, {"optimizer": _adamw({"lr": torch.tensor(0.2)})}),
    "class": ({"optimizer": lambda m: torch.optim.NAdam(m.parameters())}, {"optimizer": _adamw({})}),
    "none": ({}, {"optimizer": _adamw({})}),
    "given_groups": (
        {"model_parameters": lambda m: [{"params": list(m.parameters()), "weight_decay": 0.5}]},
        {"model_parameters": lambda m: [{"params": list(m.parameters())}]},
    ),
    "callable": (
        {"optimizer": lambda _: lambda given: torch.optim.AdamW(given, lr=0.1)},
        {"optimizer": lambda _: lambda given: torch.optim.AdamW(given, lr=0.2)},
    ),
    "partial": (
        {"optimizer": lambda _: functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
        {"optimizer": lambda _: functools.partial(torch.optim.SGD, lr=0.1)},
    ),
    "made_by_a_callable": (
        {"optimizer": lambda _: Built({"lr": 0.1})},
        {"optimizer": lambda _: Built({"lr": 0.2})},
    ),
    "failing_callable": ({"optimizer": lambda _: Built({"nothing": 0.1})}, {"optimizer": lambda _: Built({})}),
    "scheduler": ({"lr_scheduler": _cosine(5)}, {"lr_scheduler": _cosine(6)}),
    "scheduler_class": ({"lr_scheduler": _lambda(0.5)}, {"lr_scheduler": _cosine(6)}),
    "closure": ({"lr_scheduler": _lambda(0.5)}, {"lr_scheduler": _lambda(0.25)}),
    "inner_scheduler": ({"lr_scheduler": _sequence(5)}, {"lr_scheduler": _sequence(6)}),
    "scheduler_callable": (
        {"lr_scheduler": lambda _: _cosine(5)},
        {"lr_scheduler": lambda _: _cosine(6)},
    ),
    "dtype": ({"dtype": torch.bfloat16}, {}),
}


class Built:
    """A callable that shows nothing of what it makes."""

    def __init__(self, options):
        self.options = options

    def __call__(self, given):
        return torch.optim.AdamW(given, **self.options)


def differing(name, rank):
    """Rank ``rank`` is given another optimizer, group or scheduler than the rest; the message of all."""
    values = DIFFERENT[name][0 if rank in ("all", dist.get_rank()) else 1]
    model = build_model().to(values.get("dtype", torch.float32))
    arguments = {key: make(model) for key, make in values.items() if key in ("optimizer", "model_parameters")}
    if "lr_scheduler" in values:
        arguments["optimizer"] = _adamw({})(model)
        arguments["lr_scheduler"] = values["lr_scheduler"](arguments["optimizer"])
    config = ds_config(optimizer=arguments.get("optimizer") is None, zero_allow_untested_optimizer=True)
    try:
        engine, *_ = deepspeed_sdp.initialize(model=model, config=config, sdp_config={"coverage": 0.5}, **arguments)
    except deepspeed_sdp.SDPError as error:
        return str(error)
    except TypeError as error:  # the client's own, on the rank that has it; the others are told
        return f"rank {dist.get_rank()}: TypeError: {error}"
    engine.destroy()
    return None
