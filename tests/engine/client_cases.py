"""Training with the client's own optimizers, parameter groups and schedulers."""

import deepspeed
import torch
from torch.optim import lr_scheduler as schedulers

import deepspeed_sdp
from tests.engine.cases import build_model, ds_config, face, run_steps

DECAY = {"lr": 1e-3, "weight_decay": 0.1}
NO_DECAY = {"lr": 3e-3, "weight_decay": 0.0}


def parameter_groups(module, reverse=False):
    """Matrices decay; norms and biases do not and learn faster; the embedding is slow."""
    named = list(module.named_parameters())
    slow = [p for name, p in named if "embed" in name]
    groups = [
        {"params": [p for name, p in named if p.dim() == 2 and "embed" not in name], **DECAY},
        {"params": [p for _, p in named if p.dim() == 1], **NO_DECAY},
        {"params": slow, "lr": 2e-4, "weight_decay": 0.01},
    ]
    return groups[::-1] if reverse else groups


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, eps=1e-5),
    "adamw-amsgrad": lambda groups: torch.optim.AdamW(groups, eps=1e-5, amsgrad=True),
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, eps=1e-5, fused=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, eps=1e-5, initial_accumulator_value=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9, nesterov=True),
}

SCHEDULERS = {
    "lambda": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "lambda-per-group": lambda o: schedulers.LambdaLR(o, [lambda s: 0.5**s, lambda s: 1.0 + s, lambda s: 1 / (1 + s)]),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, T_max=5),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.CosineAnnealingLR(o, T_max=3)], milestones=[2]
    ),
    "sequential-of-three": lambda o: schedulers.SequentialLR(
        o,
        [
            schedulers.ConstantLR(o, 0.1, total_iters=9),
            schedulers.ConstantLR(o, 0.7, 9),
            schedulers.ExponentialLR(o, 0.5),
        ],
        milestones=[1, 3],
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.LinearLR(o, 0.1, total_iters=3), schedulers.ExponentialLR(o, 0.8)], optimizer=o
    ),
    "one_cycle": lambda o: schedulers.OneCycleLR(o, max_lr=[4e-3, 1e-2, 1e-3], total_steps=10, cycle_momentum=False),
    "warmup": lambda o: deepspeed.runtime.lr_schedules.WarmupLR(o, **WARMUP["params"]),
}

WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 2e-3, "warmup_num_steps": 4}}


class Stepper:
    """An optimizer whose step is also the scheduler's."""

    def __init__(self, optimizer, scheduler):
        self.optimizer, self.scheduler = optimizer, scheduler

    def step(self):
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()


def client_train(
    how,
    optimizer="adamw",
    scheduler=None,
    reverse=False,
    steps=5,
    family="llama",
    meta=False,
    sdp=None,
    model=None,
    **ds,
):
    """``how`` the client gives groups and optimizer: "instance", "callable", "parameters", "late" or "picky".

    "late" is a callable that ignores what it is given, "picky" one that takes of it what requires gradients.
    """
    module = build_model(family, model, meta)
    groups = parameter_groups(module, reverse)
    build = OPTIMIZERS[optimizer]
    arguments = {}
    config = ds_config(optimizer=how == "parameters", zero_allow_untested_optimizer=True, **ds)
    if how == "instance":
        arguments["optimizer"] = build(groups)
    elif how == "callable":
        arguments.update(optimizer=build, model_parameters=groups)
    elif how == "late":
        arguments["optimizer"] = lambda _: build(groups)
    elif how == "picky":
        arguments["optimizer"] = lambda given: build([p for p in given if p.requires_grad])
    else:
        arguments["model_parameters"] = groups
    if scheduler == "warmup":
        config["scheduler"] = WARMUP
    elif scheduler and how == "instance":
        arguments["lr_scheduler"] = SCHEDULERS[scheduler](arguments["optimizer"])
    elif scheduler:
        arguments["lr_scheduler"] = SCHEDULERS[scheduler]
    engine, *_ = deepspeed_sdp.initialize(model=module, config=config, sdp_config=sdp or {"coverage": 0.5}, **arguments)
    result = {**run_steps(engine, steps), **face(engine)}
    engine.destroy()
    return result
