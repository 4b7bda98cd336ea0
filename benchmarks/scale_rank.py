"""One rank of hundreds or thousands, in one process: the engine's own start and one of its steps, without weights.

The model is on the meta device and the process group is torch's fake one, whose collectives end at once. All else is
the engine: planning, cutting, groups, buckets, hooks, forward and backward pass, update. What it would send is noted
where torch is called.
"""

import contextlib
import importlib
import os
import pickle
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepspeed_sdp.agreement import agreed
from deepspeed_sdp.config import default_bucket_numel
from deepspeed_sdp.engine.comm.stages import Stages
from deepspeed_sdp.engine.comm.timing import Stopwatch
from deepspeed_sdp.engine.comm.traffic import Traffic
from deepspeed_sdp.engine.deepspeed.param_groups import translate_groups
from deepspeed_sdp.engine.deepspeed.settings import Place, Settings
from deepspeed_sdp.engine.state.training_state import TrainingState
from deepspeed_sdp.engine.zero import build
from deepspeed_sdp.engine.zero.behaviour import behaviour_of
from deepspeed_sdp.estimate import flops_per_token
from deepspeed_sdp.subnetwork import ClientMap

# The package's attribute of this name is the function.
initialize: Any = importlib.import_module("deepspeed_sdp.engine.initialize")

META, CPU = torch.device("meta"), torch.device("cpu")
# In both names that torch has had for them: what a rank gives, or gets, in all.
_COLLECTIVES = {
    "all_reduce": "all-reduce",
    "reduce_scatter_single": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "all_gather_single": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_to_all_single": "all-to-all",
}


@dataclass
class Clock:
    """CPU seconds of this process by phase; wall time would be the machine's other work too."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def simulate(
    model: nn.Module, world: int, ranks_per_node: int, stage: int, masking: str, seq_length: int
) -> dict[str, Any]:
    """Rank 0 of a job with default settings: what it does, takes and sends. One call in a process.

    Args:
        model: the full model, on the meta device.
        world: ranks.
        seq_length: tokens at which FLOPs are counted.
    """
    clock, before = Clock(), _resident()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": f"{world}", "LOCAL_WORLD_SIZE": f"{ranks_per_node}"}
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    deepspeed.init_distributed("fake", dist_init_required=False)
    with clock.phase("agreement and plan"):
        job = initialize._agree_on_job(
            lambda: model, None, _ds_config(stage), {"masking": masking}, initialize._Client()
        )
    flops = flops_per_token(model, seq_length, job.sdp, job.plan)
    traffic = Traffic()
    parts = _start(model, job, stage, clock, traffic)
    started = _resident()
    messages: Counter[tuple[str, int, int, int]] = Counter()
    with _noted(messages, ranks_per_node):
        _step(model, parts, clock)
    sent: Counter[str] = Counter()
    for (kind, _), nbytes in traffic.current.items():
        sent[kind] += nbytes
    return {
        "world": world,
        "stage": stage,
        "masking": masking,
        "num_subnetworks": job.plan.num_subnetworks,
        "owners_per_unit": job.plan.owners_per_unit,
        "owner_sets": len(job.plan.used_sets),
        "communicators": _communicators(),
        "plan_bytes": len(pickle.dumps(job.plan)),
        "bucket_numel": _numel(),
        "rounds": len(parts.layout.rounds),
        "buckets": sum(map(len, parts.layout.rounds)),
        "index_bytes": _index_bytes(parts),
        "seconds": clock.seconds,
        "interpreter_memory": before,
        "start_memory": started - before,
        "step_memory": _resident() - started,
        "sent": dict(sorted(sent.items())),
        # Kind, ranks and nodes of the group, bytes of the whole tensor; how often.
        "messages": [[*key, count] for key, count in sorted(messages.items())],
        "flops_per_token": {"dense": flops.dense, "mean": flops.mean},
    }


def _ds_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": stage},
    }


def _numel() -> int:
    return default_bucket_numel("nccl", dist.get_world_size())


def _start(model: nn.Module, job: Any, stage: int, clock: Clock, traffic: Traffic) -> build.Parts:
    """What ``initialize`` does, but for drawing initial values and DeepSpeed's own engine."""
    client, held = ClientMap(model), list(model.parameters())
    with clock.phase("cut"), mock.patch.object(initialize, "materialize"):
        subnetwork = agreed(lambda: initialize._cut(job, None, client))
    del held
    with clock.phase("groups"):
        groups = initialize.OwnerGroups(job.plan.owner_sets, job.workers, job.ranks_per_node)
    settings = Settings(
        sdp=job.sdp,
        stage=stage,
        device=META,
        dtype=torch.bfloat16,
        accumulate=torch.bfloat16,
        reduce=torch.float32,
        round_numel=_numel(),
        portion_numel=_numel(),
        prefetch=1,
        state=Place(META),
        weights=Place(META),
        clip_grad=1.0,
        loss_scaler=CreateLossScaler(torch.bfloat16, 1.0, False, None),
    )
    # The meta device has no streams, and an optimizer cannot be tried on it.
    on_cpu = {
        "Stages": lambda _, replicas: Stages(CPU, replicas),
        "behaviour_of": lambda optimizer, _: behaviour_of(optimizer, CPU),
    }
    with clock.phase("buckets"), mock.patch.multiple(build, **on_cpu):
        given = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        optimizer = torch.optim.AdamW(translate_groups(given, subnetwork, client), lr=1e-4)
        return build.assemble(settings, optimizer, subnetwork, client.group_of, groups, traffic, Stopwatch())


