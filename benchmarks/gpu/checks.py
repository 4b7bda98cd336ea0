"""What is checked, the most valuable first. Pure data: who starts the checks imports neither torch nor DeepSpeed."""

from dataclasses import dataclass, field
from typing import Any

# Ranks of a process group's worth of checks; "nccl" has one for each device. "alone": all peers are faked.
RANKS = {"shared": 4, "alone": 1, "nccl": 0}
FAKED_PEERS = 8


@dataclass(frozen=True)
class Check:
    """One row of the results.

    Attributes:
        group: checks of one group that follow each other share their processes: imports take longer than most checks.
        call: ``module:function`` in this folder; gives the row's figures, and raises where the check fails.
        limit: seconds after which it has failed; those of the start of its processes come on top.
    """

    name: str
    group: str
    call: str
    arguments: dict[str, Any] = field(default_factory=dict)
    limit: float = 60.0


def _oracle(group: str, precision: str, stages: tuple[int, ...] = (0, 1, 2, 3)) -> list[Check]:
    """ZeRO-3 takes no backward masking."""
    kinds = [
        (stage, masking)
        for masking in ("forward", "backward")
        for stage in stages
        if masking + str(stage) != "backward3"
    ]
    ranks = {"shared": "4 ranks share the device", "nccl": "NCCL"}[group]
    return [
        Check(
            f"oracle {precision}: {masking} masking, ZeRO-{stage}, {ranks}",
            group,
            "training:against_oracle",
            {"stage": stage, "masking": masking, "precision": precision},
        )
        for stage, masking in kinds
    ]


def _peak(contender: str) -> Check:
    return Check(f"1B peak of one of 8 workers: {contender}", "alone", "alone:peak", {"contender": contender}, 120.0)


def _speed(contender: str, shape: str = "134M") -> Check:
    arguments = {"contender": contender, "shape": shape}
    return Check(f"{shape} step of one of 8 workers: {contender}", "alone", "alone:speed", arguments, 90.0)


CHECKS = [
    *_oracle("shared", "fp32"),
    *_oracle("shared", "bf16"),
    Check("resume from a checkpoint, ZeRO-1", "shared", "training:resume", {"stage": 1}),
    Check("resume from a checkpoint, ZeRO-3", "shared", "training:resume", {"stage": 3}),
    Check("optimizer offloaded, pinned, ZeRO-1", "shared", "training:offloaded", {"stage": 1}),
    Check("optimizer and weights offloaded, pinned, ZeRO-3", "shared", "training:offloaded", {"stage": 3}),
    Check("torch's fused AdamW", "shared", "training:torch_fused"),
    Check("re-partition, ZeRO-1", "shared", "training:repartitioned", {"stage": 1}),
    Check("re-partition, ZeRO-3", "shared", "training:repartitioned", {"stage": 3}),
    _peak("SDP forward neuron 1/2 ZeRO-1"),
    _speed("SDP forward neuron 1/2 ZeRO-1"),
    _speed("DeepSpeed ZeRO-1"),
    _speed("FSDP2"),
    _peak("SDP forward neuron 1/2 ZeRO-3"),
    _peak("DeepSpeed ZeRO-1"),
    *[_speed(name, "1B") for name in ("SDP forward neuron 1/2 ZeRO-1", "DeepSpeed ZeRO-1", "FSDP2")],
    *[
        Check(f"134M ZeRO-3 {word} prefetch", "alone", "alone:prefetch", {"prefetch": prefetch}, 90.0)
        for word, prefetch in (("with", True), ("without", False))
    ],
    *[_speed(f"SDP {name}") for name in ("backward neuron 1/2 ZeRO-1", "forward neuron 1/4 ZeRO-1")],
    *[_speed(name) for name in ("SDP forward layer 1/2 ZeRO-1", "DeepSpeed ZeRO-3", "DDP")],
    *_oracle("nccl", "fp32"),
    *_oracle("nccl", "bf16", (1, 3)),
    *[
        Check(f"134M checkpoint, {word}, NCCL", "nccl", "training:saved", {"is_async": word == "async"})
        for word in ("sync", "async")
    ],
    Check("torch.compile, ZeRO-1", "shared", "training:compiled", {"stage": 1}, 120.0),
    Check("torch.compile, ZeRO-3", "shared", "training:compiled", {"stage": 3}, 120.0),
    Check("DeepSpeed's FusedAdam", "shared", "training:deepspeed_fused", {}, 180.0),
]
