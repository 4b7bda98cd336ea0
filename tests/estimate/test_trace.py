"""What a traced pass says lives, beside real passes in one process."""

import pytest
import torch
from torch import nn

from deepspeed_sdp import SDPConfig
from deepspeed_sdp.engine.zero.freed_weight import FreedWeight, nothing_of
from deepspeed_sdp.estimate.trace import trace
from deepspeed_sdp.estimate.worker_model import worker_model
from deepspeed_sdp.report.saved_activations import saved_activations
from deepspeed_sdp.subnetwork import cut_model, plan_for
from tests.support.models import tiny_model

SIZES = {"intermediate_size": 64, "num_hidden_layers": 5, "hidden_size": 64, "head_dim": 8, "vocab_size": 193}
BATCH, LENGTH = 2, 48
CASES = {
    "dense": None,
    "forward": {"plan": {"chunk_multiple": 8}},
    "backward": {"plan": {"chunk_multiple": 8}, "masking": "backward"},
    "forward blocks": {"granularity": "branch"},
    "backward blocks": {"granularity": "layer", "masking": "backward"},
    "recomputed": {
        "granularity": "layer",
        "masking": "backward",
        "backward": {"recompute_frozen": True},
    },
}


def kept(moments):
    return next(moment.live for moment in moments if moment.kind == "loss")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        pytest.param("gpt2", marks=SLOW),
        pytest.param("gpt_neox", marks=SLOW),
        pytest.param("qwen3", marks=SLOW),
    ],
)
@pytest.mark.parametrize("case", CASES)
def test_what_autograd_keeps(family, case):
    sdp = None if CASES[case] is None else SDPConfig.parse({"num_subnetworks": 4, "coverage": 0.5, **CASES[case]})
    full = tiny_model(family, meta=True, **SIZES)
    plan = plan_for(full, sdp, 4) if sdp else None
    model = tiny_model(family, **SIZES).to(torch.bfloat16)
    model.config.use_cache = False
    worker = 3 if sdp else 0
    if sdp:
        cut_model(
            model,
            plan,
            worker,
            masking=sdp.masking,
            block_unit=sdp.block_unit,
            recompute_frozen=sdp.backward.recompute_frozen,
            output_scaling="none" if sdp.masking == "backward" else sdp.output_scaling,
        )
    ids = torch.randint(0, 193, (BATCH, LENGTH))
    model.train()
    with saved_activations(model) as saved:
        loss = model(input_ids=ids, labels=ids).loss
    traced = worker_model(full, torch.bfloat16, sdp, plan, worker)
    moments = trace(traced, BATCH, LENGTH)
    # Position tables and the ids themselves are a few hundred bytes.
    assert kept(moments) == pytest.approx(saved.total, rel=0.02)
    loss.backward()
    trained = {name: p.numel() for name, p in model.named_parameters() if p.grad is not None}
    assert {
        m.weight: w.numel for m in moments if m.kind == "gradient" for w in traced.trained if w.local == m.weight
    } == trained


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_alike_are_told_for_each_other(checkpointing):
    # A worker of a plan with few alike layers, once with stand-ins and once with every layer traced.
    shallow, deep = (
        trace(
            worker_model(tiny_model(meta=True, **{**SIZES, "num_hidden_layers": n}), torch.float32),
            BATCH,
            LENGTH,
            checkpointing,
        )
        for n in (2, 6)
    )
    middle = trace(
        worker_model(tiny_model(meta=True, **{**SIZES, "num_hidden_layers": 4}), torch.float32),
        BATCH,
        LENGTH,
        checkpointing,
    )
    assert kept(deep) - kept(middle) == kept(middle) - kept(shallow) > 0
    assert max(m.peak for m in deep) > max(m.peak for m in middle)
    assert len({m.weight for m in deep if m.weight}) == len([m for m in deep if m.weight]) == 6 * 9 + 3
    assert deep[-1].live < 64


def test_checkpointing_keeps_a_layer_s_input_alone():
    full = tiny_model(meta=True, **SIZES)
    less, more = (kept(trace(worker_model(full, torch.float32), BATCH, LENGTH, flag)) for flag in (True, False))
    inputs = 5 * BATCH * LENGTH * 64 * 4
    assert inputs < less < inputs + 4 * BATCH * LENGTH * (2 * 193 + 3 * 64) < more


def test_what_is_measured_reads_no_weight_that_is_not_there():
    model = nn.Linear(3, 3)
    model.weight.data = nothing_of(model.weight)
    model.weight.__class__ = FreedWeight
    with saved_activations(model) as saved:
        pass
    assert saved.total == 0
