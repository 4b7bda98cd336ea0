"""FLOPs of a step, and the ceiling they are measured against."""

import time
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from workload import Workload

aten = torch.ops.aten


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def flop_counter() -> FlopCounterMode:
    """torch's, with the CPU's attention, which it does not know. The FLOPs of causal attention count as of full."""
    forward = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    backward = getattr(aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
    mapping = {forward: _cpu_attention, backward: _cpu_attention_backward}
    return FlopCounterMode(display=False, custom_mapping={op: f for op, f in mapping.items() if op is not None})


def matmul_ceiling(workload: Workload, seconds: float = 1.0) -> float:
    """Collective. FLOP/s of one rank in plain matmuls of the model's MLP, all ranks at it at once; the slowest rank."""
    device = get_accelerator().current_device_name()
    dtype = torch.float32 if workload.precision == "fp32" else torch.bfloat16
    hidden, inner = workload.hidden_size, workload.hidden_size * 11 // 4
    left = torch.randn(workload.tokens, hidden, device=device).to(dtype)
    right = torch.randn(hidden, inner, device=device).to(dtype)
    for _ in range(3):
        left @ right
    get_accelerator().synchronize()
    dist.barrier()
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(10):
            left @ right
        get_accelerator().synchronize()
        done += 10
    reached = 2.0 * workload.tokens * hidden * inner * done / (time.perf_counter() - began)
    rate = torch.tensor(reached, device=device)
    dist.all_reduce(rate, op=dist.ReduceOp.MIN)
    return float(rate)
