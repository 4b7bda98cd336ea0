"""What a run leaves behind besides the model: report.json, report.md, loss.png and plan.png."""

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from deepspeed_sdp.files import replacing, write_text
from deepspeed_sdp.plan import SubnetworkPlan
from deepspeed_sdp.report.plots import plot_loss, plot_plan

KINDS = ("weights", "gradients", "optimizer", "total")


@dataclass
class RunReport:
    """Figures of one run, filled while it goes.

    Attributes:
        plan: the plan of the run.
        tokens_per_step: training tokens of one optimizer step, over all ranks.
        unigram_val_loss: entropy baseline on the held-out tokens, in nats.
        train_losses: (step, mean training loss since the last entry, nats per token): of the subnetworks, or under
            backward masking of the full model.
        val_losses: (step, loss of the full model on held-out text, nats per token).
        ranks: ``sdp_stats()`` of every rank, with the gradients' peak over a step under ``model_state_bytes``.
        dense_state_bytes: the same bytes of the dense model under the same DeepSpeed config, if measured.
        seconds: wall-clock time of training and evaluation.
        masking: of the SDP block, or ``"dense"``.
        run: more about the run, as name -> value; shown as it is.
    """

    plan: SubnetworkPlan
    tokens_per_step: int
    unigram_val_loss: float
    train_losses: list[tuple[int, float]] = field(default_factory=list)
    val_losses: list[tuple[int, float]] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    dense_state_bytes: list[dict[str, int]] | None = None
    seconds: float = 0.0
    masking: str = "forward"
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def train_loss(self) -> float:
        """The last training loss."""
        return self.train_losses[-1][1]

    @property
    def val_loss(self) -> float:
        """The last loss of the full model."""
        return self.val_losses[-1][1]

    def history(self) -> dict[str, Any]:
        """What a job that goes on later must know of this one."""
        return {"train_losses": self.train_losses, "val_losses": self.val_losses, "seconds": self.seconds}

    def set_history(self, history: dict[str, Any]) -> None:
        """Go on where :meth:`history` was taken."""
        self.train_losses[:], self.val_losses[:] = history["train_losses"], history["val_losses"]
        self.seconds = history["seconds"]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data; the keys of ``report.json``."""
        steps = self.val_losses[-1][0]
        tokens = steps * self.tokens_per_step
        return {
            "steps": steps,
            "tokens": tokens,
            "run": self.run,
            "trained": "subnetworks" if self.masking == "forward" else "full model",
            "train_loss": self.train_loss,
            "full_model_val_loss": self.val_loss,
            "unigram_val_loss": self.unigram_val_loss,
            "per_rank_model_state_bytes": {
                "sdp": [rank["model_state_bytes"] for rank in self.ranks],
                "dense": self.dense_state_bytes,
            },
            "bytes_sent_per_step_per_rank": [rank["bytes_sent"] for rank in self.ranks],
            "bytes_sent_by_kind": [rank["bytes_sent_by_kind"] for rank in self.ranks],
            "owned_parameters_per_rank": [rank["owned_numel"] for rank in self.ranks],
            "plan": self.plan.summary(),
            "seconds": self.seconds,
            "tokens_per_second": tokens / self.seconds if self.seconds else None,
            "history": {
                "train_loss": [
                    {"step": s, "tokens": s * self.tokens_per_step, "loss": v} for s, v in self.train_losses
                ],
                "full_model_val_loss": [
                    {"step": s, "tokens": s * self.tokens_per_step, "loss": v} for s, v in self.val_losses
                ],
            },
            "versions": versions(),
        }

    def write(self, folder: Path) -> None:
        """Write all four files into ``folder``. A loss that is not finite is ``null`` in ``report.json``.

        Raises:
            OSError: the folder cannot be written.
        """
        data = self.to_dict()
        write_text(folder / "report.md", to_markdown(data))
        with replacing(folder / "loss.png") as path:
            plot_loss(data, path)
        with replacing(folder / "plan.png") as path:
            plot_plan(self.plan, path)
        # Last: where it is, the run was finished.
        write_text(folder / "report.json", json.dumps(_finite(data), indent=2, allow_nan=False) + "\n")

    def closing_lines(self, folder: Path) -> str:
        """What a user sees at the end."""
        data = self.to_dict()
        sdp = data["per_rank_model_state_bytes"]["sdp"]
        lines = [
            f"full model on held-out text: {self.val_loss:.3f} nats per token (unigram: {self.unigram_val_loss:.3f})",
            f"model state, largest rank: {mb(max(rank['total'] for rank in sdp))}" + _against_dense(data),
            *_traffic_line(data),
            f"model: {folder / 'hf'}   report: {folder / 'report.md'}",
        ]
        return "\n".join(lines)


def to_markdown(data: dict[str, Any]) -> str:
    """``report.json`` as a page to read."""
    plan = data["plan"]
    lines = [
        "# Run report",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in data.get("run", {}).items()),
        f"| steps, tokens | {data['steps']:,}, {data['tokens']:,} |",
        f"| training loss ({data.get('trained', 'subnetworks')}) | {data['train_loss']:.4f} |",
        f"| validation loss (full model) | {data['full_model_val_loss']:.4f} |",
        f"| unigram baseline, same tokens | {data['unigram_val_loss']:.4f} |",
        f"| time, tokens/s | {data['seconds']:.0f} s, {data['tokens_per_second'] or 0:,.0f} |",
        "",
        "![loss](loss.png)",
        "",
        "## Model state per rank",
        "",
        "Measured on live tensors. Gradients: their peak over one step. Dense: plain DeepSpeed with the same config.",
        "",
        "| rank | parameters | " + " | ".join(KINDS) + " | sent per step |",
        "| --- | --- | " + " | ".join("---" for _ in KINDS) + " | --- |",
    ]
    state = data["per_rank_model_state_bytes"]
    for rank, sizes in enumerate(state["sdp"]):
        cells = " | ".join(mb(sizes[kind]) for kind in KINDS)
        nbytes = data["bytes_sent_per_step_per_rank"][rank]
        sent = "" if nbytes is None else mb(nbytes)
        lines.append(f"| {rank} | {data['owned_parameters_per_rank'][rank]:,} | {cells} | {sent} |")
    for rank, sizes in enumerate(state["dense"] or []):
        lines.append(f"| {rank}, dense | | " + " | ".join(mb(sizes[kind]) for kind in KINDS) + " | |")
    lines += ["", "## Plan", "", "![plan](plan.png)", "", "| | |", "| --- | --- |"]
    lines += [f"| {key} | {value} |" for key, value in plan.items()]
    lines += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in data["versions"].items()), ""]
    return "\n".join(lines)


def mb(nbytes: int) -> str:
    """Bytes in megabytes (10^6)."""
    return f"{nbytes / 1e6:,.2f} MB"


def versions(names: Sequence[str] = ("deepspeed-sdp", "torch", "deepspeed", "transformers")) -> dict[str, str]:
    """Versions of what the figures were made with."""
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from its source folder
        return "not installed"


def _finite(data: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _traffic_line(data: dict[str, Any]) -> list[str]:
    sent = [nbytes for nbytes in data["bytes_sent_per_step_per_rank"] if nbytes is not None]
    return [f"sent per step, largest rank: {mb(max(sent))}"] if sent else []


def _against_dense(data: dict[str, Any]) -> str:
    state = data["per_rank_model_state_bytes"]
    if not state["dense"]:
        return ""
    dense = max(rank["total"] for rank in state["dense"])
    ratio = max(rank["total"] for rank in state["sdp"]) / dense
    return f" (dense: {mb(dense)}, ratio {ratio:.2f})"
