"""Memory within 5 % of what real ranks allocate, peak included, and bytes sent within 5 % of what they send."""

import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepspeed_sdp import SDPConfig
from deepspeed_sdp.estimate import Estimator, Job
from deepspeed_sdp.estimate.buckets import make_layout
from deepspeed_sdp.estimate.gpu import Cluster, find_gpu
from deepspeed_sdp.estimate.sdp_engine import EngineStep
from deepspeed_sdp.estimate.trace import trace
from deepspeed_sdp.estimate.worker_model import worker_model

MODEL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "use_cache": False,
}
# Small beside the model, as in a real job: what is under way, and how long gloo's threads hold it, weighs little then.
BUCKET = 100_000
UNITS = {"neuron": {}, "layer": {"granularity": "layer"}, "branch": {"granularity": "branch"}}
OVERLAPPED = {
    "coverage": 0.5,
    "masking": "backward",
    "backward": {"overlap_refresh": True},
}
SHAPES = {"activations": (4, 128), "state": (1, 16)}  # what weighs most


def ds_config(stage, batch, accumulation=1, precision="bf16"):
    config = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    }
    return config if precision == "fp32" else {**config, precision: {"enabled": True}}


def estimate(stage, sdp, shape, checkpointing=False, accumulation=1, precision="bf16"):
    batch, length = SHAPES[shape]
    with torch.device("meta"):
        full = LlamaForCausalLM(LlamaConfig(**MODEL))
    job = Job(
        4,
        stage,
        None if sdp is None else SDPConfig.parse(sdp),
        torch.bfloat16 if precision == "bf16" else torch.float32,
        batch,
        length,
        accumulation,
        checkpointing,
        step_temporaries=2,
        bucket=BUCKET,
        gather_bucket=BUCKET,
        backend="gloo",
    )
    return Estimator(full, Cluster(find_gpu("cpu"))).estimate(job), job, full


def measured_peak(measured, sdp):
    """The heaviest rank's; without SDP all hold the same, and half are free of what gloo's threads keep too long."""
    peaks = [of_rank["peak"] for of_rank in measured]
    return max(peaks) if sdp is not None else statistics.median_low(peaks)


def check(ranks4, stage, sdp, shape, checkpointing=False, accumulation=1, precision="bf16", tolerance=0.05):
    batch, length = SHAPES[shape]
    measured = ranks4.run(
        "tests.estimate.cases:measure",
        timeout=120,
        config=MODEL,
        ds=ds_config(stage, batch, accumulation, precision),
        sdp=sdp,
        batch=batch,
        length=length,
        checkpointing=checkpointing,
    )
    expected, job, full = estimate(stage, sdp, shape, checkpointing, accumulation, precision)
    assert expected.peak == pytest.approx(measured_peak(measured, sdp), rel=tolerance)
    if stage < 3:
        # At stage 3 weights that come and go look like activations to the measurement.
        assert expected.kept_activations == pytest.approx(max(of_rank["activations"] for of_rank in measured), rel=0.05)
    if sdp is not None:
        sent = max(of_rank["sent"] for of_rank in measured)
        assert sum(expected.sent.values()) == pytest.approx(sent, rel=0.05)
        model = worker_model(full, job.dtype, job.sdp, expected.plan, 0)
        step = EngineStep(job, model, expected.plan, make_layout(model, expected.plan, job), False)
        state = step.ledger.now
        assert state["weights"] == pytest.approx(measured[0]["weights"], rel=0.01)
        assert state["optimizer"] == pytest.approx(measured[0]["optimizer"], rel=0.01)
        # The engine does not count what gloo copies besides.
        gradients = step.run(trace(model, batch, length, checkpointing)).largest_gradients
        assert gradients == pytest.approx(measured[0]["gradients"], rel=0.15)


@pytest.mark.parametrize(
    ("stage", "sdp", "shape"),
    [
        # What gloo's threads hold too long on loaded cores weighs nothing here.
        (0, {"coverage": 0.5}, "activations"),
        pytest.param(1, {"coverage": 0.5}, "activations", marks=pytest.mark.slow),
        pytest.param(3, {"coverage": 0.75}, "state", marks=pytest.mark.slow),
        pytest.param(1, {"coverage": 0.5, "masking": "backward"}, "state", marks=pytest.mark.slow),
        (0, OVERLAPPED, "state"),
    ],
    ids=["zero0", "forward", "zero3", "backward", "overlapped"],
)
def test_beside_real_ranks(ranks4, stage, sdp, shape):
    check(ranks4, stage, sdp, shape)


GRID = [
    (masking, unit, stage, shape)
    for masking in ("forward", "backward")
    for unit in UNITS
    for stage in range(4)
    for shape in SHAPES
    if not (masking == "backward" and stage == 3)
]


@pytest.mark.slow
@pytest.mark.parametrize(("masking", "unit", "stage", "shape"), GRID)
def test_every_strategy(ranks4, masking, unit, stage, shape):
    check(ranks4, stage, {"coverage": 0.5, "masking": masking, **UNITS[unit]}, shape)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_plain_deepspeed(ranks4, stage, shape, precision):
    # Its ZeRO-3 keeps some of what it gathered from step to step, more or less by chance.
    check(ranks4, stage, None, shape, precision=precision, tolerance=0.2 if stage == 3 else 0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sdp", "changes"),
    [
        (1, {"coverage": 0.5}, {"checkpointing": True}),
        (3, {"coverage": 0.5}, {"checkpointing": True}),
        (2, {"coverage": 0.25}, {"checkpointing": True}),
        (1, None, {"checkpointing": True}),
        (1, {"coverage": 0.5}, {"accumulation": 2}),
        (2, {"coverage": 0.5}, {"accumulation": 2}),
        (3, {"coverage": 0.5}, {"accumulation": 2}),
        (0, {"coverage": 0.5}, {"precision": "fp32"}),
        (2, {"coverage": 0.5}, {"precision": "fp32"}),
        (
            1,
            {
                "coverage": 0.5,
                "masking": "backward",
                "granularity": "layer",
                "backward": {"recompute_frozen": True},
            },
            {},
        ),
        (1, {"coverage": 0.5, "num_subnetworks": 2}, {}),
        (0, OVERLAPPED, {}),
        (1, OVERLAPPED, {}),
        (2, {**OVERLAPPED, "granularity": "layer"}, {}),
        (1, OVERLAPPED, {"accumulation": 2}),
        (1, OVERLAPPED, {"checkpointing": True}),
        (1, {"coverage": 0.5, "masking": "backward"}, {"checkpointing": True}),
        (1, {"coverage": 0.5, "granularity": "layer"}, {"checkpointing": True}),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_other_settings(ranks4, stage, sdp, changes, shape):
    check(ranks4, stage, sdp, shape, **changes)
