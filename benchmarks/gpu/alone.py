"""Checks of one worker of several, whose peers are faked: memory and compute are those of a real job, not its waits."""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from contenders import CONTENDERS, Contender
from deepspeed.accelerator import get_accelerator
from measure import Case, Schedule, run
from memory import peak_memory
from systems import System, bucket_elements, build, free
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM
from workload import Workload

from deepspeed_sdp import SDPConfig
from deepspeed_sdp.estimate import Estimator, Job
from deepspeed_sdp.estimate.gpu import Cluster, find_gpu, gpu_of_device

_TOY = Workload(hidden_size=64, layers=3, head_size=16, vocab_size=128, sequence=32, micro_batch=2, precision="bf16")
# How far an estimate may be from the measured peak. At toy size padding and what is not modelled weigh more.
_PEAK_TOLERANCE, _TOY_TOLERANCE = 0.1, 0.25
# Hidden size, layers and micro-batch of a step.
_SHAPES = {"134M": (768, 12, 32), "1B": (2048, 24, 8)}


def make_workload(hidden_size: int, layers: int, micro_batch: int) -> Workload:
    """A preset's shape at the recipes' sequence length, made on the device; at toy size on a CPU."""
    if not _is_device():
        return _TOY
    return Workload(
        hidden_size,
        layers,
        head_size=64,
        vocab_size=32000,
        sequence=1024,
        micro_batch=micro_batch,
        precision="bf16",
        device=get_accelerator().current_device_name(),
    )


def peak(contender: str) -> dict[str, Any]:
    """The 1B preset's shape: the true peak of a step beside what ``estimate`` says."""
    workload, chosen = make_workload(2048, 24, 2), CONTENDERS[contender]
    with _held() as held:

        def make() -> System:
            held.append(build(chosen, workload))
            return held[0]

        measured = peak_memory(make, lambda system: system.step(_ids(workload)))
    with torch.device("meta"):
        full = LlamaForCausalLM(workload.config())
    bucket = bucket_elements(workload, sum(p.numel() for p in full.parameters()))
    job = Job(
        dist.get_world_size(),
        chosen.stage or 0,
        SDPConfig.parse(chosen.sdp) if chosen.sdp else None,
        micro_batch=workload.micro_batch,
        seq_length=workload.sequence,
        step_temporaries=2,
        bucket=bucket,
        gather_bucket=bucket,
    )
    estimated = Estimator(full, Cluster(find_gpu("h100"))).estimate(job)
    ratio = estimated.peak / measured["peak"]
    figures = {"peak": measured["peak"], "estimated_peak": estimated.peak, "estimated_over_measured": ratio}
    figures |= {"measured": measured, "estimated": estimated.memory}
    tolerance = _PEAK_TOLERANCE if _is_device() else _TOY_TOLERANCE
    assert chosen.system != "sdp" or abs(ratio - 1) <= tolerance, f"estimated {estimated.peak}, measured {measured}"
    return figures


def speed(contender: str, shape: str) -> dict[str, Any]:
    """A preset's shape: seconds of a step, of the device's work in it, the share of its FLOPs that are used, the peak.

    A step that takes much longer than the device's work waits for the host, which starts its kernels.
    """
    workload = make_workload(*_SHAPES[shape])
    schedule = Schedule(rounds=2, warmup=3, steps=5) if _is_device() else Schedule(rounds=1, warmup=1, steps=2)
    (row,) = run([Case(CONTENDERS[contender], workload)], schedule)
    assert "reason" not in row, row["reason"]
    seconds = statistics.median(row["seconds"])
    with _held() as held:
        held.append(build(CONTENDERS[contender], workload))
        for _ in range(2):
            held[0].step(_ids(workload))
        busy = _busy(lambda: held[0].step(_ids(workload))) if _is_device() else None
    return {
        "step_seconds": seconds,
        "device_seconds": busy,
        "fastest": min(row["seconds"]),
        "slowest": max(row["seconds"]),
        "tokens_per_second": workload.tokens / seconds,
        "flops": row["flops"],
        "mfu": _mfu(row["flops"], seconds),
        "peak": row["memory"]["peak"],
        "memory": row["memory"],
        "sent": row["sent"],
        "micro_batch": workload.micro_batch,
        "sequence": workload.sequence,
    }


def prefetch(prefetch: bool) -> dict[str, Any]:
    """ZeRO-3: peak and seconds with a part gathered ahead, and without."""
    contender = CONTENDERS["SDP forward neuron 1/2 ZeRO-3"]
    if not prefetch:
        contender = replace(contender, zero={"stage3_prefetch_bucket_size": 0})
    return _plain_steps(contender, make_workload(*_SHAPES["134M"]))


def _plain_steps(contender: Contender, workload: Workload, steps: int = 8) -> dict[str, Any]:
    accelerator = get_accelerator()
    with _held() as held:
        before = accelerator.memory_allocated()
        held.append(build(contender, workload))
        seconds = []
        for step in range(steps):
            if step == 3:
                accelerator.reset_peak_memory_stats()
            accelerator.synchronize()
            began = time.perf_counter()
            held[0].step(_ids(workload))
            accelerator.synchronize()
            seconds.append(time.perf_counter() - began)
        # On a CPU it is the process's memory, of no meaning at toy size.
        peak = accelerator.max_memory_allocated() - before if _is_device() else None
    return {"peak": peak, "step_seconds": statistics.median(seconds[3:])}


@contextlib.contextmanager
def _held() -> Iterator[list[System]]:
    """A list whose systems are closed in the end."""
    held: list[System] = []
    try:
        yield held
    finally:
        while held:
            held.pop().close()
        free()


def _busy(work: Callable[[], Any]) -> float:
    """Seconds in which the device did something, of kernels at the same time one."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        work()
        get_accelerator().synchronize()
    spans = sorted(
        (event.start_ns(), event.end_ns())
        for event in trace.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not _is_range(event)
    )
    busy, ended = 0, 0
    for begin, end in spans:
        busy += max(0, end - max(begin, ended))
        ended = max(ended, end)
    return busy / 1e9


def _is_range(event: Any) -> bool:
    """A name over several kernels, which spans the time between them."""
    return bool(event.is_user_annotation()) or event.name().startswith(("deepspeed_sdp::", "Optimizer."))


def _mfu(flops: float, seconds: float) -> float | None:
    gpu = gpu_of_device(torch.cuda.get_device_name()) if _is_device() else None
    return flops / seconds / gpu.flops(torch.bfloat16) if gpu else None


def _ids(workload: Workload) -> torch.Tensor:
    return workload.batch(dist.get_rank(), 0).to(get_accelerator().current_device_name())


def _is_device() -> bool:
    return get_accelerator().device_name() != "cpu"
