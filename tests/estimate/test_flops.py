"""FLOPs per token: by hand, and beside what torch counts in a real forward and backward pass."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from deepspeed_sdp import ConfigError, SDPConfig
from deepspeed_sdp.estimate import Job, flops_per_token
from deepspeed_sdp.presets import model_path
from deepspeed_sdp.subnetwork import cut_model, meta_model, plan_for, read_model_config
from tests.support.models import tiny_model

BATCH, LENGTH = 2, 24
SIZES = {"intermediate_size": 64, "num_hidden_layers": 4}


def test_llama_by_hand():
    model = meta_model(read_model_config(model_path("llama-8b-gqa", "--model")))
    hidden, kv, mlp, layers, vocab, length = 4096, 1024, 14336, 32, 128256, 4096
    linears = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp) + hidden * vocab
    attention = layers * 12 * hidden * length
    assert flops_per_token(model, length).dense == 6 * linears + attention
    sdp = SDPConfig(num_subnetworks=8, coverage=0.5)
    halved = flops_per_token(model, length, sdp)
    assert halved.dense == 6 * linears + attention
    assert halved.mean == pytest.approx(6 * hidden * vocab + (halved.dense - 6 * hidden * vocab) / 2)
    # Of every weight that is not owned, two FLOPs of six are saved.
    backward = flops_per_token(model, length, SDPConfig(num_subnetworks=8, coverage=0.5, masking="backward"))
    assert backward.mean == pytest.approx(halved.dense - (linears - hidden * vocab))


def counted(model):
    """What torch counts in a forward and backward pass, per token, but for the rotary tables."""
    ids = torch.randint(0, 97, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    rotary = sum(sum(n.values()) for name, n in counter.get_flop_counts().items() if name.endswith("rotary_emb"))
    return (counter.get_total_flops() - rotary) / (BATCH * LENGTH)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_full_model_beside_torch(family):
    model = tiny_model(family, **SIZES)
    model.set_attn_implementation("eager")
    assert counted(model) == pytest.approx(flops_per_token(model, LENGTH).dense, rel=1e-9)


UNITS = {
    "neuron": {"granularity": "neuron", "plan": {"chunk_multiple": 8}},
    "layer": {"granularity": "layer"},
    "branch": {"granularity": "branch"},
}


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("unit", UNITS)
def test_every_worker_beside_torch(masking, unit):
    sdp = SDPConfig(num_subnetworks=4, coverage=0.5, masking=masking, **UNITS[unit])
    plan = plan_for(tiny_model(meta=True, **SIZES), sdp, 4)
    estimated = flops_per_token(tiny_model(meta=True, **SIZES), LENGTH, sdp, plan)
    for worker in range(4):
        model = tiny_model(**SIZES)
        model.set_attn_implementation("eager")
        cut_model(model, plan, worker, masking=masking, block_unit=sdp.block_unit)
        assert counted(model) == pytest.approx(estimated.workers[worker], rel=1e-9)
    assert estimated.min <= estimated.mean <= estimated.max < estimated.dense


def test_tied_embeddings_and_shared_modules_count_for_everyone():
    model = tiny_model(meta=True, tie_word_embeddings=True, **SIZES)
    assert flops_per_token(model, LENGTH).dense == flops_per_token(tiny_model(meta=True, **SIZES), LENGTH).dense
    sdp = SDPConfig(num_subnetworks=4, coverage=0.5, shared_modules=("model.layers.0",))
    more, less = (flops_per_token(model, LENGTH, s) for s in (sdp, SDPConfig(num_subnetworks=4, coverage=0.5)))
    layers = more.dense - 6 * 97 * 32
    assert more.mean - less.mean == pytest.approx(layers / 4 / 2)
    assert flops_per_token(model, LENGTH, SDPConfig(enabled=False)).workers == ()


def test_bad_input_is_one_error():
    model = tiny_model(meta=True)
    with pytest.raises(ConfigError, match="seq_length: got 0"):
        flops_per_token(model, 0)
    with pytest.raises(ConfigError, match="num_subnetworks: got none"):
        flops_per_token(model, 8, SDPConfig())


def test_a_block_can_be_given_as_initialize_takes_it(tmp_path):
    model, block = tiny_model(meta=True, **SIZES), {"num_subnetworks": 4, "coverage": 0.5}
    (tmp_path / "sdp.json").write_text(json.dumps(block))
    expected = flops_per_token(model, LENGTH, SDPConfig.parse(block))
    for given in (block, tmp_path / "sdp.json", str(tmp_path / "sdp.json")):
        assert flops_per_token(model, LENGTH, given) == expected
        assert plan_for(model, given, 4).hash == plan_for(model, SDPConfig.parse(block), 4).hash
        assert Job(4, sdp=given) == Job(4, sdp=SDPConfig.parse(block))
