"""Beside a run's memory: that of plain DeepSpeed with the dense model, measured."""

from typing import Any

import torch
import torch.distributed as dist

from deepspeed_sdp.agreement import from_first_rank
from deepspeed_sdp.config import BLOCK
from deepspeed_sdp.engine import gradient_peak, model_state_bytes, reduce_bucket_numel
from deepspeed_sdp.pretraining.job import Job, model_config
from deepspeed_sdp.pretraining.loop import Loop, from_all_ranks, train_step, with_peak
from deepspeed_sdp.pretraining.text import stack


def add_dense_state(loop: Loop, job: Job) -> None:
    """Collective. Measure the dense model's state in the place of the run's engine, and write the report again."""
    loop.report.reduce_bucket_numel = reduce_bucket_numel(loop.engine)
    loop.engine.destroy()
    # All that refers to the subnetwork's memory; the dense model may need it.
    del loop.engine, job.model
    loop.report.dense_state_bytes = _measure(loop, job, loop.report.reduce_bucket_numel)
    from_first_rank(lambda: loop.report.write(loop.settings.output))


def _measure(loop: Loop, job: Job, bucket_numel: int) -> list[dict[str, int]]:
    """One step, measured on the live tensors.

    Its buckets of gradients are as large as SDP's, whose default is another.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM

    run = job.run
    torch.manual_seed(0)
    hf_config = model_config(run.model_file, run.data.seq_length, loop.text.tokenizer_folder)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(hf_config, trust_remote_code=False)
    if run.model.activation_checkpointing:
        model.gradient_checkpointing_enable()
    config: dict[str, Any] = {key: value for key, value in run.for_steps(job.length.steps).items() if key != BLOCK}
    config["zero_optimization"] = {**config.get("zero_optimization", {}), "reduce_bucket_size": bucket_numel}
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    size, heldout = engine.train_micro_batch_size_per_gpu(), loop.text.heldout
    batch = stack([heldout[(dist.get_rank() * size + i) % len(heldout)] for i in range(size)])
    with gradient_peak(engine) as peak:
        train_step(engine, [batch] * engine.gradient_accumulation_steps())
    return from_all_ranks(with_peak(model_state_bytes(engine), peak.nbytes))
