"""One face for everything that trains: DDP, FSDP2, DeepSpeed and SDP engines."""

import gc
from collections.abc import Iterable
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from contenders import Contender
from deepspeed.accelerator import get_accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from workload import Workload

import deepspeed_sdp
from deepspeed_sdp.engine import model_state_bytes
from deepspeed_sdp.engine.deepspeed.memory import gradient_bytes

ADAMW = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
CLIP = 1.0


class System(Protocol):
    """A job of one contender on this rank."""

    module: torch.nn.Module

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Train on ``ids`` ``[batch, length]``, on the device; this rank's loss before the update."""

    def state_bytes(self) -> dict[str, int]:
        """Bytes that stay between steps: ``weights`` and ``optimizer`` (master weights with it)."""

    def gradient_bytes(self) -> int:
        """Bytes of gradients that are alive now."""

    def close(self) -> None:
        """Free all of it."""


def adamw() -> dict[str, Any]:
    """Of every contender. On a device one kernel for many tensors: else what starts kernels is measured."""
    return {**ADAMW, "fused": get_accelerator().device_name() != "cpu"}


def bucket_elements(workload: Workload, numel: int) -> int:
    """Elements of a reduction: one layer's, as FSDP2 has it.

    Every contender is given the same, as defaults (500 million elements in DeepSpeed, which allocates them) are made
    for larger models than one that fits a test machine.
    """
    return max(100_000, numel // workload.layers)


def build(contender: Contender, workload: Workload) -> System:
    """Collective. Every contender starts from the same weights."""
    model = workload.model()
    if contender.is_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    if contender.system == "ddp":
        return DDP(model, workload)
    if contender.system == "fsdp2":
        return FSDP2(model, workload)
    return Engine(model, contender, workload)


class DDP:
    """PyTorch's DDP: fp32 weights, under autocast where it computes in bf16."""

    def __init__(self, model: Any, workload: Workload) -> None:
        device = torch.device(get_accelerator().current_device_name())
        self.module = model.to(device)
        bucket = bucket_elements(workload, sum(p.numel() for p in self.module.parameters()))
        self._ddp: Any = DistributedDataParallel(
            self.module, gradient_as_bucket_view=True, bucket_cap_mb=4 * bucket / 2**20
        )
        if dist.get_backend() == "fake":
            self._ddp.register_comm_hook(None, _reduce_faked)
        self._bucket_bytes = 0
        self._optimizer = torch.optim.AdamW(self.module.parameters(), **adamw())
        self._autocast = torch.autocast(device.type, torch.bfloat16, enabled=workload.precision == "bf16")

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        with self._autocast:
            loss = self._ddp(input_ids=ids, labels=ids).loss
        loss.backward()
        self._bucket_bytes = _storage_bytes(p.grad for p in self.module.parameters() if p.grad is not None)
        return _update(loss, self.module, self._optimizer)

    def state_bytes(self) -> dict[str, int]:
        return _state_bytes(self.module, self._optimizer)

    def gradient_bytes(self) -> int:
        # Gradients are views of DDP's buckets, which stay.
        return self._bucket_bytes

    def close(self) -> None:
        self._optimizer.zero_grad()
        self._ddp = self._optimizer = None
        self.module = torch.nn.Module()


class FSDP2:
    """PyTorch's ``fully_shard``, layer by layer: fp32 shards, gathered in bf16 where it computes in bf16."""

    def __init__(self, model: Any, workload: Workload) -> None:
        device = torch.device(get_accelerator().current_device_name())
        self.module = model.to(device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        policy = MixedPrecisionPolicy()
        if workload.precision == "bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        self._optimizer = torch.optim.AdamW(self.module.parameters(), **adamw())

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self.module(input_ids=ids, labels=ids).loss
        loss.backward()
        return _update(loss, self.module, self._optimizer)

    def state_bytes(self) -> dict[str, int]:
        return _state_bytes(self.module, self._optimizer)

    def gradient_bytes(self) -> int:
        return _storage_bytes(p.grad for p in self.module.parameters() if p.grad is not None)

    def close(self) -> None:
        self._optimizer.zero_grad()
        self._optimizer = None
        self.module = torch.nn.Module()


class Engine:
    """DeepSpeed's engine, plain or SDP's: bf16 weights with fp32 master weights where it computes in bf16."""

    def __init__(self, model: Any, contender: Contender, workload: Workload) -> None:
        bucket = bucket_elements(workload, sum(p.numel() for p in model.parameters()))
        config = {
            "train_micro_batch_size_per_gpu": workload.micro_batch,
            "steps_per_print": 10**9,
            "gradient_clipping": CLIP,
            "bf16": {"enabled": workload.precision == "bf16"},
            "optimizer": {"type": "AdamW", "params": {**adamw(), "torch_adam": True}},
            "zero_optimization": {
                "stage": contender.stage,
                "reduce_bucket_size": bucket,
                "allgather_bucket_size": bucket,
                **(_stage3(bucket) if contender.stage == 3 and contender.system == "deepspeed" else {}),
                **contender.zero,
            },
        }
        if contender.system == "deepspeed":
            self._engine, *_ = deepspeed.initialize(
                model=model, model_parameters=model.parameters(), config=config, dist_init_required=False
            )
        else:
            self._engine, *_ = deepspeed_sdp.initialize(model=model, config=config, sdp_config=contender.sdp)
        self.module = self._engine.module

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss = self._engine(input_ids=ids, labels=ids).loss
        self._engine.backward(loss)
        self._engine.step()
        return loss.detach()

    def state_bytes(self) -> dict[str, int]:
        state = model_state_bytes(self._engine)
        return {kind: state[kind] for kind in ("weights", "optimizer")}

    def gradient_bytes(self) -> int:
        return gradient_bytes(self._engine)

    @property
    def plan(self) -> Any:
        """SDP's; ``None`` for plain DeepSpeed."""
        return getattr(self._engine, "plan", None)

    def close(self) -> None:
        self._engine.destroy()
        self._engine = None
        self.module = torch.nn.Module()


def _reduce_faked(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    # Faked collectives have no result, which DDP's own way of reducing waits for.
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _stage3(bucket: int) -> dict[str, int]:
    # Its defaults keep every parameter below 100 000 elements whole, and a model this small for the whole step.
    return {
        "stage3_param_persistence_threshold": 1_000,
        "stage3_prefetch_bucket_size": bucket,
        "stage3_max_live_parameters": 2 * bucket,
        "stage3_max_reuse_distance": 0,
    }


def free() -> None:
    """What a closed system left in cycles, and an accelerator's cached blocks."""
    gc.collect()
    get_accelerator().empty_cache()


def _update(loss: torch.Tensor, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _state_bytes(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    states = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return {
        "weights": _storage_bytes([*module.parameters(), *module.buffers()]),
        "optimizer": _storage_bytes(states),
    }


def _storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Each storage once; of a ``DTensor`` what lies on this rank."""
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    storages.pop(0, None)
    return sum(storages.values())
