"""Documents packed into one sequence do not see each other, in training and in the full model's loss."""

import pytest
import torch

from deepspeed_sdp.data.separation import separate_documents
from tests.engine.cases import build_model
from tests.engine.packed_cases import packed_batch

SDP = {
    "forward": {"coverage": 0.5},
    "backward": {"coverage": 0.5, "masking": "backward"},
    "blocks": {"coverage": 0.5, "granularity": "layer"},
}


@pytest.mark.parametrize("masking", ["forward", "backward", "blocks"])
def test_the_engine_does_as_the_exported_model(ranks4, masking):
    case = "tests.engine.packed_cases:train_packed"
    results = ranks4.run(case, timeout=90, reset="attention", sdp=SDP[masking])
    exported = build_model("llama").eval()
    exported.load_state_dict(results[0]["full"])
    separate_documents(exported.config, "attention", 2)
    total = count = crossed = 0.0
    for rank in range(4):
        batch = packed_batch(100 + rank, "attention")
        predicted = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += predicted * float(exported(**batch).loss)
            crossed += predicted * float(exported(input_ids=batch["input_ids"], labels=batch["labels"]).loss)
        count += predicted
    assert [result["value"] for result in results] == pytest.approx([total / count] * 4, abs=1e-5)
    assert abs(crossed - total) / count > 1e-4
    recomputed = ranks4.run(case, timeout=90, reset="attention", sdp=SDP[masking], checkpointing=True)
    for one, other in zip(results, recomputed, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], abs=1e-6)
        assert one["value"] == pytest.approx(other["value"], abs=1e-5)
