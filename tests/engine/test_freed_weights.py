"""A weight that ZeRO-3 has freed is an error in words for whoever reads it, and never memory that is not there."""

import math

import pytest

from tests.engine.freed_cases import READS


@pytest.mark.parametrize("offload", [False, True])
def test_a_read_between_steps_is_an_error_in_words(ranks4, offload):
    results = ranks4.run("tests.engine.freed_cases:read_between_steps", sdp={"coverage": 0.5}, offload=offload)
    for result in results:
        answers = result["answers"]
        for name in (*READS, "destroyed"):
            assert "engine.gathered_weights(layer)" in answers[name], (name, answers[name])
        assert answers["collective"] != "read", answers["collective"]
        assert answers["inside"] > 0
        assert answers["view"]
        seen = result["seen"]
        described = {"shape": [97, 32], "numel": 97 * 32, "dtype": "torch.float32", "gradient": None}
        assert described.items() <= seen.items()
        assert seen["trains"] == seen["parameter"] == seen["same"] is True
        assert "gathered_weights" in seen["repr"]
        assert all(math.isfinite(loss) for loss in result["after"]["losses"])
