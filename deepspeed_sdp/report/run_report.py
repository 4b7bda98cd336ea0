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
from deepspeed_sdp.report.facts import RunFacts
from deepspeed_sdp.report.plots import plot_loss, plot_plan

KINDS = ("weights", "gradients", "optimizer", "total")
# Of the history that a job hands on.
_LOSSES, _TIMES = ("train_losses", "val_losses"), ("seconds", "timed_steps", "timed_seconds")


@dataclass
class RunReport:
    """Figures of one run, filled while it goes.

    Attributes:
        facts: of the full model and the workers' parts, from before it was cut.
        unigram_val_loss: entropy baseline on the held-out tokens, in nats.
        train_losses: (step, mean training loss since the last entry, nats per token): of the subnetworks, or under
            backward masking of the full model.
        val_losses: (step, loss of the full model on held-out text, nats per token).
        ranks: ``sdp_stats()`` of every rank, with the gradients' peak over a step under ``model_state_bytes``.
        is_peak_measured: whether a step was watched for that; otherwise gradients are those left at the end.
        dense_state_bytes: the same bytes of the dense model under the same DeepSpeed config, if measured.
        reduce_bucket_numel: elements of a gradient bucket, of the run and of the dense model, if that was measured.
        seconds: wall-clock time of training and evaluation.
        timed_steps, timed_seconds: of training steps alone: without evaluations, calibration, checkpoints, logging, and
            without the first two steps of each job, which compile, allocate and are measured.
        run: more about the run, as name -> value; shown as it is.
    """

    facts: RunFacts
    unigram_val_loss: float
    train_losses: list[tuple[int, float]] = field(default_factory=list)
    val_losses: list[tuple[int, float]] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    is_peak_measured: bool = True
    dense_state_bytes: list[dict[str, int]] | None = None
    reduce_bucket_numel: int | None = None
    seconds: float = 0.0
    timed_steps: int = 0
    timed_seconds: float = 0.0
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
        return {name: getattr(self, name) for name in (*_LOSSES, *_TIMES)}

    def set_history(self, history: dict[str, Any]) -> None:
        """Go on where :meth:`history` was taken."""
        for name in _LOSSES:
            getattr(self, name)[:] = history[name]
        for name in _TIMES:
            setattr(self, name, history.get(name, 0))

    def add_lap(self, steps: int, seconds: float) -> None:
        """Steps that were timed, and what they took."""
        if steps:
            self.timed_steps += steps
            self.timed_seconds += seconds

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data; the keys of ``report.json``."""
        steps = self.val_losses[-1][0]
        per_step = self.facts.tokens_per_step
        return {
            "steps": steps,
            "tokens": steps * per_step,
            "flops": steps * self.facts.flops_per_step,
            "run": self.run,
            **self.facts.to_dict(),
            "trained": "subnetworks" if self.facts.masking == "forward" else "full model",
            "train_loss": self.train_loss,
            "full_model_val_loss": self.val_loss,
            "unigram_val_loss": self.unigram_val_loss,
            "per_rank_model_state_bytes": {
                "sdp": [rank["model_state_bytes"] for rank in self.ranks],
                "dense": self.dense_state_bytes,
            },
            "is_gradient_peak_measured": self.is_peak_measured,
            "reduce_bucket_numel": self.reduce_bucket_numel,
            "bytes_sent_per_step_per_rank": [rank["mean_bytes_sent"] for rank in self.ranks],
            "bytes_sent_by_kind": [rank["bytes_sent_by_kind"] for rank in self.ranks],
            "owned_parameters_per_rank": [rank["owned_numel"] for rank in self.ranks],
            "plan": None if self.facts.masking == "dense" else self.facts.plan.summary(),
            "seconds": self.seconds,
            "timed_steps": self.timed_steps,
            "tokens_per_second": self.timed_steps * per_step / self.timed_seconds if self.timed_seconds else None,
            "history": {
                "train_loss": [{"step": s, "tokens": s * per_step, "loss": v} for s, v in self.train_losses],
                "full_model_val_loss": [{"step": s, "tokens": s * per_step, "loss": v} for s, v in self.val_losses],
            },
            "versions": versions(),
        }

    def write(self, folder: Path) -> None:
        """Write all files into ``folder``, ``plan.png`` where there is a plan. What is not finite is ``null`` in JSON.

        Raises:
            OSError: the folder cannot be written.
        """
        data = self.to_dict()
        write_text(folder / "report.md", to_markdown(data))
        with replacing(folder / "loss.png") as path:
            plot_loss(data, path)
        if data["plan"]:
            with replacing(folder / "plan.png") as path:
                plot_plan(self.facts.plan, path)
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
    """``report.json`` as a page to read: a sentence stands where what it speaks of does."""
    speed, plan = data["tokens_per_second"], data["plan"]
    lines = [
        "# Run report",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in data["run"].items()),
        f"| steps, tokens | {data['steps']:,}, {data['tokens']:,} |",
        f"| training loss ({data['trained']}) | {data['train_loss']:.4f} |",
        f"| validation loss (full model) | {data['full_model_val_loss']:.4f} |",
        f"| unigram baseline, same tokens | {data['unigram_val_loss']:.4f} |",
        *([f"| time of training and evaluation | {data['seconds']:.0f} s |"] if data["seconds"] else []),
        *([f"| tokens/s of training steps | {speed:,.0f} |"] if speed else []),
        "",
        *(
            [
                f"Tokens/s: over {data['timed_steps']:,} steps of training, without evaluations, calibration, "
                "checkpoints and logging, and without the first two steps of a job, which compile, allocate and are "
                "measured.",
                "",
            ]
            if speed
            else []
        ),
        "![loss](loss.png)",
        "",
        *_state_lines(data),
    ]
    if plan:
        lines += ["", "## Plan", "", "![plan](plan.png)", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {value} |" for key, value in plan.items()]
    lines += ["", "## Versions", "", ", ".join(f"{name} {version}" for name, version in data["versions"].items()), ""]
    return "\n".join(lines)


def _state_lines(data: dict[str, Any]) -> list[str]:
    state, sent = data["per_rank_model_state_bytes"], data["bytes_sent_per_step_per_rank"]
    is_counted = any(nbytes is not None for nbytes in sent)
    about = ["Measured on live tensors."]
    if data["is_gradient_peak_measured"]:
        about.append("Gradients: their peak over one step.")
    if state["dense"]:
        about += ["Dense: plain DeepSpeed with the same config.", _bucket_sentence(data)]
    titles = ["rank", "parameters", *KINDS, *(["sent per step"] if is_counted else [])]
    rows = [
        [str(rank), f"{numel:,}", *(mb(sizes[kind]) for kind in KINDS), *([mb(sent[rank] or 0)] if is_counted else [])]
        for rank, (sizes, numel) in enumerate(zip(state["sdp"], data["owned_parameters_per_rank"], strict=True))
    ]
    rows += [
        [f"{rank}, dense", f"{data['parameters']:,}", *(mb(sizes[kind]) for kind in KINDS), *([""] * is_counted)]
        for rank, sizes in enumerate(state["dense"] or [])
    ]
    table = [titles, ["---"] * len(titles), *rows]
    return ["## Model state per rank", "", " ".join(about), "", *(f"| {' | '.join(cells)} |" for cells in table)]


def _bucket_sentence(data: dict[str, Any]) -> str:
    """What the gradients' share of the ratio hangs on."""
    bucket = data["reduce_bucket_numel"]
    return (
        f"Both with `reduce_bucket_size` {bucket:,} elements: the largest rank holds {_ratio(data, 'total'):.2f} of "
        f"dense's; without gradients, which alone depend on it, {_ratio(data, *KINDS[::2]):.2f}."
    )


def _ratio(data: dict[str, Any], *kinds: str) -> float:
    """Largest rank's bytes of ``kinds`` over the dense model's."""
    state = data["per_rank_model_state_bytes"]
    mine, dense = (max(sum(rank[kind] for kind in kinds) for rank in state[of]) for of in ("sdp", "dense"))
    return float(mine / dense)


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
    return (
        f" (dense: {mb(dense)}, ratio {_ratio(data, 'total'):.2f} with reduce_bucket_size "
        f"{data['reduce_bucket_numel']:,} in both, {_ratio(data, *KINDS[::2]):.2f} without gradients)"
    )
