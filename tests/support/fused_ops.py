"""DeepSpeed's fused optimizers without their CUDA ops: the same classes over ops written with torch."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch


def multi_tensor_adam(_chunk, _flag, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
    """``mode`` 1 is AdamW, 0 Adam with decay in the gradient."""
    for gradient, weight, mean, square in zip(*lists, strict=True):
        gradient = gradient if mode else gradient + decay * weight
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
        update = (mean / first) / ((square / second).sqrt() + eps)
        weight.sub_(lr * (update + (decay * weight if mode else 0.0)))


def multi_tensor_lion(_chunk, _flag, lists, lr, beta1, beta2, _step, decay, sign=torch.sign):
    for gradient, weight, mean in zip(*lists, strict=True):
        direction = sign(beta1 * mean + (1 - beta1) * gradient)
        weight.mul_(1 - lr * decay).sub_(lr * direction)
        mean.mul_(beta2).add_(gradient, alpha=1 - beta2)


@contextmanager
def fused_ops():
    """Inside, ``FusedAdam`` and ``FusedLion`` can be built on a CPU."""
    built = SimpleNamespace(multi_tensor_adam=multi_tensor_adam, multi_tensor_lion=multi_tensor_lion)
    builder = lambda: SimpleNamespace(load=lambda: built)  # noqa: E731
    with (
        mock.patch("deepspeed.ops.adam.fused_adam.FusedAdamBuilder", builder),
        mock.patch("deepspeed.ops.lion.fused_lion.FusedLionBuilder", builder),
    ):
        yield


class Lion(torch.optim.Optimizer):
    """The method, one parameter at a time."""

    sign = staticmethod(torch.sign)

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("exp_avg", torch.zeros_like(parameter))
                lists = [[parameter.grad], [parameter], [state["exp_avg"]]]
                multi_tensor_lion(0, None, lists, group["lr"], *group["betas"], 0, group["weight_decay"], self.sign)


class SignBitLion(Lion):
    """By the sign bit, as DeepSpeed's on the CPU, where the sign of a zero is one."""

    @staticmethod
    def sign(values):
        return torch.ones_like(values).copysign(values)
