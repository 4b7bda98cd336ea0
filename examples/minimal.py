"""Four workers, each training half of a small LLaMA on random tokens.

DS_ACCELERATOR=cpu deepspeed --num_accelerators 4 examples/minimal.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deepspeed_sdp

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}

with torch.device("meta"):  # no memory yet: every rank is given that of its subnetwork
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=4))

engine, *_ = deepspeed_sdp.initialize(model=model, config=DS_CONFIG, sdp_config={"coverage": 0.5})

for _ in range(10):
    ids = torch.randint(0, 256, (2, 32), device=engine.device)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()

engine.calibrate([{"input_ids": ids, "labels": ids}])  # the full model, on text that was trained on
print(f"rank {engine.global_rank}: loss {engine.evaluate_full([{'input_ids': ids, 'labels': ids}]):.3f}")
engine.save_hf("runs/minimal")  # the full model, an ordinary HuggingFace folder
