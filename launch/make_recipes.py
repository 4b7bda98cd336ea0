"""Write the FineWeb recipes: a file for each size and method, which differ in what their names say.

    python launch/make_recipes.py ds_configs/fineweb

Recipes are plain files to be copied and edited; this only keeps the set alike.
"""

import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

# Per size: subnetworks, sequence length, global batch, micro-batch, tokens of the dense baseline, peak learning rate.
SIZES: dict[str, tuple[int, int, int, int, float, float]] = {
    "15m": (4, 512, 64, 4, 3e8, 2e-3),
    "134m": (8, 1024, 256, 16, 1e9, 1e-3),
    "500m": (8, 2048, 256, 8, 1e9, 6e-4),
    "1b": (8, 2048, 256, 4, 1e9, 4e-4),
}
METHODS = [(masking, granularity) for masking in ("forward", "backward") for granularity in ("neuron", "layer")]
COVERAGES = [Fraction(eighths, 8) for eighths in (2, 3, 4, 5, 6)]


def recipes() -> dict[str, dict[str, Any]]:
    """File name -> recipe."""
    made = {}
    for size, (workers, *_) in SIZES.items():
        made[f"{size}/dense.json"] = recipe(size, {"enabled": False})
        for masking, granularity in METHODS:
            for coverage in COVERAGES:
                # Owners are whole, and more than one: nothing would tie the workers together.
                owners = coverage * workers
                if owners.denominator == 1 and owners > 1:
                    block = {
                        "masking": masking,
                        "granularity": granularity,
                        "num_subnetworks": workers,
                        "coverage": float(coverage),
                    }
                    name = f"{masking}-{granularity}-{coverage.numerator}_{coverage.denominator}"
                    made[f"{size}/{name}.json"] = recipe(size, block)
    return made


def recipe(size: str, block: dict[str, Any]) -> dict[str, Any]:
    _, seq_length, batch, micro_batch, tokens, learning_rate = SIZES[size]
    return {
        "pretraining": {
            "model": f"llama-{size}",
            "seq_length": seq_length,
            "tokens": tokens,
            "match": "flops",
            "warmup_fraction": 0.05,
            "document_reset": "none",
            "activation_checkpointing": False,
            "seed": 0,
            "log_interval": 10,
            "eval_interval": 250,
            "eval_sequences": 512,
            "checkpoint_interval": 250,
        },
        "subnetwork_data_parallel": block,
        "train_batch_size": batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000,
        **({} if size == "15m" else {"bf16": {"enabled": True}}),
        "zero_optimization": {"stage": 1},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": learning_rate,
                "betas": [0.9, 0.95],
                "eps": 1e-8,
                "weight_decay": 0.1,
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_num_steps": "auto",
                "warmup_min_ratio": 0.0,
                "warmup_type": "linear",
                "cos_min_ratio": 0.1,
            },
        },
    }


def text_of(recipe: dict[str, Any]) -> str:
    return json.dumps(recipe, indent=2) + "\n"


def main(folder: Path) -> None:
    for name, content in recipes().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text_of(content), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
