"""Comparing strategies: what is compared, and that what must hold between them does."""

from dataclasses import replace

import pytest
import torch

from deepspeed_sdp import ConfigError, SDPConfig
from deepspeed_sdp.estimate import (
    Estimator,
    Job,
    best_stages,
    choice_of,
    compare,
    name_of,
    ranked,
    strategies,
    to_table,
)
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


def test_communicators_take_room_where_nccl_makes_them(estimator):
    def estimate(**keys):
        return estimator.estimate(Job(**{"world_size": 8, "sdp": sdp(), **keys}))

    one = estimate()
    # Every layer splits the workers into two halves, and every worker is in one of each.
    assert one.communicators == one.to_json()["communicators"] == len(one.plan.owner_sets) // 2 + 2
    assert estimate(sdp=sdp(coverage=0.125)).communicators == 2
    assert estimate(world_size=16).communicators == one.communicators + 3
    # Of a worker's eight ranks in each of eight nodes.
    assert estimate(world_size=512).communicators == one.communicators + 5
    assert estimate(sdp=None).communicators == 0
    assert one.fits
    tight = Cluster(find_gpu("h100", memory_gb=one.peak / 1e9 + 0.001), reserved=0)
    assert not Estimator(estimator.full, tight).estimate(one.job).fits
    assert Estimator(estimator.full, tight).estimate(replace(one.job, backend="gloo", bucket=25_000_000)).fits


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


@pytest.fixture(scope="module")
def choices(estimator):
    """On a GPU on which some fit, some with activation checkpointing alone, and some not at all."""
    small = Estimator(estimator.full, Cluster(find_gpu("h100", memory_gb=1.9), reserved=0, communicator=0))
    jobs = strategies(Job(8), 8, stages=(0, 1), coverages=(0.25, 0.5), granularities=("neuron",))
    found, refused = compare(small, jobs)
    assert not refused
    return found


def test_table_says_both_and_what_does_not_fit(choices):
    assert len(best_stages(choices)) == 2 + 4
    table = to_table(choices, own=choices[:1])
    head, first, *_ = lines = table.splitlines()
    assert first.startswith("> DeepSpeed")
    assert len(lines) == 1 + 1 + len(choices)
    assert head.index(" peak") < head.index("ckpt peak")
    verdicts = {"" if c.variants[0].fits else "fits with checkpointing" if c.fits else "does not fit" for c in choices}
    assert verdicts == {"", "fits with checkpointing", "does not fit"}
    for choice, line in zip(choices, lines[2:], strict=True):
        said = [v for v in verdicts - {""} if line.endswith(v)]
        assert said == (
            [] if choice.variants[0].fits else ["fits with checkpointing" if choice.fits else "does not fit"]
        )
        assert f"{choice.variants[0].peak / 1e9:.2f}" in line
        assert f"{choice.variants[1].peak / 1e9:.2f}" in line
    assert "*" in table


def test_what_fits_comes_first_and_the_quickest_first(choices):
    order = ranked(choices)
    fits = [choice.fits for choice in order]
    assert fits == sorted(fits, reverse=True)
    times = [choice.best.time.total for choice in order if choice.fits]
    assert times == sorted(times)
    assert all(choice.best.fits for choice in order if choice.fits)
    peaks = [choice.best.peak for choice in order if not choice.fits]
    assert peaks == sorted(peaks)


def test_activation_checkpointing_takes_less_memory_and_more_time(choices):
    for choice in choices:
        plain, checkpointed = choice.variants
        assert (plain.job.checkpointing, checkpointed.job.checkpointing) == (False, True)
        assert checkpointed.kept_activations < plain.kept_activations
        assert checkpointed.peak <= plain.peak
        assert checkpointed.time.total > plain.time.total


def test_all_strategies_reduce_in_pieces_of_the_same_size():
    for bucket, backend, expected in ((None, "nccl", 25_000_000), (None, "gloo", 5_000_000), (1_000, "nccl", 1_000)):
        jobs = list(strategies(Job(8, bucket=bucket, backend=backend), 8))
        assert {job.bucket for job in jobs} == {expected}
        assert {job.sdp is None for job in jobs} == {True, False}


def test_coverages_that_were_asked_for_are_not_left_out_in_silence():
    with pytest.raises(ConfigError, match=r"coverage: got 0\.3 with 8 subnetworks"):
        list(strategies(Job(8), 8, coverages=(0.5, 0.3)))


def test_what_overlap_refresh_holds_until_the_next_forward_pass_is_counted(estimator):
    def of(stage, **keys):
        block, bf16 = sdp(masking="backward", **keys), torch.bfloat16
        job = Job(8, stage, block, seq_length=128, gather_bucket=2_000_000, reduce=bf16)
        return estimator.estimate(job)

    waits, overlaps = of(0), of(0, backward={"overlap_refresh": True})
    # Averages are gone when weights travel: as much may be under way instead of two portions, the last one besides.
    averages = 2 * overlaps.plan.owned_numel(0)
    assert waits.largest["buffers"] < overlaps.largest["buffers"] < averages + waits.largest["buffers"]
    assert overlaps.peak > waits.peak
    # At ZeRO-1 an eighth of them is less than two portions, which may be under way in any case.
    assert of(1, backward={"overlap_refresh": True}).largest["buffers"] == of(1).largest["buffers"]
    assert of(1, backward={"overlap_refresh": True}).time.total < of(1).time.total
    assert overlaps.sent == waits.sent


def test_gpus_are_data():
    assert {"h100", "h200", "a100-80", "a100-40", "l40s", "rtx4090", "v100", "b200", "cpu"} <= set(gpu_names())
    for name in gpu_names():
        gpu = find_gpu(name)
        assert gpu.memory > 1e9
        assert all(gpu.flops(dtype) > 0 for dtype in (torch.bfloat16, torch.float16, torch.float32))
    assert find_gpu("H100", memory_gb=94, tflops=500).flops(torch.float32) == 5e14
    with pytest.raises(ConfigError, match="--gpu: got tpu; takes one of"):
        find_gpu("tpu")


def test_one_job_both_ways(estimator):
    choice = choice_of(estimator, Job(8, 1, {"num_subnetworks": 8, "coverage": "1/2"}))
    assert [variant.job.checkpointing for variant in choice.variants] == [False, True]
    assert choice.job.sdp == sdp()


def test_a_job_s_own_settings():
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1e6, "offload_optimizer": {"device": "cpu"}},
        "subnetwork_data_parallel": {"coverage": 0.25, "num_subnetworks": 4},
    }
    job = job_of(config, Job(8, accumulation=3))
    assert (job.stage, job.micro_batch, job.accumulation, job.bucket) == (2, 6, 3, 1_000_000)
    assert (job.accumulate_dtype, job.reduce_dtype) == (torch.float32, torch.float32)
    assert (job.offload_optimizer, job.moments, job.step_temporaries) == (True, 2, 2)
    assert job.sdp == SDPConfig(coverage=0.25, num_subnetworks=4)
    for wrong, message in (
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage: got 7; takes 0 to 3"),
        ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu: got 0; takes a number from 1 on"),
        ({"communication_data_type": "int4"}, "communication_data_type: got 'int4'; takes one of fp32"),
    ):
        with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
            job_of(wrong, Job(8))
