"""A training loop with accelerate. The line that SDP adds is ``enable()``.

accelerate launch --config_file ds_configs/accelerate.yaml examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator, PartialState
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

import deepspeed_sdp.hf

deepspeed_sdp.hf.enable()
# accelerate looks for processes of a CPU only if it is told to, and for DeepSpeed only if it is not.
PartialState(cpu=not torch.cuda.is_available())
accelerator = Accelerator()
set_seed(0)

model = LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=4))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
counting = (torch.arange(32) + torch.randint(0, 256, (400, 1))) % 256
loader = DataLoader(counting, batch_size=4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for ids in loader:
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
accelerator.print(f"loss {accelerator.reduce(loss.detach(), 'mean'):.3f}")

# The full model, an ordinary HuggingFace folder.
accelerator.unwrap_model(model).save_pretrained(
    "runs/accelerate",
    state_dict=accelerator.get_state_dict(model),
    is_main_process=accelerator.is_main_process,
)
accelerator.save_state("runs/accelerate/state")
accelerator.end_training()
