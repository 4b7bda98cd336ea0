"""Comparing strategies: what is compared, and that what must hold between them does."""

import pytest
import torch

from deepspeed_sdp import ConfigError, SDPConfig
from deepspeed_sdp.estimate import Estimator, Job, best_stages, compare, name_of, strategies, to_table
from deepspeed_sdp.estimate.gpu import Cluster, find_gpu, gpu_names
from deepspeed_sdp.estimate.job_file import job_of
from deepspeed_sdp.estimate.step_time import step_time
from deepspeed_sdp.presets import model_path
from deepspeed_sdp.subnetwork import meta_model, read_model_config

CLUSTER = Cluster(find_gpu("h100"))


@pytest.fixture(scope="module")
def estimator():
    return Estimator(meta_model(read_model_config(model_path("llama-134m", "--model"))), CLUSTER)


def sdp(**keys):
    return SDPConfig(**{"num_subnetworks": 8, "coverage": 0.5, **keys})


def test_every_combination_that_the_engine_takes():
    jobs = list(strategies(Job(8), 8))
    assert len(jobs) == 4 + 2 * 5 * 4 + 2 * 5 * 3
    assert len({(name_of(job), job.stage) for job in jobs}) == len(jobs)
    # Of four workers only quarters are whole.
    assert len(list(strategies(Job(4), 4))) == 4 + 2 * 3 * 4 + 2 * 3 * 3


def test_state_follows_coverage_stage_and_ranks(estimator):
    def peak(**keys):
        return estimator.estimate(Job(**{"world_size": 8, "sdp": sdp(), "micro_batch": 2, **keys}))

    # A small bucket: DeepSpeed's own is larger than this model.
    dense = [estimator.estimate(Job(8, stage, bucket=10_000_000)) for stage in range(3)]
    assert dense[0].peak > dense[1].peak >= dense[2].peak
    assert peak(sdp=sdp(coverage=0.25)).peak < peak().peak < peak(sdp=sdp(coverage=0.75)).peak
    assert peak(stage=3).memory["optimizer"] < peak(stage=0).memory["optimizer"]
    assert peak(world_size=4096).memory["optimizer"] < peak().memory["optimizer"] / 100
    assert peak(offload_optimizer=True).memory["optimizer"] == 0 < peak(offload_optimizer=True).host
    less, more = peak(checkpointing=True), peak()
    assert less.kept_activations < more.kept_activations / 2
    assert more.step_flops < less.step_flops < 4 / 3 * more.step_flops


def test_traffic_by_hand(estimator):
    numel = sum(parameter.numel() for parameter in estimator.full.parameters())
    ring = 2 * numel * 7 / 8
    assert estimator.estimate(Job(8, 0)).sent == {"gradients": 2 * ring}
    assert sum(estimator.estimate(Job(8, 3)).sent.values()) == pytest.approx(3 * ring)
    # Every shard is sent to the other ranks: what is not owned arrives once on each.
    refresh = estimator.estimate(Job(8, 1, sdp(masking="backward"))).sent["weight_refresh"]
    plan = estimator.estimate(Job(8, 1, sdp(masking="backward"))).plan
    assert refresh == pytest.approx(2 * plan.total_numel * 7 / 8, rel=0.03)


def test_step_time_is_a_roofline():
    job = Job(8, 1)
    flops = 989e12 * 0.4
    assert step_time(job, CLUSTER, flops, 0, {}).total == pytest.approx(1.0)
    hidden = step_time(job, CLUSTER, flops, 0, {"gradients": 450e9 * 0.5})
    assert hidden.communication == pytest.approx(0.5)
    assert hidden.exposed == pytest.approx(0.05)
    assert step_time(job, CLUSTER, flops, 0, {"weight_gather": 450e9}).exposed == pytest.approx(1.0)
    across_nodes = step_time(Job(16, 1), CLUSTER, flops, 0, {"gradients": 450e9 * 0.5})
    assert across_nodes.communication == pytest.approx(0.5 * 450 / 50)
    assert step_time(job, CLUSTER, 0, 3.35e12 / 30, {}).update == pytest.approx(1.0)


def test_table_names_the_best_and_what_does_not_fit(estimator):
    cluster = Cluster(find_gpu("h100", memory_gb=3), reserved=0)
    small = Estimator(estimator.full, cluster)
    jobs = list(strategies(Job(8, micro_batch=2), 8, stages=(0, 1), coverages=(0.25, 0.5), granularities=("neuron",)))
    estimates, refused = compare(small, jobs)
    assert not refused
    assert len(best_stages(estimates)) == 2 + 4
    table = to_table(estimates, own=estimates[:1])
    assert table.splitlines()[1].startswith("> DeepSpeed")
    assert len(table.splitlines()) == 1 + 1 + len(estimates)
    assert "does not fit" in table
    assert "*" in table


def test_gpus_are_data():
    assert {"h100", "h200", "a100-80", "a100-40", "l40s", "rtx4090", "v100", "b200", "cpu"} <= set(gpu_names())
    for name in gpu_names():
        gpu = find_gpu(name)
        assert gpu.memory > 1e9
        assert all(gpu.flops(dtype) > 0 for dtype in (torch.bfloat16, torch.float16, torch.float32))
    assert find_gpu("H100", memory_gb=94, tflops=500).flops(torch.float32) == 5e14
    with pytest.raises(ConfigError, match="--gpu: got tpu; takes one of"):
        find_gpu("tpu")


def test_a_job_s_own_settings():
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6, "offload_optimizer": {"device": "cpu"}},
        "subnetwork_data_parallel": {"coverage": 0.25, "num_subnetworks": 4},
        "pretraining": {"model": "llama-1b", "seq_length": 512, "unknown": 1},
    }
    job = job_of(config, Job(8, accumulation=3))
    assert (job.stage, job.micro_batch, job.accumulation, job.seq_length, job.bucket) == (2, 6, 3, 512, 1_000_000)
    assert (job.accumulate_dtype, job.reduce_dtype) == (torch.float32, torch.bfloat16)
    assert (job.offload_optimizer, job.moments, job.step_temporaries) == (True, 2, 2)
    assert job.sdp == SDPConfig(coverage=0.25, num_subnetworks=4)
    for wrong, message in (
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: got 7; takes 0 to 3"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu: got 0; takes a number from 1 on"),
        ({"communication_data_type": "int4"}, "communication_data_type: got 'int4'; takes one of fp32"),
    ):
        with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
            job_of(wrong, Job(8))
