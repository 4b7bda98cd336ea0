"""Checks of training on several ranks: against the reference simulation, and features of an engine."""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.utils._pytree import tree_map

import deepspeed_sdp
from benchmarks.gpu.alone import make_workload
from deepspeed_sdp.ranks import gather_objects, object_of_first
from tests.engine import repartition_cases, test_repartition
from tests.engine.cases import build_model, ds_config, face, run_steps
from tests.engine.test_precision import bf16_simulation, update_similarity
from tests.support.compare import assert_owners_equal, simulate
from tests.support.fused_ops import fused_ops

STEPS = 5
# Of losses, of the norm (relative) and of every weight. Two kinds of processors add up in different orders.
FP32_LIMIT = 1e-4
BF16_LIMIT, BF16_SIMILARITY = 0.02, 0.99


def against_oracle(stage: int, masking: str, precision: str) -> dict[str, Any]:
    """Training equals the simulation of the method's formulas in one process, on the CPU, in fp32."""
    return _trained({"stage": stage, "clip": 1.0, "bf16": precision == "bf16"}, masking)


def offloaded(stage: int) -> dict[str, Any]:
    """The optimizer's state, at ZeRO-3 the weights' shards too, lies in pinned memory of the host."""
    place = {"device": "cpu", "pin_memory": True}
    zero = {"stage": stage, "offload_optimizer": place, **({"offload_param": place} if stage == 3 else {})}
    ds = {"stage": stage, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "clip": 1.0}

    def look(engine: Any) -> dict[str, Any]:
        masters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        assert {p.device.type for p in masters} == {"cpu"}
        shards = engine.optimizer.weight_tensors() if stage == 3 else []
        assert all(shard.device.type == "cpu" for shard in shards)
        is_pinned = all(shard.is_pinned() for shard in shards) if _is_device() and shards else None
        assert is_pinned is not False, "the weights' shards are not pinned"
        return {"pinned": is_pinned}

    return _trained(ds, look=look)


def torch_fused() -> dict[str, Any]:
    """``torch.optim.AdamW(fused=True)``."""
    return _trained({"stage": 1, "clip": 1.0}, optimizer={"fused": True})


def deepspeed_fused() -> dict[str, Any]:
    """DeepSpeed's FusedAdam, compiled at first use; on a CPU its class over the same kernel in torch."""
    with contextlib.nullcontext() if _is_device() else fused_ops():
        return _trained({"stage": 1, "clip": 1.0}, optimizer={"torch_adam": None})


def compiled(stage: int) -> dict[str, Any]:
    """``engine.compile()``, by inductor on a device."""
    backend = "inductor" if _is_device() else "aot_eager"
    try:
        return _trained({"stage": stage, "clip": 1.0}, prepare=lambda engine: engine.compile(backend=backend))
    finally:
        torch._dynamo.reset()


def resume(stage: int) -> dict[str, Any]:
    """A second engine goes on from the first one's checkpoint as the first one does."""
    folder = object_of_first(tempfile.mkdtemp(prefix="sdp-gpu-") if dist.get_rank() == 0 else None, "a folder")
    config = ds_config(stage, clip=1.0)
    engine = _engine(config, {"coverage": 0.5})
    run_steps(engine, 2)
    engine.save_checkpoint(folder)
    engine.wait_for_checkpoint()
    first = run_steps(engine, 2, seed=2)
    engine.destroy()
    engine = _engine(config, {"coverage": 0.5})
    engine.load_checkpoint(folder)
    second = run_steps(engine, 2, seed=2)
    engine.destroy()
    difference = _largest(first["losses"], second["losses"])
    assert difference <= FP32_LIMIT, f"losses after the resume differ by {difference}"
    return {"loss_difference": difference}


def repartitioned(stage: int) -> dict[str, Any]:
    """Other units, another coverage, blocks: the full model stays, and training goes on as the simulation's does."""
    world, ds = dist.get_world_size(), {"stage": stage, "bucket": 4000, "clip": 1.0}
    stages = [{"round": (1, "rotate")}, {"coverage": 0.75}, {"granularity": "layer"}]
    results = _of_all(repartition_cases.train(stages=stages, ds=ds, sdp={"coverage": 0.5}))
    if dist.get_rank() == 0:
        test_repartition.check(results, ds, world)
    return {}


