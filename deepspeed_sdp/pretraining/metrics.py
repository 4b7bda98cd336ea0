"""Figures of a run while it goes: to the console, ``metrics.jsonl``, and DeepSpeed's monitor."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_sdp.errors import OutputError
from deepspeed_sdp.files import write_text
from deepspeed_sdp.pretraining.clock import Lap
from deepspeed_sdp.ranks import gather_objects
from deepspeed_sdp.report import RunFacts

PHASES = ("data", "forward", "backward", "step", "communication", "exposed")
FILE = "metrics.jsonl"


class Metrics:
    """Collects every step, gathers from all ranks at every log interval, writes on rank 0.

    Args:
        folder: gets ``metrics.jsonl``: an object per line, see docs/recipes.md.
        engine: a training engine of this package, SDP or dense.
        facts: of the run.
        peak_flops: FLOPs per second that the device can do, for the model FLOPs utilisation; ``None``: unknown.
        first_step: lines of later steps are dropped from a file that an earlier job left.
    """

    def __init__(
        self,
        folder: Path,
        engine: Any,
        facts: RunFacts,
        peak_flops: float | None,
        first_step: int,
    ) -> None:
        self._file = folder / FILE
        self._engine = engine
        self._facts = facts
        self._tokens = facts.tokens_per_step / dist.get_world_size()
        self._flops_per_token = facts.flops_per_token[getattr(engine, "subnetwork_index", 0)]
        self._peak_flops = peak_flops
        self._losses: list[torch.Tensor] = []
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._learning_rate = 0.0
        self._skipped = 0
        if dist.get_rank() == 0:
            self._drop_after(first_step)

    def add(
        self,
        loss: torch.Tensor,
        data_seconds: float,
        learning_rate: float,
        skipped: Mapping[str, int],
        is_timed: bool = True,
    ) -> None:
        """One step: its mean loss (a scalar on the device), how long its batches took to come, what it stepped with.

        Args:
            skipped: rows and files that this rank's text left out so far, by reason.
            is_timed: whether its time counts.
        """
        self._losses.append(loss)
        self._learning_rate = learning_rate
        self._skipped = sum(skipped.values())
        if not is_timed:
            return
        self._seconds["data"] += data_seconds
        for phase, seconds in self._engine.phase_seconds.items():
            self._seconds[phase] += seconds

    def write_step(self, step: int, lap: Lap) -> dict[str, Any]:
        """Collective. Means since the last call, on every rank; rank 0 writes them.

        Args:
            lap: of the steps since then; without one, what is of time is not known.
        """
        per_step = lap.seconds / lap.steps if lap.steps else math.nan
        engine = self._engine
        norm = engine.get_global_grad_norm()
        sent = engine.bytes_sent
        mine = {
            "loss": float(torch.stack(self._losses).mean()),
            "tokens_per_second": self._tokens / per_step,
            "mfu": self._tokens * self._flops_per_token / per_step / (self._peak_flops or math.nan),
            "memory_bytes": memory_bytes(),
            "bytes_sent": math.nan if sent is None else sent,
            "skipped": self._skipped,
            **{f"seconds/{phase}": self._seconds[phase] / (lap.steps or math.nan) for phase in PHASES},
        }
        everyone = _from_all_ranks(list(mine.values()))
        ranks = {name: everyone[:, i] for i, name in enumerate(mine)}
        line = {
            "step": step,
            "tokens": self._done_tokens(),
            "loss": float(ranks["loss"].mean()),
            "learning_rate": self._learning_rate,
            "grad_norm": None if norm is None else float(norm),
            "tokens_per_second": float(ranks["tokens_per_second"].sum()),
            "tokens_per_second_per_rank": [_rounded(value) for value in ranks["tokens_per_second"].tolist()],
            "mfu": float(ranks["mfu"].mean()),
            "memory_bytes_per_rank": [int(value) for value in ranks["memory_bytes"].tolist()],
            "bytes_sent_per_step": float(ranks["bytes_sent"].max()),
            "flops": step * self._facts.flops_per_step,
            "skipped": int(ranks["skipped"].sum()),
            "seconds_per_step": per_step,
            # The slowest rank's: the others wait for it.
            "seconds": {phase: float(ranks[f"seconds/{phase}"].max()) for phase in PHASES},
        }
        self._losses.clear()
        self._seconds.clear()
        return self._write(line)

    def _done_tokens(self) -> int:
        """A job may have gone on with another batch."""
        each = self._facts.tokens_per_step // int(self._engine.train_batch_size())
        return int(self._engine.global_samples) * each

    def write_evaluation(self, step: int, loss: float) -> dict[str, Any]:
        """The full model's loss on held-out text, nats per token."""
        return self._write(
            {
                "step": step,
                "tokens": self._done_tokens(),
                "full_model_val_loss": loss,
                "full_model_val_perplexity": math.exp(min(loss, 700.0)),
            }
        )

    def _write(self, line: dict[str, Any]) -> dict[str, Any]:
        if dist.get_rank() == 0:
            known = {key: _rounded(value) for key, value in line.items()}
            try:
                with self._file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(known, allow_nan=False) + "\n")
            except OSError as error:
                raise OutputError(f"--output_dir: cannot write {self._file}: {error.strerror or error}") from None
            self._to_monitor(known)
        return line

    def _to_monitor(self, line: dict[str, Any]) -> None:
        if not self._engine.monitor.enabled:
            return
        samples = self._engine.global_samples
        figures = {**line, **{f"seconds_{phase}": value for phase, value in line.get("seconds", {}).items()}}
        if "memory_bytes_per_rank" in figures:
            figures["memory_bytes_largest_rank"] = max(figures["memory_bytes_per_rank"])
        self._engine.monitor.write_events(
            [
                (f"Train/Samples/{name}", float(value), samples)
                for name, value in figures.items()
                if isinstance(value, int | float) and name != "step"
            ]
        )

    def _drop_after(self, step: int) -> None:
        """A job that goes on from a checkpoint does the steps after it again; a half-written line is dropped too."""
        try:
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines() if self._file.exists() else []
            kept = [line for line in lines if _step_of(line) <= step]
            write_text(self._file, "".join(f"{line}\n" for line in kept))
        except OSError as error:
            raise OutputError(f"--output_dir: cannot write {self._file}: {error.strerror or error}") from None


def memory_bytes() -> int:
    """An accelerator's largest allocation since the start; on a CPU the process's memory now."""
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() != "cpu":
        return int(get_accelerator().max_memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def _from_all_ranks(values: list[float]) -> torch.Tensor:
    """``[world_size, len(values)]`` float64 on the CPU."""
    return torch.tensor(gather_objects(values, "collecting metrics"), dtype=torch.float64)


def _rounded(value: Any) -> Any:
    """Eight digits, as more say nothing; ``None`` for what is not known, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.8g}") if math.isfinite(value) else None


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
