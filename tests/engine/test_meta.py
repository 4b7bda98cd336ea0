"""Training a model built on the meta device is training the full model with the values it draws."""

import pytest
import torch

from tests.engine.cases import build_model
from tests.support.compare import assert_like, assert_owners_equal, simulate

ROWS = [
    pytest.param({"ds": {"stage": 2, "bucket": 4000}, "sdp": {"coverage": 0.5}}, id="half"),
    pytest.param(
        {"ds": {"stage": 1}, "sdp": {"coverage": 0.75, "plan": {"seed": 3}}, "family": "qwen2"}, id="chunked-qwen2"
    ),
    pytest.param(
        {
            "ds": {"stage": 0, "clip": 1.0},
            "sdp": {"num_subnetworks": 2},
            "family": "qwen3",
            "model": {"num_key_value_heads": 1, "tie_word_embeddings": True},
        },
        id="replicas-absent-tied-qwen3",
    ),
]


@pytest.mark.parametrize("values", ROWS)
def test_training_from_meta_equals_the_simulation(ranks4, values):
    start = ranks4.run("tests.engine.cases:train", timeout=60, meta=True, **{**values, "steps": 0})
    assert_owners_equal(start)
    module = build_model(values.get("family", "llama"), values.get("model"))
    module.load_state_dict(start[0]["full"])
    results = ranks4.run("tests.engine.cases:train", timeout=60, meta=True, **values)
    assert_owners_equal(results)
    arguments = {key: values[key] for key in ("sdp", "ds")}
    assert_like(results, simulate(results[0], module=module, **arguments))


def test_the_start_does_not_depend_on_the_plan(ranks4, pools):
    first = ranks4.run("tests.engine.cases:train", timeout=60, meta=True, steps=0, sdp={"coverage": 0.5})[0]["full"]
    dense = ranks4.run("tests.engine.cases:train", timeout=60, meta=True, steps=0, sdp={"coverage": 1.0})[0]["full"]
    three = pools(3).run("tests.engine.cases:train", timeout=90, meta=True, steps=0, sdp={"coverage": "2/3"})[0]["full"]
    for name, value in first.items():
        assert torch.equal(value, dense[name]), name
        assert torch.equal(value, three[name]), name