def _step(model: Any, parts: build.Parts, clock: Clock) -> None:
    """One step of one micro-batch of a few tokens. The norm, which nobody can read on the meta device, is left out."""
    tokens, optimizer = 8, parts.optimizer
    optimizer._is_gradient_accumulation_boundary = True
    given = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long, device=META),
        "position_ids": torch.zeros(1, tokens, dtype=torch.long, device=META),
        "attention_mask": torch.zeros(1, 1, tokens, tokens, dtype=torch.bfloat16, device=META),
    }
    with clock.phase("forward and backward"):
        loss = model(**given).logits.float().sum()
        optimizer.enter_backward()
        loss.backward()
        optimizer.end_backward()
    with clock.phase("update"):
        optimizer._apply(1.0)


@contextlib.contextmanager
def _noted(messages: "Counter[tuple[str, int, int, int]]", ranks_per_node: int) -> Iterator[None]:
    nodes: dict[Any, int] = {}

    def noting(name: str, call: Any) -> Any:
        def noted(first: torch.Tensor, *others: Any, **named: Any) -> Any:
            group = named["group"]
            if group not in nodes:
                nodes[group] = len({rank // ranks_per_node for rank in dist.get_process_group_ranks(group)})
            tensors = [first, *(value for value in others if isinstance(value, torch.Tensor))]
            nbytes = max(tensor.numel() * tensor.element_size() for tensor in tensors)
            messages[_COLLECTIVES[name], group.size(), nodes[group], nbytes] += 1
            return call(first, *others, **named)

        return noted

    with contextlib.ExitStack() as stack:
        for name in _COLLECTIVES:
            if hasattr(dist, name):
                stack.enter_context(mock.patch.object(dist, name, noting(name, getattr(dist, name))))
        yield


def _index_bytes(parts: build.Parts) -> int:
    """Of the layout that this rank's worker writes into a checkpoint, with Adam's state."""
    state = TrainingState(parts.subnetwork, parts.optimizer, parts.groups)
    state.has_state = True
    return len(state.layout(1).to_json())


def _communicators() -> dict[str, int]:
    """Process groups that this rank is in; those that work on the CPU are gloo's in a real job, not NCCL's."""
    names = [group.group_desc for group in dist.distributed_c10d._world.pg_map]
    of_cpu = sum(name.endswith((": control", ": checkpoints")) for name in names)
    return {"device": len(names) - of_cpu, "cpu": of_cpu}


def _resident() -> int:
    """The most that this process has held so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
