"""Tiny models of the Llama family."""

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

# Families whose configs know other sizes; what they have no word for is left out.
OTHERS = {
    "gemma": (GemmaConfig, GemmaForCausalLM),
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}
# dropout, which would differ from rank to rank
QUIET = {"gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 53,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def tiny_config(family="llama", **sizes):
    sizes = {**SIZES, **sizes}
    if family == "gpt2":
        sizes["n_inner"] = sizes["intermediate_size"]
    if family in ("gpt2", "gpt_neox"):
        for name in ("num_key_value_heads", "head_dim", "attention_dropout"):
            sizes.pop(name, None)
    return {**FAMILIES, **OTHERS}[family][0](**sizes, **QUIET.get(family, {}))


def tiny_model(family="llama", seed=0, meta=False, **sizes):
    config = tiny_config(family, **sizes)
    torch.manual_seed(seed)
    if meta:
        with torch.device("meta"):
            return {**FAMILIES, **OTHERS}[family][1](config)
    model = {**FAMILIES, **OTHERS}[family][1](config)
    with torch.no_grad():  # biases and norms that are not at their initial values show more mistakes
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def token_batches(steps, ranks, micro_batches=1, batch=2, length=12, vocab=97, seed=1):
    """``[step][rank][micro-batch]`` -> ids ``[batch, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            [torch.randint(0, vocab, (batch, length), generator=generator) for _ in range(micro_batches)]
            for _ in range(ranks)
        ]
        for _ in range(steps)
    ]
