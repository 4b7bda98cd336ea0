"""What an estimate needs to know of a job."""

from dataclasses import dataclass
from typing import Literal

import torch

from deepspeed_sdp.config import SDPConfig, default_bucket_numel
from deepspeed_sdp.engine.deepspeed.settings import REDUCE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# DeepSpeed's own default of ``reduce_bucket_size``.
DEEPSPEED_BUCKET = 500_000_000


@dataclass(frozen=True)
class Job:
    """One strategy on a number of GPUs.

    Attributes:
        world_size: ranks.
        stage: of ZeRO.
        sdp: the SDP block, in any form that :meth:`SDPConfig.of` takes; ``None`` for plain DeepSpeed.
        dtype: of weights and activations; below fp32 there are fp32 master weights.
        micro_batch: sequences of a rank in one pass.
        seq_length: tokens of a sequence.
        accumulation: micro-batches of a step.
        checkpointing: layers are computed again in the backward pass.
        moments: state tensors of the optimizer, each as large as the weights: 2 for Adam, 1 for SGD with momentum.
        step_temporaries: fp32 tensors, each as large as a shard, that the update of one shard makes: 2 for
            ``torch.optim.Adam`` on the CPU, 0 for fused kernels.
        accumulate, reduce: dtypes in which gradients are summed up and sent, where the job says.
        bucket, gather_bucket: ``reduce_bucket_size`` and ``allgather_bucket_size``; ``None``: the default.
        offload_optimizer, offload_param: state, or at ZeRO-3 shards, rest in the host's memory.
        overlap_comm: plain DeepSpeed's second bucket.
        prefetch: parts that are gathered ahead at ZeRO-3.
        backend: ``"nccl"`` or ``"gloo"``.
    """

    world_size: int
    stage: int = 1
    sdp: SDPConfig | None = None
    dtype: torch.dtype = torch.bfloat16
    micro_batch: int = 1
    seq_length: int = 2048
    accumulation: int = 1
    checkpointing: bool = False
    moments: int = 2
    step_temporaries: int = 0
    accumulate: torch.dtype | None = None
    reduce: torch.dtype | None = None
    bucket: int | None = None
    gather_bucket: int | None = None
    offload_optimizer: bool = False
    offload_param: bool = False
    overlap_comm: bool = False
    prefetch: int = 1
    backend: Literal["nccl", "gloo"] = "nccl"

    def __post_init__(self) -> None:
        if self.sdp is not None:
            object.__setattr__(self, "sdp", SDPConfig.of(self.sdp))

    @property
    def tokens(self) -> int:
        """Tokens of a rank in one step."""
        return self.micro_batch * self.seq_length * self.accumulation

    @property
    def accumulate_dtype(self) -> torch.dtype:
        """The dtype of gradients that wait."""
        return self.accumulate or self.dtype

    @property
    def reduce_dtype(self) -> torch.dtype:
        """The dtype of gradients on their way."""
        return self.reduce or (REDUCE if self.sdp else self.dtype)

    @property
    def round_numel(self) -> int:
        """Elements of the full model in a round of the SDP engine."""
        return self.bucket or default_bucket_numel(self.backend, self.world_size)

    @property
    def portion_numel(self) -> int:
        """Elements of the full model that are stepped and sent together."""
        return self.gather_bucket or self.round_numel
