"""Documents in one sequence, on the real model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from deepspeed_sdp.data.separation import check_reset, packed_example, separate_documents
from deepspeed_sdp.errors import ConfigError

STARTS = np.array([0, 7, 15])
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32),
}  # fmt: skip


def batch(reset):
    """Two sequences of other documents."""
    draw = np.random.default_rng(0)
    starts = [STARTS, np.array([4])]
    examples = [packed_example(draw.integers(0, 97, 20), place, reset) for place in starts]
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_document_in_a_pack_is_as_alone_under_attention_reset_only(family, attention):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention).eval()
    logits, alone = {}, {}
    for reset in ("none", "positions", "attention"):
        separate_documents(model.config, reset, 2)
        with torch.no_grad():
            logits[reset] = model(**batch(reset)).logits
            alone = model(input_ids=batch("none")["input_ids"][:1, 7:15]).logits[0]
    assert (logits["attention"][0, 7:15] - alone).abs().max() < 1e-5
    assert (logits["attention"][:, :4] - logits["none"][:, :4]).abs().max() < 1e-5
    for one, other in (("none", "attention"), ("positions", "attention"), ("none", "positions")):
        assert (logits[one][0, 7:15] - logits[other][0, 7:15]).abs().max() > 1e-4


def test_positions_restart_and_first_tokens_are_predicted_from_their_document_only():
    rows = {reset: batch(reset) for reset in ("none", "positions", "attention")}
    assert set(rows["none"]) == {"input_ids", "labels"}
    assert rows["positions"]["attention_mask"].all()
    for reset in ("positions", "attention"):
        assert rows[reset]["position_ids"].tolist() == [
            [*range(7), *range(8), *range(5)], [*range(4), *range(16)],
        ]  # fmt: skip
    assert (rows["attention"]["labels"] == -100).nonzero().tolist() == [[0, 0], [0, 7], [0, 15], [1, 4]]
    for reset in ("none", "positions"):
        assert (rows[reset]["labels"] == rows[reset]["input_ids"]).all()


def test_what_cannot_be_separated_is_refused():
    with pytest.raises(ConfigError, match=r"data\.document_reset: got 'all'; takes none, positions, attention"):
        check_reset("all")
    config = LlamaConfig(attn_implementation="flash_attention_2")
    separate_documents(config, "attention", 1)
    with pytest.raises(ConfigError, match="flash_attention_2 and micro-batches of 2"):
        separate_documents(config, "attention", 2)
