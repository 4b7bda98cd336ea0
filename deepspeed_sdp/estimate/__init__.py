"""What a job will need, before it runs: FLOPs, memory, traffic and time, from a configuration alone."""

from deepspeed_sdp.estimate.estimator import Estimate, Estimator
from deepspeed_sdp.estimate.flops import FlopsPerToken, flops_per_token
from deepspeed_sdp.estimate.job import Job
from deepspeed_sdp.estimate.plot import plot_estimates
from deepspeed_sdp.estimate.strategies import (
    Choice,
    best_stages,
    choice_of,
    compare,
    name_of,
    ranked,
    strategies,
)
from deepspeed_sdp.estimate.table import to_table

__all__ = [
    "Choice",
    "Estimate",
    "Estimator",
    "FlopsPerToken",
    "Job",
    "best_stages",
    "choice_of",
    "compare",
    "flops_per_token",
    "name_of",
    "plot_estimates",
    "ranked",
    "strategies",
    "to_table",
]
