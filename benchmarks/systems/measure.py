"""Cases measured in one set of processes: built, warmed up, measured and destroyed in turn, round by round."""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from compute import flop_counter
from contenders import Contender
from deepspeed.accelerator import get_accelerator
from link import set_rate
from memory import peak_memory
from prediction import predict
from systems import System, build, free
from traffic import Collectives, interface_bytes
from workload import Workload


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        rate: of every rank's link, bytes per second each way; ``None`` for an unlimited one.
        labels: what a table calls it, copied into its row.
    """

    contender: Contender
    workload: Workload
    rate: float | None = None
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """How much is measured.

    Attributes:
        rounds: every case once in each, in an order that turns.
        warmup: steps of a case in a round that are not timed.
        steps: timed ones after them; the loss of the last one is kept.
    """

    rounds: int = 3
    warmup: int = 1
    steps: int = 2


@dataclass
class Measured:
    """What this rank knows of a case so far.

    Attributes:
        seconds, wire: of every timed step; bytes sent over the interface, where the rank has its own.
        losses: mean over the ranks at the last step of every round.
        figures: memory, FLOPs, traffic and prediction, from the first round.
        reason: why it cannot run.
    """

    case: Case
    seconds: list[float] = field(default_factory=list)
    wire: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def run(
    cases: Sequence[Case],
    schedule: Schedule,
    say: Callable[[str], None] = lambda _: None,
    keep: Callable[[list[dict[str, Any]]], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Collective. One row per case; ``keep`` is given them after each round, so that an interrupted run leaves some."""
    measured = [Measured(case) for case in cases]
    figures: dict[tuple[str, Workload], dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    began, done = time.perf_counter(), 0
    for round_ in range(schedule.rounds):
        # The order turns, so that no case always follows the same one.
        start = round_ * len(measured) // schedule.rounds
        for one in [*measured[start:], *measured[:start]]:
            key = (one.case.contender.name, one.case.workload)
            # They are the same at every rate, and at points that axes have in common.
            one.figures = one.figures or figures.get(key, {})
            _one_round(one, schedule)
            figures[key] = one.figures
            done += 1
            elapsed = time.perf_counter() - began
            left = elapsed / done * (schedule.rounds * len(measured) - done)
            say(f"[{elapsed:5.0f} s, at most {left:4.0f} s left] {_told(one)}")
        rows = [_row(one) for one in measured]
        keep(rows)
    return rows


def _told(one: Measured) -> str:
    labels = "".join(f" {key}={value}" for key, value in one.case.labels.items())
    return f"{one.case.contender.name}{labels}: " + (
        one.reason or f"{statistics.median(one.seconds):.3f} s/step, loss {one.losses[-1]:.4f}"
    )


def _one_round(one: Measured, schedule: Schedule) -> None:
    """Measure time, and all else if it is not known yet, on a system of its own. A case that cannot run says why.

    What fails on one rank alone leaves the others in a collective; the backend's time limit ends the job then.
    """
    if one.reason:
        return
    set_rate(None)
    held: list[System] = []
    try:
        if not one.figures:
            one.figures = _figures(one.case, held)
            held.pop().close()
            free()
        held.append(build(one.case.contender, one.case.workload))
        set_rate(one.case.rate)
        for step in range(schedule.warmup):
            held[0].step(_batch(one.case.workload, step))
        for step in range(schedule.warmup, schedule.warmup + schedule.steps):
            loss = _timed_step(one, held[0], step)
        one.losses.append(_mean(loss))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        one.reason = f"{type(error).__name__}: {lines[0][:120]}"
    set_rate(None)
    while held:
        # What failed may not be able to end as it should.
        with contextlib.suppress(*([Exception] if one.reason else [])):
            held.pop().close()
    free()


def _timed_step(one: Measured, system: System, step: int) -> torch.Tensor:
    ids = _batch(one.case.workload, step)
    get_accelerator().synchronize()
    dist.barrier()
    wire, began = interface_bytes(), time.perf_counter()
    loss = system.step(ids)
    get_accelerator().synchronize()
    dist.barrier()
    one.seconds.append(time.perf_counter() - began)
    if wire is not None:
        one.wire.append((interface_bytes() or 0) - wire)
    return loss


def _figures(case: Case, held: list[System]) -> dict[str, Any]:
    def make() -> System:
        held.append(build(case.contender, case.workload))
        return held[0]

    memory = peak_memory(make, lambda system: system.step(_batch(case.workload, 0)))
    with Collectives() as collectives, flop_counter() as flops:
        held[0].step(_batch(case.workload, 0))
    return {
        "memory": memory,
        "flops": flops.get_total_flops(),
        "sent": dict(collectives.sent),
        "predicted": predict(case.contender, case.workload, getattr(held[0], "plan", None)),
    }


def _row(one: Measured) -> dict[str, Any]:
    """Collective. The ranks' figures together: memory of the rank with the largest peak, means of all else."""
    mine = {"figures": one.figures, "wire": statistics.median(one.wire) if one.wire else None, "reason": one.reason}
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    case, contender = one.case, one.case.contender
    row: dict[str, Any] = {
        "contender": contender.name,
        "system": contender.system,
        "stage": contender.stage,
        "coverage": contender.coverage,
        "masking": contender.sdp.get("masking"),
        "granularity": contender.sdp.get("granularity"),
        "checkpointing": contender.is_checkpointing,
        **case.labels,
        "rate": case.rate,
        "ranks": len(ranks),
        "tokens": case.workload.tokens * len(ranks),
    }
    reason = next((rank["reason"] for rank in ranks if rank["reason"]), "")
    if reason:
        return {**row, "reason": reason}
    figures = [rank["figures"] for rank in ranks]
    kinds = {kind for each in figures for kind in each["sent"]}
    return {
        **row,
        "seconds": one.seconds,
        "memory": max((each["memory"] for each in figures), key=lambda memory: memory["peak"]),
        "flops": statistics.fmean(each["flops"] for each in figures),
        "flops_largest": max(each["flops"] for each in figures),
        "sent": statistics.fmean(sum(each["sent"].values()) for each in figures),
        "sent_by_kind": {k: statistics.fmean(each["sent"].get(k, 0) for each in figures) for k in sorted(kinds)},
        "wire": statistics.fmean(rank["wire"] for rank in ranks) if one.wire else None,
        "losses": one.losses,
        "predicted": figures[0]["predicted"],
    }


def _batch(workload: Workload, step: int) -> torch.Tensor:
    return workload.batch(dist.get_rank(), step).to(get_accelerator().current_device_name())


def _mean(value: torch.Tensor) -> float:
    total = value.detach().double().clone()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
