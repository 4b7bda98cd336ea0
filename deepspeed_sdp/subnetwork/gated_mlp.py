"""A gated MLP under backward masking that keeps two activations for the backward pass instead of four."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from deepspeed_sdp.subnetwork.masked_linear import MaskedLinear, Ranges, select, sum_rows


class MaskedGatedMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))``, masked or frozen: ``[..., hidden] -> [..., hidden]``.

    Autograd would keep the gate, its activation, the other factor and (of owned neurons) their product, each as wide as
    the MLP. Here the gate and the other factor are kept, and the rest is computed again, element by element.
    """

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
        if not torch.is_grad_enabled():
            return down(self.act_fn(gate) * up)  # type: ignore[no-any-return]
        ranges, views = (down.features, list(down.weights)) if isinstance(down, MaskedLinear) else ((), [])
        output: torch.Tensor = _GatedDownProjection.apply(  # type: ignore[no-untyped-call]
            gate, up, down.weight, down.bias, ranges, *views
        )
        return output


class _GatedDownProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        up: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ranges: Ranges,
        *views: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        ctx.ranges = ranges
        return F.linear(F.silu(gate) * up, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dtype = grad.dtype
        factor = F.silu(gate)
        grad_views: list[torch.Tensor | None] = [None for _ in needs[5:]]
        if any(needs[5:]):
            hidden = select(factor, ctx.ranges) * select(up, ctx.ranges)
            rows = grad.reshape(-1, grad.shape[-1])
            grad_weight = rows.t() @ hidden.reshape(-1, hidden.shape[-1]).to(dtype)
            widths = [stop - start for start, stop in ctx.ranges]
            grad_views = [piece.to(weight.dtype) for piece in torch.split(grad_weight, widths, dim=1)]
            del hidden
        grad_bias = sum_rows(grad) if needs[3] else None
        grad_hidden = grad @ weight.to(dtype)
        # No autograd inside of a backward pass: profilers and compilers stumble over that.
        grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
        return grad_gate, (grad_hidden * factor).to(up.dtype), None, grad_bias, None, *grad_views
