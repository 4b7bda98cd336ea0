"""Scaled dot-product attention as a fused kernel, for the meta device, where torch would take the unfused one."""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F

from deepspeed_sdp.patches import patched


def fused_attention() -> AbstractContextManager[None]:
    """Inside, ``scaled_dot_product_attention`` on meta tensors makes and keeps what fused kernels do.

    These (FlashAttention, and torch's own on the CPU) keep queries, keys, values, the output and the logarithm of the
    softmax's sums; scores never exist as a whole. The function itself is replaced, as a mode of torch's would not reach
    what activation checkpointing computes again in the backward pass.
    """
    original: Any = F.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not query.is_meta:
            return original(query, key, value, *args, **kwargs)  # type: ignore[no-any-return]
        return _Fused.apply(query, key, value)  # type: ignore[no-any-return, no-untyped-call]

    return patched(F, "scaled_dot_product_attention", attend)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """``[batch, heads, length, head size]``; the output lies in memory as the queries do."""
        batch, heads, length, _ = query.shape
        output = torch.empty_like(query)
        if value.shape[-1] != query.shape[-1]:
            output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = torch.empty(batch, heads, length, dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
