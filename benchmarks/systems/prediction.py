"""What the design's table says a step costs, from the model's shape and the plan alone.

Per parameter, with ``b`` bytes of an element and ``o`` of optimizer state (bf16: 2 and 12 with the master weights;
fp32: 4 and 8), coverage ``C = K/N``:

================ ============== ================================= ==========================================
..               dense          forward masking                   backward masking
================ ============== ================================= ==========================================
weights          b              b C                               b
gradients        b              b C                               b C
optimizer        o, or o/N      o C, or o C/K                     as forward
FLOPs            6              6 C                               4 + 2 C
sent             2 b (N-1)/N    2 b C (K-1)/K                     the same, and what others do not own
================ ============== ================================= ==========================================

ZeRO-3 and FSDP2 divide weights by ``N`` as well, and gather them twice: 3 instead of 2 in what is sent. Shared
parameters are dense ones. Checkpointing computes each layer's forward pass again.
"""

from typing import Any

import torch
import torch.distributed as dist
from contenders import Contender
from transformers import LlamaForCausalLM
from workload import Workload

from deepspeed_sdp.report.plan_summary import plan_summary


def predict(contender: Contender, workload: Workload, plan: Any) -> dict[str, float]:
    """Of this rank: bytes of ``weights``, ``gradients`` and ``optimizer``, ``flops`` of a step, bytes ``sent`` in it.

    Args:
        plan: SDP's; ``None`` for others.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()
    with torch.device("meta"):
        total = sum(p.numel() for p in LlamaForCausalLM(workload.config()).parameters())
    worker = rank * plan.num_subnetworks // ranks if plan else 0
    parted = plan.total_numel if plan else 0
    owned = plan.owned_numel(worker) if plan else 0
    held = total - parted + owned
    computed = total if contender.sdp.get("masking") == "backward" else held
    element = 4 if contender.system in ("ddp", "fsdp2") else workload.element_bytes
    state = 12 if element == 2 else 8
    shards_weights = contender.system == "fsdp2" or contender.stage == 3
    shards_state = shards_weights or contender.stage in (1, 2)
    # Owners share the state of what they own, so that every rank holds 1/N of the full model's, whatever the coverage.
    return {
        "weights": element * (total / ranks if shards_weights else computed),
        "gradients": element * held,
        "optimizer": state * (total / ranks if shards_state else held),
        "flops": _flops(contender, workload, owned / parted if parted else 1.0),
        "sent": _sent(contender, workload, plan, total, worker, shards_weights),
    }


def _flops(contender: Contender, workload: Workload, coverage: float) -> float:
    hidden = workload.hidden_size
    layers = workload.layers * (4 * hidden**2 + 3 * hidden * (hidden * 11 // 4))
    head = workload.vocab_size * hidden
    # Scores and values of every token with all others: two matmuls forward, five backward (scores are made again).
    attention = workload.layers * 4 * workload.sequence * hidden
    if contender.sdp.get("masking") == "backward":
        per_token = 6 * head + (4 + 2 * coverage) * layers + 3.5 * attention
        again = 2 * layers + attention
    else:
        per_token = 6 * head + coverage * (6 * layers + 3.5 * attention)
        again = coverage * (2 * layers + attention)
    return workload.tokens * (per_token + (again if contender.is_checkpointing else 0.0))


def _sent(contender: Contender, workload: Workload, plan: Any, total: int, worker: int, shards_weights: bool) -> float:
    ranks = dist.get_world_size()
    # FSDP2 reduces in fp32, and gathers in what it computes with; DDP's gradients are fp32.
    gradients = 4 if contender.system in ("ddp", "fsdp2") else workload.element_bytes
    if plan is None:
        ring = total * (ranks - 1) / ranks
        return ring * (gradients + 2 * workload.element_bytes) if shards_weights else 2 * ring * gradients
    summary = plan_summary(plan, total, contender.sdp.get("masking", "forward"), workload.element_bytes)
    # At ZeRO-3 weights are gathered twice.
    return float(summary["bytes_sent_per_step"][worker]) * (1.5 if shards_weights else 1.0)
