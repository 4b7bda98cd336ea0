"""evaluate_full is the exported model's loss, and leaves no trace in the training."""

import pytest
import torch

from tests.engine.cases import build_model
from tests.engine.face_cases import evaluation_batches

ROWS = [
    pytest.param({"counts": [2, 2, 2, 2]}, id="equal_counts"),
    pytest.param(
        {"counts": [3, 0, 1, 5], "ignored": True, "ds": {"stage": 2, "bucket": 4000}}, id="unequal-ignored_labels"
    ),
    pytest.param({"counts": [0, 0, 0, 35]}, id="more_than_a_sweep-one_rank"),
    pytest.param(
        {"counts": [1, 2, 1, 2], "family": "qwen3", "model": {"num_key_value_heads": 1}}, id="absent_attention"
    ),
    pytest.param(
        {"counts": [1, 1, 2, 1], "family": "qwen2", "model": {"tie_word_embeddings": True}, "padding": True},
        id="tied-padding",
    ),
    pytest.param({"counts": [2, 1, 1, 1], "sdp": {"coverage": 0.75}, "train": False}, id="chunked-eval_mode"),
    pytest.param({"counts": [2, 1, 1, 1], "sdp": {"num_subnetworks": 2}, "ds": {"stage": 0}}, id="replicas"),
    pytest.param({"counts": [2, 0, 1, 3], "ds": {"stage": 3}}, id="stage3"),
    pytest.param(
        {
            "counts": [1, 2, 1, 1],
            "ds": {"stage": 3},
            "sdp": {"granularity": "layer"},
            "model": {"tie_word_embeddings": True, "num_hidden_layers": 4},
        },
        id="stage3-tied-blocks",
    ),
    pytest.param({"counts": [2, 1, 1, 1], "family": "mistral", "model": {"sliding_window": 4}}, id="sliding_window"),
]


@pytest.mark.parametrize("values", ROWS)
def test_it_is_the_exported_models_loss(ranks4, values):
    results = ranks4.run("tests.engine.face_cases:evaluate", timeout=90, **values)
    exported = build_model(values.get("family", "llama"), values.get("model"))
    exported.load_state_dict(results[0]["full_then"])
    exported.eval()
    total, tokens = 0.0, 0
    for rank in range(4):
        for batch in evaluation_batches(rank, values["counts"], values.get("ignored", False)):
            if values.get("padding"):
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                batch["attention_mask"][:, -2:] = 0
                batch["labels"][:, -2:] = -100
            count = int((batch["labels"][:, 1:] != -100).sum())
            if count:
                with torch.no_grad():
                    total += count * float(exported(**batch).loss)
                tokens += count
    undisturbed = ranks4.run("tests.engine.face_cases:evaluate", timeout=90, **{**values, "evaluations": 0})
    for result, calm in zip(results, undisturbed, strict=True):
        assert result["values"] == pytest.approx([total / tokens] * 2, abs=1e-5)
        assert result["values"] == results[0]["values"]
        assert result["training"] == {values.get("train", True)}
        assert result["same_modules"]
        assert result["losses"] == calm["losses"]
        assert result["norms"] == calm["norms"]
        assert all(torch.equal(value, calm["owned"][name][1]) for name, (_, value) in result["owned"].items())


def test_in_bf16_too(ranks4):
    values = {"counts": [1, 2, 3, 1], "ds": {"stage": 2, "bf16": True}}
    results = ranks4.run("tests.engine.face_cases:evaluate", timeout=90, **values)
    exported = build_model().bfloat16()
    exported.load_state_dict(results[0]["full_then"])
    batches = [batch for rank in range(4) for batch in evaluation_batches(rank, values["counts"], False)]
    counts = [batch["labels"][:, 1:].numel() for batch in batches]
    with torch.no_grad():
        losses = [float(exported.eval()(**batch).loss) for batch in batches]
    mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert results[0]["values"] == pytest.approx([mean] * 2, abs=0.01)


def test_nothing_to_evaluate_is_said_on_every_rank(ranks4):
    messages = ranks4.run("tests.engine.face_cases:evaluate_nothing", timeout=60)
    assert set(messages) == {"evaluate_full: no rank brought a batch with something to predict"}


def test_where_one_rank_has_no_memory_for_all_weights_they_are_streamed_on_all(ranks4):
    for (gathered, one), (streamed, two) in ranks4.run(
        "tests.engine.face_cases:full_model_where_memory_is_short", timeout=60, short=100_000
    ):
        assert (gathered, streamed) == ("LlamaForCausalLM", "StreamedModel")
        assert one == pytest.approx(two, abs=1e-5)
