"""The training loop: steps, evaluations of the full model, checkpoints, a clean stop, the report."""

import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from deepspeed_sdp.agreement import from_first_rank
from deepspeed_sdp.checkpoint import LOCK
from deepspeed_sdp.engine import Peak, gradient_peak
from deepspeed_sdp.errors import ConfigError, OutputError
from deepspeed_sdp.pretraining.clock import TrainingClock
from deepspeed_sdp.pretraining.console import progress_bar
from deepspeed_sdp.pretraining.metrics import Metrics
from deepspeed_sdp.pretraining.text import Batch, Text, heldout_batches
from deepspeed_sdp.ranks import gather_objects, meet, object_of_first
from deepspeed_sdp.report import RunReport
from deepspeed_sdp.stopping import StopRequest

if TYPE_CHECKING:
    from deepspeed_sdp.pretraining.elastic import Kept

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoopSettings:
    """What a loop does when.

    Attributes:
        output: folder of the run.
        steps: optimizer steps in all.
        peak_flops: FLOPs per second of the device; ``None``: unknown.
        log_interval, eval_interval, checkpoint_interval: steps between them; 0 checkpoints: only when asked to stop;
            else the last step has one, too.
        eval_sequences: held-out sequences of an evaluation in mid-run, 0: all; the last one takes all.
        calibration_sequences: of a step's text, on which the full model is calibrated before it is evaluated or saved.
        restart: begin anew where there is a checkpoint to go on from.
    """

    output: Path
    steps: int
    peak_flops: float | None = None
    log_interval: int = 10
    eval_interval: int = 50
    checkpoint_interval: int = 0
    eval_sequences: int = 128
    calibration_sequences: int = 64
    restart: bool = False


class Outcome(Enum):
    """How :meth:`Loop.run` ended."""

    FINISHED = "finished"
    # Asked to stop: a checkpoint is saved, and the same call goes on from it.
    STOPPED = "stopped"
    # Nothing was left to do, and the report is there.
    WAS_FINISHED = "was finished"


