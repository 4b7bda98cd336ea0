"""Reports and plots of a run."""

from deepspeed_sdp.report.facts import RunFacts, count_parameters
from deepspeed_sdp.report.plan_summary import plan_summary, to_text
from deepspeed_sdp.report.plots import plot_loss, plot_plan, plot_rounds
from deepspeed_sdp.report.run_report import RunReport, to_markdown

__all__ = [
    "RunFacts",
    "RunReport",
    "count_parameters",
    "plan_summary",
    "plot_loss",
    "plot_plan",
    "plot_rounds",
    "to_markdown",
    "to_text",
]
