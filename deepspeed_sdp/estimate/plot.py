"""Estimates as a picture: memory by kind, and memory against step time."""

from collections.abc import Sequence
from pathlib import Path

from deepspeed_sdp.estimate.estimator import Estimate
from deepspeed_sdp.estimate.gpu import Cluster
from deepspeed_sdp.estimate.ledger import KINDS
from deepspeed_sdp.estimate.strategies import name_of


def plot_estimates(
    shown: Sequence[Estimate], every: Sequence[Estimate], cluster: Cluster, title: str, path: Path
) -> None:
    """Bars for ``shown``, points for ``every``; a line where the GPU's memory ends.

    Raises:
        OSError, ValueError: the file cannot be written, or has a suffix that matplotlib does not know.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 1.6 + 0.28 * max(len(shown), 12)), layout="constrained")
    FigureCanvasAgg(figure)
    bars, points = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [_name(e) for e in shown]
    left = [0.0] * len(shown)
    for kind in KINDS:
        widths = [e.memory.get(kind, 0) / 1e9 for e in shown]
        bars.barh(names, widths, left=left, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    bars.invert_yaxis()
    bars.set_xlabel("GB per GPU at the peak")
    room = (cluster.gpu.memory - cluster.reserved) / 1e9
    bars.axvline(room, color="black", linestyle="--", label=f"room on {cluster.gpu.name}")
    bars.legend(fontsize=8)
    for name in dict.fromkeys(_series(e) for e in every):
        of_series = [e for e in every if _series(e) == name]
        points.scatter([e.time.total * 1e3 for e in of_series], [e.peak / 1e9 for e in of_series], label=name, s=22)
    points.axhline(room, color="black", linestyle="--")
    points.set(xlabel="ms per step", ylabel="GB per GPU at the peak", xscale="log", yscale="log")
    points.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _name(estimate: Estimate) -> str:
    checkpointing = ", checkpointing" if estimate.job.checkpointing else ""
    return f"{name_of(estimate.job)}, ZeRO-{estimate.job.stage}{checkpointing}"


def _series(estimate: Estimate) -> str:
    sdp = estimate.job.sdp
    return f"SDP {sdp.masking} {sdp.granularity}" if sdp else "DeepSpeed"