class Loop:
    """One run of an engine of this package, SDP or dense, over a text.

    Attributes:
        kept: where its state is kept in memory meanwhile, if it is.
    """

    def __init__(self, engine: Any, text: Text, report: RunReport, settings: LoopSettings, stop: StopRequest) -> None:
        self.engine = engine
        self.text = text
        self.report = report
        self.settings = settings
        self.checkpoints = settings.output / "checkpoints"
        self.peak = Peak()
        self.kept: Kept | None = None
        self._stop = stop
        stop.note_termination_too()

    def claim(self) -> None:
        """Collective. Be the one job that saves checkpoints of this run; one that begins anew sets older ones aside.

        Raises:
            OutputError: another job does, or they cannot be written.
        """
        settings = self.settings
        if settings.restart and on_every_rank(self.checkpoints.exists):
            # Not those of a job that writes them.
            self.engine.claim_checkpoints(self.checkpoints)
            from_first_rank(self._set_aside)
        if settings.checkpoint_interval:
            # Rather now than after an interval of work.
            self.engine.claim_checkpoints(self.checkpoints)

    def run(self) -> Outcome:
        """Collective. Train to the end, from the latest checkpoint if there is one.

        Raises:
            ConfigError: the run has done more steps already.
            DataError: the checkpoint was made with another text.
            OutputError: it was asked to stop, and no checkpoint could be written; or another job writes them.
        """
        settings = self.settings
        done = self._resume()
        if done > settings.steps:
            raise ConfigError(
                f"length.steps: got {settings.steps}; the run in {settings.output} has done {done} already, takes "
                "that or more, or --restart"
            )
        if done == settings.steps and on_every_rank((settings.output / "report.json").exists):
            return Outcome.WAS_FINISHED
        try:
            return self._train(done)
        finally:
            self.text.close()

    def _train(self, done: int) -> Outcome:
        settings, engine, report = self.settings, self.engine, self.report
        metrics = Metrics(settings.output, engine, report.facts, settings.peak_flops, first_step=done)
        batches = self.text.batches(
            engine.data_rank, dist.get_world_size(), engine.train_micro_batch_size_per_gpu(), engine.global_samples
        )
        progress = progress_bar(settings.steps, dist.get_rank(), done)
        began, clock = time.monotonic() - report.seconds, TrainingClock()
        is_being_kept = False
        for step in range(done + 1, settings.steps + 1):
            is_measured = step == min(done + 2, settings.steps)
            # The first step compiles and allocates, and measuring takes time.
            is_timed = not (is_measured or step == done + 1)
            with nullcontext() if is_timed else clock.aside():
                micro_batches = self._one_step(batches, metrics, is_measured, is_timed)
            if is_timed:
                clock.count()
            is_asked = self._stop.agreed()
            interval, kept = settings.checkpoint_interval, self.kept
            is_saved = is_asked or bool(interval and (step % interval == 0 or step == settings.steps))
            # The first one too: whether there is room is known at once.
            is_due = kept is not None and (step % kept.interval == 0 or step == done + 1)
            is_kept = is_due and step < settings.steps
            # A job that goes on from a checkpoint knows nothing of losses that were not written by then.
            if step % settings.log_interval == 0 or step == settings.steps or is_saved or is_kept:
                lap = clock.lap()
                report.add_lap(*lap)
                with clock.aside():
                    line = metrics.write_step(step, lap)
                report.train_losses.append((step, line["loss"]))
                self._show(progress, line)
            progress.update()
            if kept is not None:
                if is_being_kept:
                    # No more than an interval can be lost. A checkpoint on disk may take its time.
                    engine.wait_for_checkpoint()
                kept.note_step(step)
                if is_kept:
                    with clock.aside():
                        report.seconds = time.monotonic() - began
                        engine.save_in_memory(kept.folder, self._client_state())
                is_being_kept = is_kept and not is_saved
            is_evaluated = step % settings.eval_interval == 0 and step < settings.steps
            if is_evaluated or is_saved or step == settings.steps:
                with clock.aside():
                    self._calibrate(micro_batches)
                    if is_evaluated:
                        self._evaluate(step, settings.eval_sequences, metrics)
                    if is_saved:
                        report.seconds = time.monotonic() - began
                        saved = self._save()
            if is_asked and step < settings.steps:
                progress.close()
                self._end_early(step, saved)
                return Outcome.STOPPED
        self._evaluate(settings.steps, 0, metrics)
        progress.close()
        report.seconds = time.monotonic() - began
        engine.wait_for_checkpoint()
        return Outcome.FINISHED

    def _show(self, progress: Any, line: Mapping[str, Any]) -> None:
        known = self.report.val_losses
        shown = {"loss": f"{line['loss']:.3f}", "val": f"{known[-1][1]:.3f}" if known else "-"}
        if math.isfinite(line["tokens_per_second"]):
            shown["tok_s"] = f"{line['tokens_per_second']:.0f}"
            shown |= {"MFU": f"{line['mfu']:.1%}"} if self.settings.peak_flops else {}
        progress.set_postfix(**shown)

    def _one_step(self, batches: Iterator[Batch], metrics: Metrics, is_measured: bool, is_timed: bool) -> list[Batch]:
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self.engine.gradient_accumulation_steps())]
        waited = time.perf_counter() - began
        learning_rate = float(self.engine.get_lr()[0])
        if is_measured:
            with gradient_peak(self.engine) as self.peak:
                loss = train_step(self.engine, micro_batches)
        else:
            loss = train_step(self.engine, micro_batches)
        metrics.add(loss, waited, learning_rate, self.text.skipped(), is_timed)
        return micro_batches

    def _calibrate(self, micro_batches: list[Batch]) -> None:
        """On text of the last step: a run that was stopped finds the same as one that was not."""
        each = dist.get_world_size() * self.engine.train_micro_batch_size_per_gpu()
        count = -(-self.settings.calibration_sequences // each)
        if count:
            self.engine.calibrate(micro_batches[:count])

    def _evaluate(self, step: int, sequences: int, metrics: Metrics) -> None:
        engine = self.engine
        batches = heldout_batches(
            self.text, sequences, dist.get_rank(), dist.get_world_size(), engine.train_micro_batch_size_per_gpu()
        )
        loss = engine.evaluate_full(batches)
        self.report.val_losses.append((step, loss))
        metrics.write_evaluation(step, loss)

    def _save(self) -> bool:
        return bool(self.engine.save_checkpoint(self.checkpoints, client_state=self._client_state()))

    def _client_state(self) -> dict[str, Any]:
        return {"report": self.report.history(), "text": self.text.state_dict()}

    def _resume(self) -> int:
        if self.kept is None:
            path, state = self.engine.load_checkpoint(self.checkpoints)
        else:
            path, state = self._newest(self.kept)
        if state is None:
            return 0
        self.report.set_history(state["report"])
        self.text.load_state_dict(state.get("text", {}))
        if dist.get_rank() == 0:
            print(f"going on from {path}", flush=True)
        return int(self.engine.global_steps)

    def _newest(self, kept: "Kept") -> tuple[str | None, dict[str, Any] | None]:
        """What is newer, kept in memory or saved; says how many steps are lost with a rank."""
        newest = self.engine.load_newest(kept.folder, self.checkpoints)
        done = int(self.engine.global_steps) if newest.path else 0
        lost = max(gather_objects(kept.farthest(), "how far the job had come")) - done
        kept.forget_steps()
        meet("forgetting how far the job had come")
        if dist.get_rank() == 0:
            for problem in newest.problems:
                logger.warning("what is in memory is not used: %s", problem)
            if lost > 0:
                where = "memory" if newest.is_in_memory else "the latest checkpoint" if newest.path else "the beginning"
                print(f"{lost} steps are lost: from {where} on they are done again", flush=True)
        return newest.path, newest.client_state

    def _set_aside(self) -> None:
        """Checkpoints of a run that is begun anew: nothing saved is lost, and nobody goes on from them by mistake."""
        names = (self.checkpoints.with_name(f"checkpoints-before-{number}") for number in itertools.count(1))
        try:
            aside = next(name for name in names if not name.exists())
            os.rename(self.checkpoints, aside)
            (aside / LOCK).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"--restart: cannot rename {self.checkpoints}: {error.strerror or error}") from None

    def _end_early(self, step: int, saved: bool) -> None:
        if not (self.engine.wait_for_checkpoint() and saved):
            raise OutputError(f"stopped at step {step}, and no checkpoint could be written to {self.checkpoints}")
        if dist.get_rank() == 0:
            print(f"stopped at step {step}; the same command goes on from {self.checkpoints}", flush=True)


