"""The pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from deepspeed_sdp.plan import PlannedSpace, SubnetworkPlan


def plot_loss(data: dict[str, Any], path: Path) -> None:
    """Training and full-model validation loss over tokens, from the data of ``report.json``."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (
        ("train_loss", f"training, {data.get('trained', 'subnetworks')}", {"lw": 1.2, "alpha": 0.7}),
        ("full_model_val_loss", "validation, full model", {"lw": 1.8, "marker": "o", "ms": 4}),
    ):
        points = data["history"][key]
        axes.plot([p["tokens"] for p in points], [p["loss"] for p in points], label=label, **style)
    axes.axhline(data["unigram_val_loss"], color="gray", ls="--", lw=1, label="unigram baseline")
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss, nats per token")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def plot_plan(plan: SubnetworkPlan, path: Path) -> None:
    """Workers by layers: the owned part of every unit space, coloured by owner set; the workers' loads beside it."""
    kinds = list(dict.fromkeys(planned.space.kind for planned in plan.spaces))
    workers = plan.num_subnetworks
    layers = 1 + max(planned.space.layer for planned in plan.spaces)
    used = sorted({chunk.owner_set for planned in plan.spaces for chunk in planned.chunks})
    colors = {owner_set: _color(i, len(used)) for i, owner_set in enumerate(used)}
    # Side by side while that fits on a page, below each other for many workers.
    stacked = workers > 8 and len(kinds) > 1
    width = (0.85 if stacked else 0.62 * len(kinds)) * workers + 4.5
    height = 1.8 + 0.26 * layers * (len(kinds) if stacked else 1)
    figure = Figure(figsize=(min(max(width, 8), 24), min(max(height, 4), 30)), layout="constrained")
    columns = 1 if stacked else len(kinds)
    grid = figure.add_gridspec(
        len(kinds) // columns, columns + 1, width_ratios=[*([workers] * columns), 0.35 * workers + 2]
    )
    panels = [figure.add_subplot(grid[i // columns, i % columns]) for i in range(len(kinds))]
    for axes, kind in zip(panels, kinds, strict=True):
        for planned in plan.spaces:
            if planned.space.kind == kind:
                _draw_space(axes, plan, planned, colors)
        labels = [f"{worker}\n{_share(plan, kind, worker):.0%}" for worker in range(workers)]
        axes.set(xlim=(-0.05, workers), ylim=(layers, -0.1), title=kind)
        axes.set_xticks([worker + 0.45 for worker in range(workers)], labels)
        axes.set_yticks([layer + 0.45 for layer in range(layers)], [str(layer) for layer in range(layers)])
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("layer")
    panels[-1].set_xlabel("worker, share of the units")
    _draw_loads(figure.add_subplot(grid[:, columns]), plan)
    _legend(figure, plan, used, colors)
    owners = plan.owners_per_unit
    figure.suptitle(
        f"{workers} workers, {owners} owners per unit, {plan.design} design, {len(used)} owner sets, "
        f"spectral gap {plan.spectral_gap:.3f} (bound {plan.spectral_gap_bound:.3f})",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def plot_rounds(plans: Sequence[SubnetworkPlan], path: Path) -> None:
    """What workers own in each round, a row each: of every kind the units of the middle layer, or the blocks."""
    plan = plans[0]
    kinds = list(dict.fromkeys(planned.space.kind for planned in plan.spaces))
    workers = plan.num_subnetworks
    used = sorted(plan.used_sets)
    colors = {owner_set: _color(i, len(used)) for i, owner_set in enumerate(used)}
    width = min(max(0.75 * workers * len(kinds) + 3.5, 7), 24)
    figure = Figure(figsize=(width, min(max(1.6 + 0.3 * len(plans), 3.2), 30)), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for row, of_round in enumerate(plans):
            spaces = [planned for planned in of_round.spaces if planned.space.kind == kind]
            if spaces[0].space.num_units > 1:
                spaces = [spaces[len(spaces) // 2]]
            for worker in range(workers):
                axes.add_patch(Rectangle((worker, row), 0.9, 0.85, color="0.93", lw=0))
                for place, planned in enumerate(spaces):
                    for chunk in of_round.owned(planned.space.name, worker):
                        left, right = (place + edge / planned.space.num_units for edge in (chunk.start, chunk.stop))
                        at, wide = worker + 0.9 * left / len(spaces), 0.9 * (right - left) / len(spaces)
                        axes.add_patch(Rectangle((at, row), wide, 0.85, color=colors[chunk.owner_set], lw=0))
        what = f"{kind}, layer {spaces[0].space.layer}" if spaces[0].space.num_units > 1 else f"{kind}, all layers"
        axes.set(xlim=(-0.05, workers), ylim=(len(plans), -0.1), title=what, xlabel="worker", ylabel="round")
        axes.set_xticks([worker + 0.45 for worker in range(workers)], [str(worker) for worker in range(workers)])
        axes.set_yticks([row + 0.42 for row in range(len(plans))], [str(row) for row in range(len(plans))])
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
    _legend(figure, plan, used, colors)
    figure.savefig(path, dpi=110)


def _draw_loads(axes: Any, plan: SubnetworkPlan) -> None:
    """FLOPs and partitioned parameters of every worker, the mean is 1."""
    workers = range(plan.num_subnetworks)
    for offset, shade, label, load in (
        (-0.2, "0.35", "FLOPs of a step", [plan.owned_flops(w) + plan.shared_flops for w in workers]),
        (0.2, "0.65", "partitioned parameters", [float(plan.owned_numel(w)) for w in workers]),
    ):
        mean = sum(load) / len(load)
        axes.barh(
            [w + offset for w in workers], [value / mean for value in load], height=0.38, label=label, color=shade
        )
    axes.axvline(1.0, color="gray", lw=0.8)
    axes.set(ylim=(plan.num_subnetworks - 0.5, -0.5), title="load, the mean is 1", ylabel="worker")
    axes.set_yticks(list(workers))
    axes.tick_params(length=0, labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _draw_space(axes: Any, plan: SubnetworkPlan, planned: PlannedSpace, colors: dict[int, Any]) -> None:
    for worker in range(plan.num_subnetworks):
        axes.add_patch(Rectangle((worker, planned.space.layer), 0.9, 0.9, color="0.93", lw=0))
        for chunk in plan.owned(planned.space.name, worker):
            left = 0.9 * chunk.start / planned.space.num_units
            width = 0.9 * (chunk.stop - chunk.start) / planned.space.num_units
            axes.add_patch(
                Rectangle((worker + left, planned.space.layer), width, 0.9, color=colors[chunk.owner_set], lw=0)
            )


def _share(plan: SubnetworkPlan, kind: str, worker: int) -> float:
    spaces = [planned for planned in plan.spaces if planned.space.kind == kind]
    owned = sum(chunk.stop - chunk.start for p in spaces for chunk in plan.owned(p.space.name, worker))
    return owned / sum(planned.space.num_units for planned in spaces)


def _legend(figure: Figure, plan: SubnetworkPlan, used: Sequence[int], colors: dict[int, Any]) -> None:
    if len(used) <= 16:
        handles = [Patch(color=colors[s], label=" ".join(map(str, plan.owner_sets[s]))) for s in used]
        figure.legend(handles=handles, title="owners", loc="outside right upper", frameon=False, fontsize=8)


def _color(index: int, count: int) -> Any:
    return mpl.colormaps["tab20"](index % 20) if count <= 20 else mpl.colormaps["turbo"](index / (count - 1))
