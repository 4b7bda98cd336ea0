"""What is known of a run before it begins: taken once from the full model, which the engine then cuts in place.

Console, report and metrics show these figures and count none of their own.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from deepspeed_sdp.plan import SubnetworkPlan


@dataclass(frozen=True)
class RunFacts:
    """Figures of the full model and of the workers' parts of it.

    Attributes:
        model_class: of the full model.
        parameters: of the full model, tied ones once.
        plan: who owns what; of the dense baseline: everybody everything.
        masking: of the SDP block, or ``"dense"``: plain DeepSpeed.
        granularity: of the SDP block.
        tokens_per_step: training tokens of one optimizer step, over all ranks.
        dense_flops_per_token: training FLOPs of the full model.
        flops_per_token: of each subnetwork; of the dense baseline all the same.
    """

    model_class: str
    parameters: int
    plan: SubnetworkPlan
    masking: str
    granularity: str
    tokens_per_step: int
    dense_flops_per_token: float
    flops_per_token: tuple[float, ...]

    @property
    def parameters_per_worker(self) -> tuple[int, ...]:
        """Those that each subnetwork trains, shared ones included."""
        return parameters_per_worker(self.plan, self.parameters)

    @property
    def mean_flops_per_token(self) -> float:
        """What a token of the run costs."""
        return sum(self.flops_per_token) / len(self.flops_per_token)

    @property
    def flops_per_step(self) -> float:
        """Over all ranks; replicas share the tokens evenly."""
        return self.mean_flops_per_token * self.tokens_per_step

    def to_dict(self) -> dict[str, Any]:
        """Those of the model, as JSON data; the plan has a summary of its own."""
        return {
            "model": self.model_class,
            "parameters": self.parameters,
            "parameters_per_worker": list(self.parameters_per_worker),
            "dense_flops_per_token": self.dense_flops_per_token,
            "flops_per_token": list(self.flops_per_token),
        }

    def describe(self) -> dict[str, str]:
        """For a person: name -> text."""
        who, mean = "dense baseline, plain DeepSpeed", self.mean_flops_per_token
        if self.masking != "dense":
            most = max(self.parameters_per_worker)
            who = (
                f"SDP, {self.masking} masking by {self.granularity}, {self.plan.num_subnetworks} subnetworks, "
                f"coverage {self.plan.coverage:.3g}: each worker trains {millions(most)} parameters "
                f"({most / self.parameters:.0%})"
            )
        return {
            "model": f"{self.model_class}, {millions(self.parameters)} parameters",
            "method": who,
            "FLOPs/token": f"dense {_short(self.dense_flops_per_token)}, worker {_short(mean)} "
            f"({mean / self.dense_flops_per_token:.3f}; largest {max(self.flops_per_token) / mean:.3f} of the mean)",
        }


def count_parameters(model: nn.Module) -> int:
    """Of the full model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def parameters_per_worker(plan: SubnetworkPlan, parameters: int) -> tuple[int, ...]:
    """Those that each subnetwork trains, shared ones included, of a full model with so many."""
    shared = parameters - plan.total_numel
    return tuple(shared + plan.owned_numel(worker) for worker in range(plan.num_subnetworks))


def millions(count: float) -> str:
    """``1.2 M``."""
    return f"{count / 1e6:,.1f} M"


def _short(flops: float) -> str:
    return f"{flops / 1e9:,.3g} G" if flops >= 1e8 else f"{flops / 1e6:,.3g} M"