def saved(is_async: bool) -> dict[str, Any]:
    """How long a checkpoint of the 134M shape keeps training waiting, and how long it takes."""
    folder = object_of_first(tempfile.mkdtemp(prefix="sdp-gpu-") if dist.get_rank() == 0 else None, "a folder")
    workload = make_workload(768, 12, 4)
    config = ds_config(1, bf16=True)
    sdp = {"checkpoint": {"async": is_async}}
    engine = deepspeed_sdp.initialize(model=workload.model(), config=config, sdp_config=sdp)[0]
    ids = workload.batch(0, 0)[:2].to(engine.device)

    def step() -> None:
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()

    figures = []
    for tag in ("first", "second"):
        step()
        stall = _timed(lambda tag=tag: engine.save_checkpoint(folder, tag=tag))
        rest = _timed(engine.wait_for_checkpoint)
        load = _timed(lambda tag=tag: engine.load_checkpoint(folder, tag=tag))
        written = sum(file.stat().st_size for file in Path(folder, tag).iterdir())
        figures.append({"stall": stall, "saved": stall + rest, "load": load, "written": written})
    engine.destroy()
    shutil.rmtree(folder, ignore_errors=True)
    # The first one allocates what the later ones use again.
    return {**figures[1], "first_stall": figures[0]["stall"]}


def _timed(work: Callable[[], Any]) -> float:
    get_accelerator().synchronize()
    began = time.perf_counter()
    work()
    get_accelerator().synchronize()
    return time.perf_counter() - began


def _of_all(mine: Any) -> Any:
    """Every rank's results, on the CPU."""
    on_cpu = tree_map(lambda value: value.cpu() if torch.is_tensor(value) else value, mine)
    return gather_objects(on_cpu, "comparing with the simulation")


def _trained(
    ds: dict[str, Any],
    masking: str = "forward",
    optimizer: dict[str, Any] | None = None,
    prepare: Callable[[Any], Any] = lambda engine: None,
    look: Callable[[Any], dict[str, Any]] = lambda engine: {},
) -> dict[str, Any]:
    """Train, and compare with the simulation on the first rank.

    Args:
        optimizer: parameters of AdamW beside the usual ones; ``None`` as a value takes one away.
    """
    world = dist.get_world_size()
    sdp = {"coverage": 0.5 if world % 2 == 0 else 1.0, "masking": masking}
    config = ds_config(**ds)
    parameters = {**config["optimizer"]["params"], **(optimizer or {})}
    config["optimizer"]["params"] = {key: value for key, value in parameters.items() if value is not None}
    engine = _engine(config, sdp)
    prepare(engine)
    get_accelerator().synchronize()
    began = time.perf_counter()
    mine = run_steps(engine, STEPS)
    get_accelerator().synchronize()
    wall = (time.perf_counter() - began) / STEPS
    figures = {**look(engine), "step_seconds": wall, "phases": engine.sdp_stats()["seconds"]}
    mine |= face(engine)
    engine.destroy()
    results = _of_all(mine)
    if dist.get_rank() == 0:
        figures |= _compared(results, sdp, ds, world)
    return figures


def _compared(results: list[dict[str, Any]], sdp: dict[str, Any], ds: dict[str, Any], world: int) -> dict[str, float]:
    assert_owners_equal(results)
    is_bf16 = ds.get("bf16", False)
    if is_bf16:
        start, module, losses, norms = bf16_simulation(results, ds, sdp=sdp, world=world)
    else:
        module, losses, norms = simulate(results[0], sdp=sdp, ds=ds, world=world)
    figures = {
        "loss_difference": max(_largest(r["losses"], [step[i] for step in losses]) for i, r in enumerate(results)),
        "norm_difference": max(abs(a - b) / b for a, b in zip(results[0]["norms"], norms, strict=True)),
    }
    limit = BF16_LIMIT if is_bf16 else FP32_LIMIT
    full, expected = results[0]["full"], module.state_dict()
    if is_bf16:
        figures["update_similarity"] = update_similarity(full, expected, start)
        assert figures["update_similarity"] > BF16_SIMILARITY, figures
    else:
        figures["weight_difference"] = max(float((full[n] - expected[n]).abs().max()) for n in expected)
        assert figures["weight_difference"] <= limit, figures
    assert figures["loss_difference"] <= limit, figures
    assert figures["norm_difference"] <= limit, figures
    return figures


def _engine(config: dict[str, Any], sdp: dict[str, Any]) -> Any:
    return deepspeed_sdp.initialize(model=build_model(), config=config, sdp_config=sdp)[0]


def _largest(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


def _is_device() -> bool:
    return get_accelerator().device_name() != "cpu"