def train_step(engine: Any, micro_batches: list[Batch]) -> torch.Tensor:
    """One optimizer step; the mean loss of its micro-batches, a scalar tensor."""
    total = torch.zeros((), device=engine.device)
    for batch in micro_batches:
        loss = engine(**{key: value.to(engine.device) for key, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        total = total + loss.detach() / len(micro_batches)
    return total


def conclude(loop: Loop) -> None:
    """Collective. The model and tokenizer in ``hf/``, and the report."""
    from deepspeed_sdp.engine import model_state_bytes

    output = loop.settings.output
    loop.engine.save_hf(output / "hf")
    state = with_peak(model_state_bytes(loop.engine), loop.peak.nbytes)
    loop.report.is_peak_measured = loop.peak.nbytes > 0
    loop.report.ranks = from_all_ranks({**loop.engine.sdp_stats(), "model_state_bytes": state})
    from_first_rank(lambda: _write(loop))


def _write(loop: Loop) -> None:
    from deepspeed_sdp.data import load_tokenizer

    output = loop.settings.output
    try:
        load_tokenizer(loop.text.tokenizer_folder).save_pretrained(output / "hf")
        loop.report.write(output)
    except OSError as error:
        raise OutputError(f"--output_dir: cannot write {output}: {error.strerror or error}") from None


def make_writable(folder: Path) -> None:
    """Raise OutputError now rather than after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OutputError(f"--output_dir: cannot write {folder}: {error.strerror or error}") from None


def with_peak(state: dict[str, int], peak: int) -> dict[str, int]:
    """Gradients come and go within a step: report their peak (0: no step was measured)."""
    state = {**state, "gradients": peak or state["gradients"]}
    return {**state, "total": state["weights"] + state["gradients"] + state["optimizer"]}


def from_all_ranks(value: Any) -> list[Any]:
    """Collective: ``value`` of every rank, on every rank."""
    return gather_objects(value, "collecting figures for the report")


def on_every_rank(look: Callable[[], bool]) -> bool:
    """Collective. What rank 0 sees, on all ranks: a shared folder may show a file to some later than to others."""
    return bool(object_of_first(look() if dist.get_rank() == 0 else False, "looking at the first rank's files"))


def leave() -> None:
    """Collective. End this process together with the others."""
    meet("the end of the job")
    dist.destroy_process_group()
