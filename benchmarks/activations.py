"""What autograd keeps of one decoder layer, by module, in units of the residual stream: dense and both maskings.

    python benchmarks/activations.py

One process; the subnetwork is worker 0's of four at coverage 1/2. A layer that is not owned is shown for blocks.
"""

import argparse
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from deepspeed_sdp.config import SDPConfig
from deepspeed_sdp.options import OptionParser
from deepspeed_sdp.report.saved_activations import saved_activations
from deepspeed_sdp.subnetwork import cut_model, plan_for

BLOCKS = {"masking": "backward", "granularity": "layer"}
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "forward": {"output_scaling": "none"},
    "backward, neurons": {"masking": "backward"},
    "backward, frozen block": BLOCKS,
    "recomputed": {**BLOCKS, "backward": {"recompute_frozen": True}},
}


def main() -> None:
    parser = OptionParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--micro_batch", type=int, default=4)
    args = parser.parse_args()
    columns = {name: measure(args, block) for name, block in CONTENDERS.items()}
    modules = list(dict.fromkeys(module for column in columns.values() for module in column))
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for module in modules:
        print(f"| {module} | " + " | ".join(f"{column.get(module, 0):.2f}" for column in columns.values()) + " |")
    print("| sum | " + " | ".join(f"{sum(column.values()):.2f}" for column in columns.values()) + " |")


def measure(args: argparse.Namespace, block: dict[str, Any] | None) -> dict[str, float]:
    heads = args.hidden_size // 32
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=args.hidden_size,
            intermediate_size=args.hidden_size * 11 // 4,
            num_hidden_layers=4,
            num_attention_heads=heads,
            num_key_value_heads=heads,
        )
    )
    layer = 1
    if block is not None:
        sdp = SDPConfig.parse({"coverage": 0.5, **block})
        unit = sdp.block_unit
        cut_model(
            model,
            plan_for(model, sdp, 4),
            0,
            masking=sdp.masking,
            output_scaling=sdp.output_scaling if sdp.masking == "forward" else "none",
            block_unit=unit,
            recompute_frozen=sdp.backward.recompute_frozen,
        )
        if unit:
            layers = model.model.layers
            # Not the first: a recomputed one keeps nothing of its own where its input is kept already.
            layer = max(i for i in range(4) if not any(p.requires_grad for p in layers[i].parameters()))
    ids = torch.randint(0, 1000, (args.micro_batch, args.sequence))
    with saved_activations(model) as saved:
        model(input_ids=ids, labels=ids)
    prefix, stream = f"model.layers.{layer}", 4 * ids.numel() * args.hidden_size
    return {
        name.removeprefix(prefix).removeprefix(".") or "layer": nbytes / stream
        for name, nbytes in saved.by_module.items()
        if f"{name}.".startswith(f"{prefix}.")
    }


if __name__ == "__main__":
    main()
