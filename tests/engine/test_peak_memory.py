"""Of the full model no rank holds more than a part at a time, but for the one that is asked for its weights."""

import pytest

from tests.engine.cases import build_model

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("what", ["evaluate_full", "full_state_dict"])
def test_the_full_model_is_never_held_whole(ranks4, what, stage):
    raised = ranks4.run("tests.engine.face_cases:peak_of", timeout=120, what=what, stage=stage, model=SIZES)
    model = build_model(model=SIZES, meta=True)
    whole, layer = (2 * sum(p.numel() for p in part.parameters()) for part in (model, model.model.layers[0]))
    if what == "full_state_dict":
        assert raised.pop(0) > whole, "rank 0 holds it: this is what the others would be seen to take"
    # 2 to 4 layers at any depth: collectives and the allocator keep buffers.
    assert max(raised) < whole / 2 + layer
