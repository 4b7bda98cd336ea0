"""Who is measured: a list of configurations, one row each."""

from dataclasses import dataclass, field
from typing import Any

COVERAGES = {"1/4": 0.25, "1/2": 0.5, "3/4": 0.75}


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        system: ``"ddp"``, ``"fsdp2"``, ``"deepspeed"`` or ``"sdp"``.
        stage: of ZeRO; ``None`` for PyTorch's own.
        coverage: as it is written, ``"1/2"``; ``"1"`` for what trains the full model on every rank.
        sdp: the SDP block, for ``"sdp"``.
        is_checkpointing: every decoder layer's activations are computed again in the backward pass.
        is_core: measured in quick runs too.
        zero: keys of ``zero_optimization`` beside the usual ones.
    """

    system: str
    stage: int | None = None
    coverage: str = "1"
    sdp: dict[str, Any] = field(default_factory=dict)
    is_checkpointing: bool = False
    is_core: bool = False
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether it computes what plain data parallelism does: its losses must be the same."""
        return self.coverage == "1"

    @property
    def name(self) -> str:
        """As it stands in tables; no two are the same."""
        words = {"ddp": "DDP", "fsdp2": "FSDP2", "deepspeed": "DeepSpeed", "sdp": "SDP"}[self.system]
        if self.system == "sdp":
            words += f" {self.sdp.get('masking', 'forward')} {self.sdp.get('granularity', 'neuron')} {self.coverage}"
        if self.stage is not None:
            words += f" ZeRO-{self.stage}"
        return f"{words} + checkpointing" if self.is_checkpointing else words


def sdp(
    masking: str, granularity: str, coverage: str, stage: int, is_checkpointing: bool = False, is_core: bool = False
) -> Contender:
    """One with this package."""
    share = COVERAGES.get(coverage, 1.0)
    block = {"masking": masking, "granularity": granularity, "coverage": share}
    return Contender("sdp", stage, coverage, block, is_checkpointing, is_core)


BASELINES = [
    Contender("ddp", is_core=True),
    Contender("ddp", is_checkpointing=True),
    Contender("fsdp2", is_core=True),
    Contender("fsdp2", is_checkpointing=True),
    *[Contender("deepspeed", stage, is_core=stage in (1, 3)) for stage in (0, 1, 2, 3)],
]
SUBNETWORKS = [
    # Data parallelism through this package: what its engine costs or saves without masking anything.
    sdp("forward", "neuron", "1", 1, is_core=True),
    *[
        sdp(masking, granularity, coverage, stage, is_core=stage == 1 and coverage == "1/2")
        for masking in ("forward", "backward")
        for granularity in ("neuron", "layer")
        for coverage in COVERAGES
        for stage in (0, 1, 2)
    ],
    # The nearest relative of ZeRO-3; backward masking is refused there.
    sdp("forward", "neuron", "1/2", 3),
    *[sdp("forward", granularity, "1/2", 1, is_checkpointing=True) for granularity in ("neuron", "layer")],
    sdp("backward", "neuron", "1/2", 1, is_checkpointing=True),
]
CONTENDERS = {contender.name: contender for contender in (*BASELINES, *SUBNETWORKS)}
